from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_reader import STRIDE, assert_same, make_record

from kdcache.config.loader import MaskConfig
from kdcache.errors import CorruptCacheError, StorageError
from kdcache.format.manifest import SelectionInfo
from kdcache.format.record import PADDING_ID, SequenceRecord
from kdcache.loader.batches.assemble import BatchLayout, EntryColumns, assemble, assemble_reference
from kdcache.loader.batches.batch import NO_TARGET, Batch, stack_batches
from kdcache.loader.batches.buffers import BufferPool

ROWS = st.lists(st.lists(st.integers(1, 6), max_size=4), min_size=1, max_size=4)
MASKS = st.sampled_from(["all", "none", "random"])


def make_records(rows: list[list[int]], **options: object) -> list[SequenceRecord]:
    lengths = [n for row in rows for n in row]
    return [make_record(i, n, k=3, **options) for i, n in enumerate(lengths)]  # pyright: ignore[reportArgumentType]


def make_layout(rows: list[list[int]], num_columns: int | None = 3) -> BatchLayout:
    return BatchLayout(tuple(len(row) for row in rows), seq_len=24, columns=EntryColumns(num_columns))


def test_two_sequences_in_a_row_by_hand() -> None:
    first, second = make_record(0, 3, k=2, supervised="all"), make_record(1, 2, k=2, supervised="all")
    batch = assemble([first, second], BatchLayout((2, 0), seq_len=7, columns=EntryColumns(2)))
    assert batch.input_ids_BT.tolist() == [[1, 2, 3, 1001, 1002, 0, 0], [0] * 7]
    assert batch.position_ids_BT.tolist() == [[0, 1, 2, 0, 1, 0, 0], [0] * 7]
    assert batch.segment_ids_BT.tolist() == [[1, 1, 1, 2, 2, 0, 0], [0] * 7]
    assert batch.target_ids_BT.tolist() == [[2, 3, -100, 1002, -100, -100, -100], [-100] * 7]
    assert batch.flat_positions_P.tolist() == [0, 1, 2, 3, 4]  # the last position of each has a teacher and no label
    assert batch.teacher.token_ids_PK.tolist() == [*first.distributions.token_ids_E.reshape(3, 2).tolist(),
                                           *second.distributions.token_ids_E.reshape(2, 2).tolist()]  # fmt: skip
    assert batch.weights_P.tolist() == [1.0] * 5
    assert (batch.cu_seqlens_G1.tolist(), batch.max_seqlen) == ([0, 3, 5, 7, 14], 7)
    assert (batch.num_sequences, batch.num_tokens) == (2, 5)


def test_a_printed_batch_is_one_line_of_sizes() -> None:
    first, second = make_record(0, 3, k=2, supervised="all"), make_record(1, 2, k=2, supervised="all")
    batch = assemble([first, second], BatchLayout((2, 0), seq_len=7, columns=EntryColumns(2)))
    teacher = f"SoftTargets(5 positions, up to 2 {batch.teacher.entries} entries of an unknown number of ids)"
    assert repr(batch) == f"Batch(2 rows of 7 slots, 2 sequences, teacher={teacher})"


@settings(deadline=None)
@given(ROWS, MASKS, st.booleans(), st.sampled_from([3, 5, None]))
def test_assembling_equals_the_reference(rows: list[list[int]], mask: str, ragged: bool, num_columns: int | None) -> None:
    records, layout = make_records(rows, supervised=mask, ragged=ragged), make_layout(rows, num_columns)
    assert_same(assemble(records, layout), assemble_reference(records, layout))


@settings(deadline=None)
@given(ROWS, MASKS, st.booleans())
def test_labels_and_rows_are_right_by_what_the_tokens_say(rows: list[list[int]], mask: str, ragged: bool) -> None:
    """Independent of both implementations: each token id names its sequence and place, so nothing can be off by one."""
    records = make_records(rows, supervised=mask, ragged=ragged)
    check_alignment(assemble(records, make_layout(rows)), records)


def check_alignment(batch: Batch, records: list[SequenceRecord]) -> None:
    ids, labels = batch.input_ids_BT.reshape(-1), batch.target_ids_BT.reshape(-1)
    teacher = dict(zip(batch.flat_positions_P.tolist(), range(len(batch.flat_positions_P)), strict=True))
    for place in range(ids.size):
        if ids[place] == 0:
            assert labels[place] == NO_TARGET
            assert place not in teacher
            continue
        number, t = divmod(int(ids[place]) - 1, STRIDE)
        record = records[number]
        assert batch.position_ids_BT.reshape(-1)[place] == t
        supervised, is_last = bool(record.sequence.supervised_N[t]), t + 1 == record.sequence.num_tokens
        assert labels[place] == (ids[place] + 1 if supervised and not is_last else NO_TARGET)
        assert (place in teacher) == supervised
        if supervised:
            check_distribution(batch, teacher[place], record, int(record.sequence.supervised_N[:t].sum()))


def check_distribution(batch: Batch, p: int, record: SequenceRecord, record_p: int) -> None:
    d = record.distributions
    entries = slice(d.offsets_P1[record_p], d.offsets_P1[record_p + 1])
    filled = batch.teacher.token_ids_PK[p] != PADDING_ID
    assert batch.teacher.token_ids_PK[p][filled].tolist() == d.token_ids_E[entries].tolist()
    assert batch.teacher.logprobs_PK[p][filled].tolist() == d.logprobs_E[entries].tolist()
    assert np.isneginf(batch.teacher.logprobs_PK[p][~filled]).all()
    assert batch.teacher.tail_mass_P[p] == d.tail_mass_P[record_p]


