"""What a capture keeps of the teacher's inner states: features."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from kdcache.config.base import Config, NonNegative, Positive


class ProjectionConfig(Config, frozen=True, kw_only=True):
    """Fewer numbers per vector than the teacher has.

    Attributes:
        kind: `pca`: the directions of the largest variance in a sample of the input; what they leave out is reported, and
            vectors can be reconstructed. `random`: products with a Gaussian matrix made from the seed, which keep distances
            and dot products to about 1 / sqrt(size).
        size: numbers that are kept per vector.
        seed: of `random`.
    """

    kind: Literal["pca", "random"]
    size: Positive
    seed: NonNegative = 0

    def __post_init__(self) -> None:
        if self.kind == "pca" and self.seed:
            raise ValueError(f"projection: seed is {self.seed}, but kind 'pca' draws nothing; leave it out")


class FeatureConfig(Config, frozen=True, kw_only=True):
    """States of one layer of the teacher, stored with the distributions.

    Attributes:
        kind: `hidden`, the residual stream; `queries`, `keys` or `values` of a layer's attention, after a norm of theirs and
            before the rotary embedding; `attention`, the most probable keys of each of its heads.
        layer: of `hidden`, 0 for the embeddings' output, i for the stream after layer i, counted from 1, the last one before
            the final norm; -1 for after the final norm, which is what the output projection takes. Of the other kinds, i for
            inside layer i, -1 for the last layer.
        positions: `supervised` positions only, or `all` tokens.
        stride: keep only the positions t with t % stride == offset.
        offset: below stride.
        max_positions: most positions of a sequence, spread evenly over it; null for all.
        pooling: `none`, a vector per position; `mean` of these positions, or the `last` of them: one vector per sequence.
        dtype: `float16`, 2 bytes per number, off by at most |x| 2^-11, and nothing beyond 65504; `bfloat16`, 2 bytes, off by
            at most |x| 2^-8, without such an end; or `int8`, 1 byte per number and 4 per vector.
        scale: `int8` only. `vector`: off by at most 1/254 of the vector's largest magnitude. `channel`: each channel is first
            centred and scaled by what a sample of the input shows, for layers in which a few channels are far larger than
            the others.
        projection: keep fewer numbers per vector; null for all.
        top_keys: `attention` only: keys that are kept per head.
        name: of the column, in letters, digits and underscores; null for a name made of kind, layer and pooling, as in
            `hidden_last` or `hidden_12_mean`.
    """

    layer: Annotated[int, Meta(ge=-1)]
    kind: Literal["hidden", "queries", "keys", "values", "attention"] = "hidden"
    positions: Literal["supervised", "all"] = "supervised"
    stride: Positive = 1
    offset: NonNegative = 0
    max_positions: Positive | None = None
    pooling: Literal["none", "mean", "last"] = "none"
    dtype: Literal["float16", "bfloat16", "int8"] = "float16"
    scale: Literal["vector", "channel"] = "vector"
    projection: ProjectionConfig | None = None
    top_keys: Positive | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        if self.name is not None and not (self.name.isascii() and self.name.replace("_", "a").isalnum()):
            raise ValueError(f"name is {self.name!r}, but a column's name has letters, digits and underscores only")
        if self.offset >= self.stride:
            raise ValueError(f"offset is {self.offset}, but must be below stride, {self.stride}")
        if self.scale == "channel" and self.dtype != "int8":
            raise ValueError(f"scale 'channel' is for dtype 'int8' only, not {self.dtype!r}")
        if self.kind != "hidden" and self.layer == 0:
            raise ValueError(f"layer is 0, the embeddings, which have no {self.kind}; layers of attention count from 1")
        self._check_attention()

    def _check_attention(self) -> None:
        if self.kind != "attention":
            if self.top_keys is not None:
                raise ValueError(f"top_keys is for kind 'attention' only, not {self.kind!r}")
            return
        changed = {
            "dtype": self.dtype != "float16", "pooling": self.pooling != "none", "projection": self.projection is not None,
        }  # fmt: skip
        for field, is_changed in changed.items():
            if is_changed:
                raise ValueError(f"{field} is {getattr(self, field)!r}, but kind 'attention' is stored as it is, in float16")

    @property
    def num_keys(self) -> int:
        """Keys that are kept per head, of kind `attention`."""
        return 8 if self.top_keys is None else self.top_keys

    @property
    def full_name(self) -> str:
        """The name that the cache gives it."""
        layer = "last" if self.layer == -1 else str(self.layer)
        return self.name or f"{self.kind}_{layer}" + (f"_{self.pooling}" if self.pooling != "none" else "")
