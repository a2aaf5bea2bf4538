"""What a student keeps of the teacher that it is cut from."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from kdcache.config.base import Config, NonNegative, Positive


class LayersConfig(Config, frozen=True, kw_only=True):
    """Which layers of the teacher a student keeps; give exactly one of `every`, `count`, `keep`, `pattern` and `drop`.

    Attributes:
        every: keep every such layer: 2 keeps half of them, spread evenly, with the last.
        count: keep this many, spread evenly: of L layers, those at round((i + 1) L / count) - 1.
        keep: keep these, counted from 0, ascending.
        pattern: `distilbert` keeps half of an even number with both ends, as DistilBERT does: 0, 2, 4, 7, 9, 11 of 12.
        drop: leave out this many, chosen by what the teacher does with some text; see `by`.
        by: with `drop`. `block_influence` leaves out the layers that turn the hidden states least (ShortGPT, arXiv 2403.03853);
            `angular_distance` the neighbouring layers over which, together, they turn least (arXiv 2403.17887).
    """

    every: Positive | None = None
    count: Positive | None = None
    keep: tuple[NonNegative, ...] | None = None
    pattern: Literal["distilbert"] | None = None
    drop: Positive | None = None
    by: Literal["block_influence", "angular_distance"] = "block_influence"

    def __post_init__(self) -> None:
        given = [name for name in ("every", "count", "keep", "pattern", "drop") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"layers: {' and '.join(given) or 'nothing'} is given; give exactly one of every, count, keep, pattern and drop"
            )
        if self.keep is not None and (not self.keep or sorted(set(self.keep)) != list(self.keep)):
            raise ValueError(f"layers.keep is {list(self.keep)}; name at least one layer, each once and in ascending order")


class WidthConfig(Config, frozen=True, kw_only=True):
    """How wide a student's layers are; what stays is what is most active in the teacher (Minitron, arXiv 2407.14679).

    Attributes:
        hidden_size: channels of the hidden states, the same ones in all layers; null for all.
        intermediate_size: neurons of each layer's feed-forward network; null for all.
        num_attention_heads: heads of queries; null for all. By itself it keeps whole groups that share keys and values.
        num_key_value_heads: heads of keys and values; null follows from num_attention_heads. With both, every group that stays
            keeps its num_attention_heads / num_key_value_heads most active heads.
    """

    hidden_size: Positive | None = None
    intermediate_size: Positive | None = None
    num_attention_heads: Positive | None = None
    num_key_value_heads: Positive | None = None


class StatisticsConfig(Config, frozen=True, kw_only=True):
    """The text that decides what `layers.drop` and `width` keep.

    Attributes:
        data: JSON lines (also compressed), Parquet or Arrow, each item with `text` or `input_ids`. null takes what the capture
            measured, if it did (the cache's sidecar `activation_statistics`), and else reads the cache's own sequences.
        num_sequences: read this many.
        window: with `data`, most tokens in a sequence; longer texts are cut.
    """

    data: str | None = None
    num_sequences: Positive = 256
    window: Annotated[int, Meta(ge=2)] = 512
