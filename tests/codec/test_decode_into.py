"""Decoding straight into a batch's arrays gives what decoding and copying gives, for every codec."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcache.codec import CODECS, get_codec
from kdcache.codec.base import ColumnValues, DecodeTask, EntryArrays, copy_into
from kdcache.codec.packed import PackedCodec
from kdcache.errors import CorruptCacheError
from kdcache.format.manifest import SelectionInfo
from kdcache.format.record import Distributions
from kdcache.store.records.column_view import column_view

EXACT = [
    SelectionInfo(kind="top_k", params={"k": 7}),
    SelectionInfo(kind="top_p_k", params={"p": 1.0, "k": 7}, temperatures=(2.0, 4.0), entropy=True),
]


def make_distributions(rng: np.random.Generator, counts: list[int], vocab_size: int, selection: SelectionInfo) -> Distributions:
    logprobs = [np.sort(rng.choice([-1e-7, -6e-5, -0.3, -9.5, -9e4, -np.inf], n).astype(np.float32))[::-1] for n in counts]
    ids = [_distinct(rng, vocab_size, n) for n in counts]
    ids = [i[np.lexsort((i, -x))] for i, x in zip(ids, logprobs, strict=True)]
    num_temperatures = len(selection.temperatures)
    return Distributions(
        token_ids_E=np.concatenate([*ids, np.zeros(0)]).astype(np.int32),
        logprobs_E=np.concatenate([*logprobs, np.zeros(0)]).astype(np.float32),
        offsets_P1=np.append(0, np.cumsum(counts)).astype(np.int64),
        tail_mass_P=rng.random(len(counts)).astype(np.float32),
        outside_target_logprobs=np.zeros(0, np.float32),
        log_z_PL=rng.random((len(counts), num_temperatures)).astype(np.float32) if num_temperatures else None,
        entropy_P=rng.random(len(counts)).astype(np.float32) if selection.entropy else None,
    )


def _distinct(rng: np.random.Generator, vocab_size: int, count: int) -> np.ndarray:
    return np.array(sorted(rng.choice(min(vocab_size, 10_000), count, replace=False) + max(0, vocab_size - 10_000)))


def columns_of(codec: PackedCodec, distributions: Distributions) -> ColumnValues:
    values = {f.name: column_view(a)[0] for f, a in zip(codec.fields(), codec.encode([distributions]), strict=True)}
    return {name: value for name, value in values.items() if value is not None}


def blank(num_positions: int, k: int, selection: SelectionInfo) -> EntryArrays:
    return EntryArrays(
        token_ids_PK=np.full((num_positions, k), 123, np.int32),
        logprobs_PK=np.full((num_positions, k), 1.5, np.float32),
        tail_mass_P=np.full(num_positions, 7, np.float32),
        log_z_PL=np.zeros((num_positions, len(selection.temperatures)), np.float32) if selection.temperatures else None,
        entropy_P=np.zeros(num_positions, np.float32) if selection.entropy else None,
    )


def assert_same(left: EntryArrays, right: EntryArrays) -> None:
    for name in EntryArrays.__slots__:
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name), err_msg=name)


# Not archive: it refuses what is no record, and these draws are none.
@pytest.mark.parametrize("codec_id", [codec_id for codec_id in CODECS if codec_id != "archive"])
@settings(deadline=None, max_examples=40)
@given(
    counts=st.lists(st.integers(0, 7), max_size=12),
    is_full=st.booleans(),
    vocab_size=st.sampled_from([1, 2, 97, 65_536, 151_936, 2**31]),
    selection=st.sampled_from(EXACT),
    seed=st.integers(0, 99),
    keeps=st.none() | st.integers(0, 2**12 - 1),
)
def test_decoding_into_arrays_is_decoding_and_copying(
    codec_id: str,
    counts: list[int],
    is_full: bool,
    vocab_size: int,
    selection: SelectionInfo,
    seed: int,
    keeps: int | None,
) -> None:
    counts = [min(vocab_size, 7 if is_full else n) for n in counts]
    codec = get_codec(codec_id, {"vocab_size": vocab_size}, selection)
    columns = columns_of(codec, make_distributions(np.random.default_rng(seed), counts, vocab_size, selection))  # pyright: ignore[reportArgumentType]
    offsets_P1 = np.append(0, np.cumsum(counts)).astype(np.int64)
    keep_P = None if keeps is None else np.array([keeps >> p & 1 for p in range(len(counts))], bool)
    num_kept = len(counts) if keep_P is None else int(keep_P.sum())
    found, expected = blank(num_kept, 7, selection), blank(num_kept, 7, selection)
    codec.decode_into(columns, offsets_P1, found, keep_P)
    copy_into(codec.decode(columns, offsets_P1), expected, keep_P)
    assert_same(found, expected)


def test_every_float16_becomes_the_float32_that_numpy_makes_of_it() -> None:
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16)
    codec, columns = PackedCodec(vocab_size=5), {"logprobs": halves, "tail_logprobs": np.zeros(1024, np.float16)}
    columns["token_ids_packed"] = np.zeros(2**16 * 3 // 8, np.uint8)
    out = blank(1024, 64, EXACT[0])
    codec.decode_into(columns, np.arange(1025, dtype=np.int64) * 64, out)
    expected = halves.astype(np.float32).reshape(1024, 64)
    np.testing.assert_array_equal(out.logprobs_PK, expected)
    np.testing.assert_array_equal(np.signbit(out.logprobs_PK[expected == 0]), np.signbit(expected[expected == 0]))


def test_several_sequences_at_once_are_each_by_itself_and_an_error_names_its_place() -> None:
    codec, rng = PackedCodec(vocab_size=97), np.random.default_rng(1)
    tasks, expected = [], []
    for number, counts in enumerate(([7, 7], [], [3, 0, 5], [7] * 20)):
        distributions = make_distributions(rng, counts, 97, EXACT[0])
        columns, out, alone = columns_of(codec, distributions), blank(len(counts), 7, EXACT[0]), blank(len(counts), 7, EXACT[0])
        tasks.append(DecodeTask(columns, distributions.offsets_P1, out, None, f"row {number}"))
        copy_into(codec.decode(columns, distributions.offsets_P1), alone)
        expected.append(alone)
    codec.decode_many_into(tasks)
    for task, alone in zip(tasks, expected, strict=True):
        assert_same(task.out, alone)
    codec.decode_many_into([])
    with pytest.raises(CorruptCacheError, match=r"row 0: a token id is outside the vocabulary of 90"):
        PackedCodec(vocab_size=90).decode_many_into(tasks)
    tasks[2] = DecodeTask(
        {**tasks[2].columns, "logprobs": np.zeros(3, np.float16)}, tasks[2].offsets_P1, tasks[2].out, None, "row 2"
    )
    with pytest.raises(CorruptCacheError, match=r"row 2: column 'logprobs' holds 3 values"):
        codec.decode_many_into(tasks)


def test_arrays_that_are_not_contiguous_are_not_written_to() -> None:
    codec, columns, offsets_P1 = packed()
    room = blank(9, 14, EXACT[0])
    out = EntryArrays(room.token_ids_PK[:, ::2], room.logprobs_PK[:, ::2], room.tail_mass_P)
    with pytest.raises(ValueError, match="C-contiguous"):
        codec.decode_into(columns, offsets_P1, out)


def packed(vocab_size: int = 97) -> tuple[PackedCodec, dict[str, np.ndarray], np.ndarray]:
    codec = PackedCodec(vocab_size=vocab_size)
    distributions = make_distributions(np.random.default_rng(0), [7] * 9, vocab_size, EXACT[0])
    return codec, dict(columns_of(codec, distributions)), distributions.offsets_P1


def test_bytes_at_any_alignment_are_read() -> None:
    codec, columns, offsets_P1 = packed()
    expected, found = blank(9, 7, EXACT[0]), blank(9, 7, EXACT[0])
    codec.decode_into(columns, offsets_P1, expected)
    shifted = {}
    for name, values in columns.items():
        room = np.zeros(values.nbytes + 1, np.uint8)
        room[1:] = values.view(np.uint8)
        shifted[name] = room[1:].view(values.dtype)
    codec.decode_into(shifted, offsets_P1, found)
    assert_same(found, expected)


@pytest.mark.parametrize("name", ["token_ids_packed", "logprobs", "tail_logprobs"])
def test_columns_that_are_too_short_are_refused_before_they_are_read(name: str) -> None:
    codec, columns, offsets_P1 = packed()
    columns[name] = columns[name][: -8 if name == "token_ids_packed" else -1]
    with pytest.raises(CorruptCacheError, match=name):
        codec.decode_into(columns, offsets_P1, blank(9, 7, EXACT[0]))


def test_ids_outside_the_vocabulary_and_rows_wider_than_the_batch_are_refused() -> None:
    codec, columns, offsets_P1 = packed()
    with pytest.raises(CorruptCacheError, match="outside the vocabulary of 90"):
        PackedCodec(vocab_size=90).decode_into(columns, offsets_P1, blank(9, 7, EXACT[0]))
    with pytest.raises(CorruptCacheError, match="a position has 7 entries"):
        codec.decode_into(columns, offsets_P1, blank(9, 6, EXACT[0]))
