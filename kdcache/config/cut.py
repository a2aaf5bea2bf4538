"""What a student keeps of the teacher that it is cut from."""

from __future__ import annotations

from typing import Literal

from kdcache.config.base import Config, NonNegative, Positive


class LayersConfig(Config, frozen=True, kw_only=True):
    """Which layers of the teacher a student keeps; give exactly one.

    Attributes:
        every: keep every such layer: 2 keeps half of them, spread evenly, with the last.
        count: keep this many, spread evenly: of L layers, those at round((i + 1) L / count) - 1.
        keep: keep these, counted from 0, ascending.
        pattern: `distilbert` keeps half of an even number with both ends, as DistilBERT does: 0, 2, 4, 7, 9, 11 of 12.
    """

    every: Positive | None = None
    count: Positive | None = None
    keep: tuple[NonNegative, ...] | None = None
    pattern: Literal["distilbert"] | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("every", "count", "keep", "pattern") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"layers: {' and '.join(given) or 'nothing'} is given; give exactly one of every, count, keep and pattern"
            )
        if self.keep is not None and (not self.keep or sorted(set(self.keep)) != list(self.keep)):
            raise ValueError(f"layers.keep is {list(self.keep)}; name at least one layer, each once and in ascending order")
