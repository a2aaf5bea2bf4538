"""Features in words: what they are of, how exactly they are stored, and what each vector belongs to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kdcache.cli.wording import size
from kdcache.shown import shown

if TYPE_CHECKING:
    from kdcache.format.manifest import FeatureInfo, SidecarInfo

_MOST_TENSORS = 6
_OFF = {
    "float16": "off by at most |x| 2^-11",
    "bfloat16": "off by at most |x| 2^-8",
    "int8": "off by at most 1/254 of a vector's largest magnitude",
}
_OFF_BY_CHANNEL = "off by at most 1/254 of the channel's range in the sample, more in a vector beyond it"


def source_words(feature: FeatureInfo) -> str:
    """The kind and layer, as in `layer 12` or `queries of layer 3`."""
    if feature.kind != "hidden":
        kept = f", {feature.top_keys} keys per head" if feature.top_keys is not None else ""
        return f"{feature.kind} of layer {feature.layer}{kept}"
    if feature.layer == -1:
        return "the last layer after the final norm"
    return f"layer {feature.layer}" + (" (the last, before the final norm)" if feature.layer == feature.num_layers else "")


def width_words(feature: FeatureInfo) -> str:
    """How many numbers of which dtype, and of how many they were made, as in `256 x int8 (pca of 4,096)`."""
    projection = feature.projection
    dropped = (
        "" if projection is None or projection.dropped is None else f", which drops {projection.dropped:.2%} of the variance"
    )
    made = "" if projection is None else f" ({projection.kind} of {projection.full_size:,}{dropped})"
    scale = " with a scale per channel" if feature.scale == "channel" else ""
    return f"{feature.size:,} x {feature.dtype}{scale}{made}"


def positions_words(feature: FeatureInfo) -> str:
    """What each vector belongs to."""
    every = "" if feature.stride == 1 else f", one in {feature.stride}"
    every += "" if feature.max_positions is None else f", at most {feature.max_positions:,} of a sequence"
    if feature.pooling == "none":
        return f"a vector per {'token' if feature.positions == 'all' else 'position'}{every}"
    which = "tokens" if feature.positions == "all" else "positions"
    if feature.pooling == "mean":
        return f"the mean of a sequence's {which}{every}"
    return f"a sequence's last {which[:-1]}{every}"


def feature_words(feature: FeatureInfo) -> str:
    """All of it, with the largest error of what is stored."""
    off = _OFF[feature.dtype] if feature.scale == "vector" else _OFF_BY_CHANNEL
    return f"{source_words(feature)}, {width_words(feature)} ({off}), {positions_words(feature)}"


def sidecar_words(sidecar: SidecarInfo) -> str:
    """What a sidecar holds, as in `basis F32 256 x 4,096, center F32 4,096, 4.21 MB`."""
    held = [
        f"{shown(name, 80)} {shown(tensor.dtype, 10)} {' x '.join(f'{n:,}' for n in tensor.shape) or 'number'}"
        for name, tensor in list(sidecar.tensors.items())[:_MOST_TENSORS]
    ]
    held += [f"{len(sidecar.tensors) - _MOST_TENSORS:,} more"] * (len(sidecar.tensors) > _MOST_TENSORS)
    return f"{', '.join(held)}, {size(sidecar.num_bytes)}"
