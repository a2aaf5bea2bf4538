"""Ranges of what a manifest or a shard's metadata claims of its features, checked once when it is parsed; no numpy."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kdcache.errors import FormatError, UnsupportedVersionError
from kdcache.format.paths import is_sha256
from kdcache.format.ranges import check_finite, check_range

if TYPE_CHECKING:
    from kdcache.format.identity import FeatureInfo, ProjectionInfo

MAX_FEATURE_SIZE = 2**24
MAX_POSITIONS = 2**31 - 1

KNOWN = {
    "kind": ("hidden", "queries", "keys", "values", "attention"),
    "positions": ("supervised", "all"),
    "dtype": ("float16", "bfloat16", "int8"),
    "pooling": ("none", "mean", "last"),
    "scale": ("vector", "channel"),
}
"""What this kdcache knows of a feature's fields; another value is another feature of the format."""

PROJECTIONS = ("pca", "random")
FEATURES_2 = "features_2"
"""Named in a manifest's `requires` where a feature is more than hidden states at each supervised position: a reader of format
1.2 would take its vectors for something else."""

_NAME = re.compile(r"[A-Za-z0-9_]+")


def check_feature_claims(features: Sequence[FeatureInfo]) -> None:
    """Raise FormatError where what is said of a feature is out of its range or does not fit together.

    Raises:
        UnsupportedVersionError: a kind, dtype, ... that is unknown here. FormatError: see above.
    """
    names = [feature.name for feature in features]
    for feature in features:
        if not _NAME.fullmatch(feature.name) or names.count(feature.name) > 1:
            raise FormatError(
                f"a feature has the name {feature.name[:80]!r}, expected one of letters, digits and underscores, each once"
            )
        where = f"feature {feature.name!r}"
        for what, known in KNOWN.items():
            _check_known(f"{where} has the {what}", getattr(feature, what), known)
        check_range(f"layer of {where}", feature.layer, MAX_POSITIONS, least=-1 if feature.kind == "hidden" else 1)
        check_range(f"size of {where}", feature.size, MAX_FEATURE_SIZE, least=1)
        check_range(f"stride of {where}", feature.stride, MAX_POSITIONS, least=1)
        check_range(f"offset of {where}", feature.offset, feature.stride - 1)
        if feature.max_positions is not None:
            check_range(f"max_positions of {where}", feature.max_positions, MAX_POSITIONS, least=1)
        if feature.num_layers is not None:
            check_range(f"num_layers of {where}", feature.num_layers, MAX_POSITIONS, least=max(feature.layer, 0))
        _check_scale(feature, where)
        if feature.projection is not None:
            _check_projection(feature.projection, feature.size, where)
        _check_heads(feature, where)


def requirements(features: Sequence[FeatureInfo]) -> tuple[str, ...]:
    """What a reader of a cache with these features must know: a manifest's `requires`."""
    return (FEATURES_2,) if any(not _is_plain(feature) for feature in features) else ()


def _is_plain(feature: FeatureInfo) -> bool:
    """Whether a reader of format 1.2 reads it rightly: there, the last layer's number means after the norm."""
    return (
        (feature.kind, feature.positions, feature.stride, feature.max_positions) == ("hidden", "supervised", 1, None)
        and (feature.scale, feature.projection) == ("vector", None)
        and feature.dtype != "bfloat16"
        and feature.layer != -1
        and feature.layer != feature.num_layers
    )


def _check_known(what: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UnsupportedVersionError(f"{what} {value[:80]!r}, this kdcache knows {', '.join(known)}; upgrade it")


def _check_scale(feature: FeatureInfo, where: str) -> None:
    is_fitted = feature.scale == "channel"
    if is_fitted and feature.dtype != "int8":
        raise FormatError(f"{where} has the scale 'channel' and the dtype {feature.dtype!r}, expected int8")
    _check_digest(f"scale_digest of {where}", feature.scale_digest, is_there=is_fitted)


def _check_projection(projection: ProjectionInfo, size: int, where: str) -> None:
    _check_known(f"{where} has a projection of the kind", projection.kind, PROJECTIONS)
    check_range(f"projection.full_size of {where}", projection.full_size, MAX_FEATURE_SIZE, least=size)
    check_range(f"projection.seed of {where}", projection.seed, 2**63 - 1)
    if projection.dropped is not None:
        check_finite(f"projection.dropped of {where}", projection.dropped)
    _check_digest(f"projection.digest of {where}", projection.digest, is_there=projection.kind == "pca")


def _check_digest(what: str, digest: str | None, *, is_there: bool) -> None:
    if (digest is not None) != is_there or (digest is not None and not is_sha256(digest)):
        expected = "the SHA-256 of a sidecar" if is_there else "null"
        raise FormatError(f"{what} is {digest!r}, expected {expected}")


def _check_heads(feature: FeatureInfo, where: str) -> None:
    per_head = {"hidden": None, "attention": feature.top_keys}.get(feature.kind, feature.head_dim)
    if feature.kind == "hidden":
        return
    full_size = feature.size if feature.projection is None else feature.projection.full_size
    if feature.num_heads is None or per_head is None or feature.num_heads * per_head != full_size:
        raise FormatError(
            f"{where} of kind {feature.kind!r} has {feature.num_heads} heads of {per_head} numbers, but vectors of {full_size}"
        )
    if feature.kind == "attention" and (feature.dtype, feature.pooling, feature.projection) != ("float16", "none", None):
        raise FormatError(f"{where} of kind 'attention' must be float16, not pooled and not projected")
