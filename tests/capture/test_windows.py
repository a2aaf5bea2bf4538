"""Long items are cut by a stated policy: each position is recorded exactly once, and nothing is lost without being counted."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcache.capture.windows import TokenizedItem, cut_windows, num_truncated_tokens, supervise_assistant, window_bounds
from kdcache.config.capture import WindowConfig
from kdcache.errors import InputError
from kdcache.format.record import NO_TARGET, sequence_key


def tokenized(num_tokens, supervised=None, turn_starts=(0,)):
    mask = np.ones(num_tokens, bool) if supervised is None else np.asarray(supervised, bool)
    roles = np.arange(num_tokens) % 5
    return TokenizedItem(np.arange(num_tokens) + 100, mask, roles, np.asarray(turn_starts, np.int32), "a.txt")


@st.composite
def windows(draw):
    size = draw(st.integers(1, 9))
    return WindowConfig(size=size, overlap=draw(st.integers(0, size - 1)))


@given(num_tokens=st.integers(1, 60), window=windows())
def test_split_records_each_position_once_in_order_with_its_own_target(num_tokens, window):
    sequences = cut_windows(tokenized(num_tokens), window, "")
    recorded = np.concatenate([s.input_ids_N[s.positions_P] for s in sequences])
    assert (recorded == np.arange(num_tokens) + 100).all()
    for sequence in sequences:
        targets = sequence.target_ids_P
        has_target = targets != NO_TARGET
        assert (targets[has_target] == sequence.input_ids_N[sequence.positions_P][has_target] + 1).all()
        assert 1 <= sequence.num_tokens <= window.size
    num_without = sum(int((s.target_ids_P == NO_TARGET).sum()) for s in sequences)
    assert num_without == (1 if window.overlap else len(sequences))


@given(num_tokens=st.integers(1, 60), window=windows())
def test_windows_overlap_by_exactly_the_overlap_and_cover_everything(num_tokens, window):
    bounds = list(window_bounds(num_tokens, window))
    assert bounds[0][0] == 0
    assert bounds[-1][1] == num_tokens
    for (_, stop), (start, _) in itertools.pairwise(bounds):
        assert stop - start == window.overlap


def test_the_seam_without_overlap_has_a_record_and_no_target():
    first, second = cut_windows(tokenized(6), WindowConfig(size=4), "")
    assert first.supervised_N.tolist() == [True] * 4
    assert first.target_ids_P.tolist() == [101, 102, 103, NO_TARGET]
    assert second.input_ids_N.tolist() == [104, 105]
    assert (first.source, second.source) == ("a.txt#0", "a.txt#1")


def test_the_seam_with_overlap_is_recorded_in_the_later_window_with_its_target():
    first, second = cut_windows(tokenized(6), WindowConfig(size=4, overlap=2), "")
    assert first.supervised_N.tolist() == [True, True, True, False]
    assert second.input_ids_N.tolist() == [102, 103, 104, 105]
    assert second.supervised_N.tolist() == [False, True, True, True]
    assert second.target_ids_P.tolist() == [104, 105, NO_TARGET]


def test_an_item_that_fits_is_one_sequence_with_the_items_source():
    (sequence,) = cut_windows(tokenized(4), WindowConfig(size=4, overlap=3), "t")
    assert sequence.source == "a.txt"
    assert sequence.key == sequence_key(sequence.input_ids_N, sequence.supervised_N, "t")
    assert sequence.input_ids_N.dtype == np.int32
    assert sequence.roles_N.dtype == np.uint8
    assert sequence.turn_starts.dtype == np.int32


def test_turn_starts_move_with_the_window_and_a_window_inside_a_turn_starts_with_one():
    item = tokenized(10, turn_starts=[1, 3, 6])
    starts = [s.turn_starts.tolist() for s in cut_windows(item, WindowConfig(size=3), "")]
    assert starts == [[1], [0], [0], [0]]
    starts = [s.turn_starts.tolist() for s in cut_windows(item, WindowConfig(size=5), "")]
    assert starts == [[1, 3], [0, 1]]


def test_the_mask_is_cut_with_the_tokens_so_that_a_seam_in_an_answer_is_kept():
    item = tokenized(6, supervised=supervise_assistant(np.array([0, 0, 1, 1, 1, 0], bool)))
    first, second = cut_windows(item, WindowConfig(size=3), "")
    assert first.supervised_N.tolist() == [False, True, True]
    assert second.supervised_N.tolist() == [True, False, False]


def test_supervising_the_assistant_marks_the_positions_that_predict_its_tokens():
    assert supervise_assistant(np.array([False, True, True, False, True])).tolist() == [True, True, False, True, False]


def test_truncate_keeps_the_first_window_and_counts_the_rest():
    window = WindowConfig(size=4, policy="truncate")
    (sequence,) = cut_windows(tokenized(10), window, "")
    assert sequence.input_ids_N.tolist() == [100, 101, 102, 103]
    assert num_truncated_tokens(10, window) == 6
    assert num_truncated_tokens(4, window) == 0
    assert num_truncated_tokens(10, WindowConfig(size=4)) == 0


def test_error_refuses_a_long_item_and_says_both_numbers():
    window = WindowConfig(size=4, policy="error")
    assert len(cut_windows(tokenized(4), window, "")) == 1
    with pytest.raises(InputError, match=r"a\.txt: 5 tokens, but input\.window\.size is 4"):
        cut_windows(tokenized(5), window, "")
