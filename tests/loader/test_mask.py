import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_reader import MemoryReader, assert_same, make_record

from kdcache.config.loader import LoaderConfig, MaskConfig
from kdcache.format.record import ROLES, SequenceRecord, TokenSequence
from kdcache.loader.batches.assemble import BatchLayout, EntryColumns, assemble, assemble_reference
from kdcache.loader.batches.batch import NO_TARGET
from kdcache.loader.batches.mask import choose, choose_reference
from kdcache.loader.loader import Loader

ROLE = st.sampled_from(ROLES)
MASKS = st.builds(
    MaskConfig,
    roles=st.none() | st.lists(ROLE, unique=True).map(tuple),
    role_weights=st.dictionaries(ROLE, st.sampled_from([0.0, 0.25, 1.0, 2.0])),
    drop_first=st.integers(0, 4),
    drop_first_of=st.sampled_from(["sequence", "turn"]),
)
NONE, USER, ASSISTANT = 0, 2, 3


def chat() -> TokenSequence:
    """Template, user, user, template, assistant x3, user, assistant; supervised everywhere."""
    return TokenSequence(
        input_ids_N=np.arange(10, 19, dtype=np.int32),
        supervised_N=np.ones(9, bool),
        roles_N=np.array([NONE, USER, USER, NONE, ASSISTANT, ASSISTANT, ASSISTANT, USER, ASSISTANT], np.uint8),
        turn_starts=np.array([1, 3, 7, 8], np.int32),
        source="chat",
        key=b"",
    )


def kept(mask: MaskConfig) -> list[int]:
    choice = choose(chat(), mask)
    return list(range(9)) if choice.keep_P is None else np.flatnonzero(choice.keep_P).tolist()


def test_a_role_keeps_the_positions_that_predict_its_tokens() -> None:
    assert kept(MaskConfig()) == list(range(9))
    assert kept(MaskConfig(roles=("assistant",))) == [3, 4, 5, 7]
    assert kept(MaskConfig(roles=("user", "none"))) == [0, 1, 2, 6]


def test_the_first_positions_of_a_sequence_or_the_first_tokens_of_each_turn_are_dropped() -> None:
    assert kept(MaskConfig(drop_first=3)) == [3, 4, 5, 6, 7, 8]
    assert kept(MaskConfig(drop_first=1, drop_first_of="turn")) == [1, 3, 4, 5, 8]
    assert kept(MaskConfig(roles=("assistant",), drop_first=2, drop_first_of="turn")) == [4, 5]


def test_weights_follow_the_role_of_the_predicted_token() -> None:
    choice = choose(chat(), MaskConfig(role_weights={"user": 0.5, "none": 0.0}))
    assert choice.keep_P is not None
    assert choice.kept_weights is not None
    assert np.flatnonzero(choice.keep_P).tolist() == [0, 1, 3, 4, 5, 6, 7]
    assert choice.kept_weights.tolist() == [0.5, 0.5, 1, 1, 1, 0.5, 1]


@settings(deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 12), st.sampled_from(["all", "none", "random"]), MASKS)
def test_the_fast_choice_equals_the_reference(number: int, length: int, supervised: str, mask: MaskConfig) -> None:
    sequence = make_record(number, length, k=1, supervised=supervised, chat=True).sequence
    choice, expected = choose(sequence, mask), choose_reference(sequence, mask)
    keep_P = np.ones(len(expected), bool) if choice.keep_P is None else choice.keep_P
    kept_weights = np.ones(len(expected)) if choice.kept_weights is None else choice.kept_weights
    assert keep_P.tolist() == [weight > 0 for weight in expected]
    assert kept_weights.tolist() == [weight for weight in expected if weight > 0]


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(1, 6), max_size=4), min_size=1, max_size=4), MASKS, st.booleans())
def test_rows_entries_labels_and_weights_of_a_masked_batch_equal_the_reference(
    rows: list[list[int]], mask: MaskConfig, ragged: bool
) -> None:
    lengths = [n for row in rows for n in row]
    records = [make_record(i, n, k=3, ragged=ragged, chat=True) for i, n in enumerate(lengths)]
    layout = BatchLayout(tuple(map(len, rows)), 24, EntryColumns(3), mask)
    batch = assemble(records, layout)
    assert_same(batch, assemble_reference(records, layout))
    labelled = np.flatnonzero(batch.target_ids_BT.reshape(-1) != NO_TARGET)
    assert set(labelled) <= set(batch.flat_positions_P.tolist())
    assert (batch.weights_P > 0).all()
    assert batch.num_masked + batch.num_positions == sum(r.distributions.num_positions for r in records)


def test_a_masked_loader_gives_a_share_of_what_the_unmasked_gives_in_the_same_order() -> None:
    reader = MemoryReader([5, 9, 3, 12, 7, 1] * 4, supervised="all", chat=True)
    options = LoaderConfig(seq_len=16, batch_rows=2, num_threads=0)
    masked = LoaderConfig(seq_len=16, batch_rows=2, num_threads=0, mask=MaskConfig(roles=("assistant",)))
    for left, right in zip(Loader(reader, masked), Loader(reader, options), strict=True):
        np.testing.assert_array_equal(left.input_ids_BT, right.input_ids_BT)
        places = np.searchsorted(right.flat_positions_P, left.flat_positions_P)
        np.testing.assert_array_equal(left.flat_positions_P, right.flat_positions_P[places])
        np.testing.assert_array_equal(left.teacher.token_ids_PK, right.teacher.token_ids_PK[places])
        np.testing.assert_array_equal(left.teacher.logprobs_PK, right.teacher.logprobs_PK[places])
    assert left.num_positions < right.num_positions


def test_a_mask_that_leaves_nothing_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    """As where the cache was captured from plain text, which has no roles."""
    plain, few = MemoryReader([5] * 40, supervised="all"), MemoryReader([5], supervised="all")
    options = LoaderConfig(seq_len=8, batch_rows=2, num_threads=0, mask=MaskConfig(roles=("assistant",)))
    for reader, num_positions, num_batches in ((plain, 100, 10), (few, 5, 1)):
        caplog.clear()
        assert sum(batch.num_positions for batch in Loader(reader, options)) == 0
        (message,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
        assert f"all {num_positions} positions of the first {num_batches} batches" in message


def test_a_mask_of_unknown_roles_is_refused() -> None:
    with pytest.raises(ValueError, match="mask"):
        Loader(MemoryReader([3]), LoaderConfig(mask=MaskConfig(roles=("robot",))))  # pyright: ignore[reportArgumentType]


def test_a_record_without_positions_has_nothing_to_choose_from() -> None:
    record: SequenceRecord = make_record(0, 5, k=2, supervised="none", chat=True)
    assert choose_reference(record.sequence, MaskConfig(drop_first=2)) == []