@settings(deadline=None)
@given(ROWS)
def test_segments_cover_each_place_of_the_flattened_rows_once(rows: list[list[int]]) -> None:
    batch = assemble(make_records(rows), make_layout(rows))
    ids = [(b, int(segment)) for b, row in enumerate(batch.segment_ids_BT) for segment in row]
    starts = [place for place in range(len(ids)) if place == 0 or ids[place] != ids[place - 1]]
    assert batch.cu_seqlens_G1.tolist() == [*starts, len(ids)]
    assert batch.cu_seqlens_G1.dtype == np.int32
    assert batch.max_seqlen == np.diff(batch.cu_seqlens_G1).max()


def test_what_a_selection_keeps_beside_the_entries_comes_along_with_its_position() -> None:
    records = [with_scalars(record) for record in make_records([[3, 4], [2]], chat=True)]
    columns = EntryColumns(3, has_exact=True, has_entropy=True, temperatures=(0.5, 2.0))
    layout = BatchLayout((2, 1, 0), 8, columns, MaskConfig(roles=("user", "assistant", "tool", "none")))
    batch = assemble(records, layout)
    assert_same(batch, assemble_reference(records, layout))
    assert batch.teacher.entropy_P is not None
    assert batch.teacher.entropy_P.tolist() == batch.input_ids_BT.reshape(-1)[batch.flat_positions_P].tolist()
    empty = assemble([], BatchLayout((0,), 8, columns))
    assert empty.teacher.log_z_PL is not None
    assert (empty.teacher.log_z_PL.shape, empty.teacher.num_exact_P is not None) == ((0, 2), True)


def with_scalars(record: SequenceRecord) -> SequenceRecord:
    """With an entropy that says which token the position stands at."""
    ids_P = record.sequence.input_ids_N[record.sequence.supervised_N]
    d = replace(
        record.distributions,
        num_exact_P=np.arange(len(ids_P)),
        log_z_PL=np.arange(2 * len(ids_P), dtype=np.float32).reshape(-1, 2),
        entropy_P=ids_P.astype(np.float32),
    )
    return SequenceRecord(record.sequence, d)


def test_a_label_never_is_a_token_of_another_sequence() -> None:
    rows = [[3, 4, 2], [5, 1], []]
    batch = assemble(make_records(rows, supervised="all"), make_layout(rows))
    labelled = batch.target_ids_BT != NO_TARGET
    assert labelled.sum() == 2 + 3 + 1 + 4 + 0
    assert ((batch.target_ids_BT[labelled] - 1) // STRIDE == (batch.input_ids_BT[labelled] - 1) // STRIDE).all()


def test_a_batch_without_positions_has_arrays_of_none() -> None:
    batch = assemble([], BatchLayout((0, 0), seq_len=8, columns=EntryColumns(3)))
    assert batch.flat_positions_P.shape == (0,)
    assert batch.teacher.token_ids_PK.shape == batch.teacher.logprobs_PK.shape == (0, 3)
    assert (batch.num_sequences, batch.num_tokens) == (0, 0)


def test_stacked_batches_equal_the_batch_assembled_at_once() -> None:
    rows = [[3, 4], [], [5, 1, 1], [2]]
    records = make_records(rows, ragged=True)
    parts = [assemble(records[:2], make_layout(rows[:2])), assemble(records[2:5], make_layout(rows[2:3]))]
    parts.append(assemble(records[5:], make_layout(rows[3:])))
    assert_same(stack_batches(parts), assemble(records, make_layout(rows)))


def test_records_that_do_not_fit_are_refused_naming_their_source() -> None:
    record, masked = make_record(0, 5, k=3, supervised="all"), make_record(0, 5, k=3, supervised="none")
    with pytest.raises(CorruptCacheError, match="memory#0: 5 tokens at column 0 pass seq_len 4"):
        assemble([record], BatchLayout((1,), seq_len=4, columns=EntryColumns(3)))
    with pytest.raises(CorruptCacheError, match="memory#0: a position has 3 entries"):
        assemble([record], BatchLayout((1,), seq_len=8, columns=EntryColumns(2)))
    with pytest.raises(CorruptCacheError, match="memory#0: 0 distributions for 5 supervised"):
        assemble([SequenceRecord(record.sequence, masked.distributions)], BatchLayout((1,), seq_len=8, columns=EntryColumns(3)))


def test_the_width_of_a_batch_follows_what_there_is_and_not_what_a_selection_claims():
    def width(k: int, vocab_size: int) -> int | None:
        return EntryColumns.of([SelectionInfo(kind="top_k", params={"k": k})], vocab_size).num_columns

    assert (width(5, 97), width(98, 97), width(2**31, 97)) == (5, 97, 97)
    assert width(2**31, 2**31) is None  # as wide as the widest position


def test_a_batch_beyond_the_machine_s_memory_is_said_in_words():
    with pytest.raises(StorageError, match=r"a batch takes \d+\.\d GiB, which this machine does not have"):
        BufferPool(1).take((2**40, 2**20), np.int32)
