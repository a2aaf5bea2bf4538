"""What an input names but does not read: counted by reason, with the first names."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from kdcache.shown import shown

MOST_NAMES = 5
"""Names kept for each reason; the others are counted."""
MOST_CHARACTERS = 200
"""Length of a kept name."""


@dataclass
class LeftOut:
    """Files, folders and links that are not read.

    Attributes:
        counts: reason -> how many.
        names: reason -> the first names.
    """

    counts: dict[str, int] = field(default_factory=dict)
    names: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, names: Iterable[str]) -> None:
        """Count names under a reason, a noun in the plural such as `hidden files`."""
        for name in names:
            self.counts[reason] = self.counts.get(reason, 0) + 1
            kept = self.names.setdefault(reason, [])
            if len(kept) < MOST_NAMES:
                kept.append(shown(name, MOST_CHARACTERS))

    def __bool__(self) -> bool:
        return bool(self.counts)

    def __str__(self) -> str:
        """Show one part for each reason: `hidden files: 2 (a, b); links that lead nowhere: 9 (c, d, e, f, g, ...)`."""
        return "; ".join(f"{reason}: {count:,} ({self._shown(reason)})" for reason, count in self.counts.items())

    def _shown(self, reason: str) -> str:
        names = self.names[reason]
        return ", ".join([*names, "..."] if self.counts[reason] > len(names) else names)
