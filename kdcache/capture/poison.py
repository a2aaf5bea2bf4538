"""Finds the few of many sequences that make the teacher fail, by halving."""

from __future__ import annotations

from collections.abc import Callable

from kdcache.errors import CaptureError

MAX_POISON = 8
MAX_POISON_SHARE = 1 / 8
"""If more of a unit's sequences fail, the teacher is at fault and not the text, and each try may load it again."""


def find_poison(num_sequences: int, attempt: Callable[[int, int], Exception | None]) -> dict[int, Exception]:
    """Find the sequences that also fail alone, with their errors.

    Costs about 2 log2(n) failing attempts and one pass over the sound ones for each of them.

    Args:
        num_sequences: how many the failed unit has.
        attempt: tries sequences [start, stop) together; returns their error, or None.

    Raises:
        CaptureError: nearly all fail, or too many for the text to be the reason; the last error is chained.
    """
    most = min(num_sequences - 1, max(MAX_POISON, int(num_sequences * MAX_POISON_SHARE)))
    poison: dict[int, Exception] = {}
    ranges = [(0, num_sequences)]
    while ranges:
        start, stop = ranges.pop()
        error = attempt(start, stop) if stop > start else None
        if error is None:
            continue
        if stop - start == 1:
            poison[start] = error
            if len(poison) > most:
                raise CaptureError(
                    f"{len(poison)} of {num_sequences} sequences also fail alone, the last one with: {error}; "
                    "the teacher is at fault, not the text"
                ) from error
            continue
        middle = (start + stop) // 2
        ranges += [(middle, stop), (start, middle)]
    return poison
