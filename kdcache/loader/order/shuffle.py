"""The order of an epoch: a keyed bijection of 0..num_sequences-1, computed rank by rank, never held in memory.

Ranks are numbered by the smallest number of bits that holds them all. The bits are cut into two halves and run through an
alternating Feistel network (Luby and Rackoff 1988): each round XORs one half with a hash of the other, which can be undone and
is therefore a bijection of all integers of that many bits. A result that is not a sequence's number is run through again until
it is one ("cycle walking", Black and Rogaway 2002, section 3); fewer than half are outside, so two runs do on average.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ORDER_VERSION = 1
"""Goes up with any change of what `sequences_at` returns; a loader state names it, and is refused under another."""

_NUM_ROUNDS = 8
_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9
_MULTIPLIER_2 = 0x94D049BB133111EB


@dataclass(frozen=True, slots=True)
class Order:
    """The order in which one epoch reads a cache.

    Attributes:
        num_sequences: of the cache, >= 0.
        seed: in [0, 2**64).
        epoch: in [0, 2**64).
        shuffle: False for the cache's own order, whatever seed and epoch.
    """

    num_sequences: int
    seed: int
    epoch: int
    shuffle: bool = True


def sequences_at(order: Order, start: int, stop: int) -> NDArray[np.int64]:
    """(stop - start,) int64, the sequences at ranks start..stop-1 of the order.

    Raises:
        IndexError: not 0 <= start <= stop <= num_sequences.
    """
    if not 0 <= start <= stop <= order.num_sequences:
        raise IndexError(f"ranks {start}:{stop} are not within an order of {order.num_sequences} sequences")
    values = np.arange(start, stop, dtype=np.uint64)
    if order.shuffle and order.num_sequences > 1:
        keys, num_bits = _round_keys(order), (order.num_sequences - 1).bit_length()
        values = _encipher(values, keys, num_bits)
        # The ranks that are outside again after a run shrink by half or more: this ends.
        while len(outside := np.flatnonzero(values >= order.num_sequences)):
            values[outside] = _encipher(values[outside], keys, num_bits)
    return values.astype(np.int64)


def sequence_at_reference(order: Order, rank: int) -> int:
    """The sequence at one rank, in Python integers: the definition that `sequences_at` is compared with."""
    if not order.shuffle or order.num_sequences <= 1:
        return rank
    num_bits = (order.num_sequences - 1).bit_length()
    high_bits, low_bits = (num_bits + 1) // 2, num_bits // 2
    value = rank
    while True:
        high, low = value >> low_bits, value & ((1 << low_bits) - 1)
        for i, key in enumerate(_round_keys(order)):
            if i % 2 == 0:
                high ^= _mix(low ^ key) & ((1 << high_bits) - 1)
            else:
                low ^= _mix(high ^ key) & ((1 << low_bits) - 1)
        value = high << low_bits | low
        if value < order.num_sequences:
            return value


def derived_seed(seed: int, purpose: int, index: int = 0) -> int:
    """A seed of its own for each purpose and index, in [0, 2**63)."""
    state = _mix((ORDER_VERSION + _GOLDEN) & _MASK)
    for value in (seed, purpose, index):
        state = _mix(state ^ _mix((value + _GOLDEN) & _MASK))
    return state >> 1


def _encipher(values: NDArray[np.uint64], keys: list[int], num_bits: int) -> NDArray[np.uint64]:
    high_bits, low_bits = (num_bits + 1) // 2, num_bits // 2
    high_mask, low_mask = np.uint64((1 << high_bits) - 1), np.uint64((1 << low_bits) - 1)
    high, low = values >> np.uint64(low_bits), values & low_mask
    for i, key in enumerate(keys):
        if i % 2 == 0:
            high ^= _mix_array(low ^ np.uint64(key)) & high_mask
        else:
            low ^= _mix_array(high ^ np.uint64(key)) & low_mask
    return high << np.uint64(low_bits) | low


def _round_keys(order: Order) -> list[int]:
    state = 0
    for value in (ORDER_VERSION, order.num_sequences, order.seed, order.epoch):
        state = _mix(state ^ _mix((value + _GOLDEN) & _MASK))
    return [_mix((state + (i + 1) * _GOLDEN) & _MASK) for i in range(_NUM_ROUNDS)]


def _mix(value: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014; constants: Stafford's variant 13): every bit moves every bit."""
    value = (value ^ (value >> 30)) * _MULTIPLIER_1 & _MASK
    value = (value ^ (value >> 27)) * _MULTIPLIER_2 & _MASK
    return value ^ (value >> 31)


def _mix_array(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """`_mix` of each element; uint64 arrays wrap without a warning, which NumPy scalars would not."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(_MULTIPLIER_1)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(_MULTIPLIER_2)
    return values ^ (values >> np.uint64(31))
