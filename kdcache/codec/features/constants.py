"""What the stored numbers of a feature refer to, and is the same for all of its vectors: kept in sidecars, not in shards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.errors import CorruptCacheError, FormatError
from kdcache.format.identity import FeatureInfo

Sidecar = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True, eq=False)
class FeatureConstants:
    """float32 arrays; None where the feature has no use for them.

    Attributes:
        mean_H, scale_H: (H,) of `int8` with scale `channel`; scales are above 0.
        basis, center: of projection `pca`: (H, full size) orthonormal lines, and (full size,).
    """

    mean_H: NDArray[np.float32] | None = None
    scale_H: NDArray[np.float32] | None = None
    basis: NDArray[np.float32] | None = None
    center: NDArray[np.float32] | None = None

    def channels(self, feature: FeatureInfo) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Mean and scale of each channel; raises FormatError where the feature has not been fitted."""
        if self.mean_H is None or self.scale_H is None:
            raise FormatError(f"feature {feature.name!r} has no mean and scale of its channels: it has not been fitted")
        return self.mean_H, self.scale_H


NOTHING = FeatureConstants()


def scale_sidecar(feature: FeatureInfo) -> str:
    """The name of the sidecar that holds `mean` and `scale` of each channel."""
    return f"scale:{feature.name}"


def pca_sidecar(feature: FeatureInfo) -> str:
    """The name of the sidecar that holds `basis`, `center` and `variances`, the sample's along each line of the basis."""
    return f"pca:{feature.name}"


def constant_bytes(feature: FeatureInfo) -> int:
    """About how many bytes the sidecars of a feature take, once per cache."""
    num_bytes = 8 * feature.size if feature.scale == "channel" else 0
    if feature.projection is not None and feature.projection.kind == "pca":
        num_bytes += 4 * (feature.size * (feature.full_size + 1) + feature.full_size)
    return num_bytes


def read_constants(feature: FeatureInfo, sidecar: Callable[[str], Sidecar]) -> FeatureConstants:
    """The constants of a feature from a cache's sidecars.

    Args:
        feature: as the cache describes it.
        sidecar: gives a sidecar's arrays by its name.

    Raises:
        CorruptCacheError: an array is missing, has another shape or dtype, or values that cannot be.
    """
    arrays: dict[str, NDArray[np.float32]] = {}
    if feature.scale == "channel":
        name, size = scale_sidecar(feature), (feature.size,)
        found = sidecar(name)
        arrays["mean_H"], arrays["scale_H"] = _array(found, name, "mean", size), _array(found, name, "scale", size)
        if not (arrays["scale_H"] > 0).all():
            raise CorruptCacheError(f"sidecar {name!r}: a scale is not above 0")
    if feature.projection is not None and feature.projection.kind == "pca":
        name, full_size = pca_sidecar(feature), feature.projection.full_size
        found = sidecar(name)
        arrays["basis"] = _array(found, name, "basis", (feature.size, full_size))
        arrays["center"] = _array(found, name, "center", (full_size,))
    return FeatureConstants(**arrays)


def _array(sidecar: Sidecar, name: str, key: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    found = sidecar.get(key)
    if found is None or found.shape != shape or found.dtype != np.float32:
        has = "nothing" if found is None else f"{found.dtype} of shape {found.shape}"
        raise CorruptCacheError(f"sidecar {name!r} has {has} as {key!r}, expected float32 of shape {shape}")
    if not np.isfinite(found).all():
        raise CorruptCacheError(f"sidecar {name!r}: {key!r} is not finite")
    return found.copy()  # what a file gives is not to be written, and torch wants arrays that are
