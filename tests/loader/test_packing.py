import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcache.loader.order.shuffle import Order, sequences_at
from kdcache.loader.rows._numba_packing import first_fit
from kdcache.loader.rows.packing import BLOCK_BUFFERS, PACKING_VERSION, Packing, Rows, first_fit_reference, pack_block

LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=60)


def test_first_fit_by_hand() -> None:
    assert first_fit_reference([5, 6, 4, 3, 1], 10) == [0, 1, 0, 1, 0]
    assert first_fit(np.array([5, 6, 4, 3, 1, 9, 2]), 10, 5).tolist() == [0, 1, 0, 1, 0, 2, 3]


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 70))
def test_compiled_first_fit_equals_the_reference_window_by_window(lengths: list[int], window: int) -> None:
    expected: list[int] = []
    for start in range(0, len(lengths), window):
        rows = first_fit_reference(lengths[start : start + window], 9)
        expected += _behind(expected, rows)
    assert first_fit(np.array(lengths), 9, window).tolist() == expected


def _behind(rows: list[int], more: list[int]) -> list[int]:
    """Rows of the next window, numbered behind those there are."""
    first = max(rows, default=-1) + 1
    return [first + row for row in more]


def block_of(lengths: np.ndarray, order: Order, block: int, packing: Packing) -> Rows:
    start = block * packing.block_sequences
    sequences = sequences_at(order, start, min(start + packing.block_sequences, order.num_sequences))
    return pack_block(sequences, lengths[sequences].astype(np.int64), packing)


def pack_epoch_reference(lengths: list[int], order: Order, packing: Packing) -> list[list[int]]:
    """The whole epoch's rows, window by window, with the plain first fit."""
    sequences = sequences_at(order, 0, len(lengths)).tolist()
    rows: list[list[int]] = []
    for start in range(0, len(sequences), packing.buffer):
        window = sequences[start : start + packing.buffer]
        row_W = first_fit_reference([lengths[s] for s in window], packing.seq_len)
        rows += [[s for s, r in zip(window, row_W, strict=True) if r == row] for row in range(max(row_W) + 1)]
    return rows


@pytest.mark.parametrize("num_sequences", [1, 5, 6, 7, 500])
@pytest.mark.parametrize("window", [1, 6, 1024])
def test_blocks_one_after_another_equal_windows_packed_one_by_one(num_sequences: int, window: int) -> None:
    lengths = np.random.default_rng(window).integers(1, 33, num_sequences).astype(np.uint32)
    order, packing = Order(num_sequences, 1, 2), Packing("first_fit", 32, window)
    num_blocks = -(-num_sequences // (BLOCK_BUFFERS * window))
    blocks = [block_of(lengths, order, b, packing) for b in range(num_blocks)]
    rows = [block[r].tolist() for block in blocks for r in range(len(block))]
    assert rows == pack_epoch_reference(lengths.tolist(), order, packing)


def test_without_packing_each_row_is_one_sequence_in_the_order() -> None:
    order = Order(40, 1, 0)
    rows = block_of(np.full(40, 3, np.uint32), order, 0, Packing("none", 32, 100))
    assert [rows[r].tolist() for r in range(len(rows))] == [[s] for s in sequences_at(order, 0, 40).tolist()]


def test_packing_of_version_1_is_pinned() -> None:
    """States name the version: if these rows change, PACKING_VERSION must too."""
    assert PACKING_VERSION == 1
    lengths = np.array([7, 2, 9, 4, 4, 1, 6, 3, 8, 5], np.uint32)
    rows = block_of(lengths, Order(10, 0, 0), 0, Packing("first_fit", 10, 5))
    assert [rows[r].tolist() for r in range(len(rows))] == [[3, 6], [8, 1], [4], [7, 0], [2, 5], [9]]
