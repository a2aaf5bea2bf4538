"""Which few of many sequences make the teacher fail: found by halving, pure."""

from __future__ import annotations

from collections.abc import Callable

from kdcache.errors import CaptureError

MAX_POISON = 8
MAX_POISON_SHARE = 1 / 8
"""More of a unit's sequences than these are no accident of the text: the teacher is at fault, and each try may load it anew."""


def find_poison(num_sequences: int, attempt: Callable[[int, int], Exception | None]) -> dict[int, Exception]:
    """The sequences that fail alone as well, with their errors.

    Costs about 2 log2(n) failing attempts and one pass over the sound ones for each of them.

    Args:
        num_sequences: of the unit that failed.
        attempt: tries sequences [start, stop) together; gives their error, or None.

    Raises:
        CaptureError: nearly all fail, or so many that the text cannot be the reason; the last error is chained.
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
                    f"{len(poison)} of {num_sequences} sequences fail alone as well, the last one with: {error}; "
                    "that is the teacher and not the text"
                ) from error
            continue
        middle = (start + stop) // 2
        ranges += [(middle, stop), (start, middle)]
    return poison
