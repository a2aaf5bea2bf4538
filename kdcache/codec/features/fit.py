"""What is fitted to a sample of the teacher's vectors before the first is stored: means and scales of channels, PCA bases.

All in float64. A capture fits once, when it starts its cache; who resumes it, or joins it, reads the sidecars.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from kdcache.codec.features.constants import FeatureConstants, pca_sidecar, scale_sidecar
from kdcache.codec.features.projection import project_vectors
from kdcache.errors import ConfigError
from kdcache.format.identity import FeatureInfo
from kdcache.format.sidecar import SidecarFile, make_sidecar
from kdcache.format.sidecar_claims import needed_sidecars

SAMPLE_VECTORS = 8192
"""About this many vectors of a feature are a good sample: a basis of 512 lines is known to within a few hundredths."""

_LEAST_SCALE = 0.01
"""Of the median channel's: a channel that the sample shows as constant may move after all."""


@dataclass(frozen=True, slots=True, eq=False)
class FittedFeature:
    """A feature as the cache will describe it, the sidecars that it needs, and their content."""

    info: FeatureInfo
    sidecars: tuple[SidecarFile, ...]
    constants: FeatureConstants


def needs_fit(feature: FeatureInfo) -> bool:
    """Whether a feature cannot be stored before a sample of its vectors was seen."""
    return None in needed_sidecars(feature).values()


def fit_feature(feature: FeatureInfo, sample: NDArray[np.float32]) -> FittedFeature:
    """Fit a feature to a sample: a pure function, the same for the same numbers.

    Args:
        feature: as the config asks for it.
        sample: (F, full_size) float32, the teacher's whole vectors at positions as the feature has them.

    Raises:
        ConfigError: fewer vectors than a basis needs, or numbers that are not finite.
    """
    if not np.isfinite(sample).all():
        raise ConfigError(f"features: {feature.name!r} has numbers in the sample that are not finite")
    arrays: dict[str, NDArray[np.float32]] = {}
    sidecars: list[SidecarFile] = []
    if feature.projection is not None and feature.projection.kind == "pca":
        arrays["basis"], arrays["center"], variances, dropped = _principal(feature, sample)
        content = {"basis": arrays["basis"], "center": arrays["center"], "variances": variances}
        sidecars.append(make_sidecar(pca_sidecar(feature), content))
        fitted = msgspec.structs.replace(feature.projection, dropped=dropped, digest=sidecars[-1].info.sha256)
        feature = msgspec.structs.replace(feature, projection=fitted)
    if feature.scale == "channel":
        kept = project_vectors(feature, sample, FeatureConstants(**arrays))
        arrays["mean_H"], arrays["scale_H"] = channel_ranges(kept)
        content = {"mean": arrays["mean_H"], "scale": arrays["scale_H"]}
        sidecars.append(make_sidecar(scale_sidecar(feature), content))
        feature = msgspec.structs.replace(feature, scale_digest=sidecars[-1].info.sha256)
    return FittedFeature(feature, tuple(sidecars), FeatureConstants(**arrays))


def channel_ranges(sample_FH: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The mean of each channel, and the most that the sample is away from it: (H,) float32 each, the latter above 0."""
    mean_H = sample_FH.mean(axis=0, dtype=np.float64) if len(sample_FH) else np.zeros(sample_FH.shape[1])
    mean_H = mean_H.astype(np.float32)
    range_H = np.abs(sample_FH - mean_H).max(axis=0, initial=0.0)
    least = max(float(np.median(range_H)) * _LEAST_SCALE, float(range_H.max(initial=0.0)) * 2.0**-20)
    return mean_H, np.maximum(range_H, least or 1.0).astype(np.float32)


def _principal(
    feature: FeatureInfo, sample: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32], float]:
    """Basis, center, the sample's variance along each line, and the share of the variance that is left out."""
    num_vectors, full_size = sample.shape
    center = sample.mean(axis=0, dtype=np.float64) if num_vectors else np.zeros(full_size)
    centered = sample - center
    if num_vectors <= feature.size:
        raise ConfigError(
            f"features: {feature.name!r} needs more than {feature.size} vectors, its projection.size, for its basis, but the "
            f"input gives {num_vectors}; give more text, or a smaller size"
        )
    total = float(np.einsum("fh,fh->", centered, centered))
    basis, values = _top_directions(centered, feature.size)
    kept = float(values.sum())
    dropped = max(0.0, 1.0 - kept / total) if total > 0 else 0.0
    signs = np.sign(basis[np.arange(len(basis)), np.abs(basis).argmax(axis=1)])
    basis = basis * np.where(signs == 0, 1.0, signs)[:, None]
    return basis.astype(np.float32), center.astype(np.float32), (values / (num_vectors - 1)).astype(np.float32), dropped


def _top_directions(centered: NDArray[np.float64], size: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The `size` orthonormal directions of the largest sums of squares, falling, and these sums."""
    num_vectors, full_size = centered.shape
    if num_vectors >= full_size:
        values, vectors = np.linalg.eigh(centered.T @ centered)
        return vectors[:, ::-1][:, :size].T, np.maximum(values[::-1][:size], 0.0)
    # Fewer vectors than numbers: by their products with each other, which is the smaller matrix.
    values, vectors = np.linalg.eigh(centered @ centered.T)
    top = vectors[:, ::-1][:, :size]
    # Orthonormal even where directions have no variance: there any will do.
    basis, _ = np.linalg.qr(centered.T @ top)
    return basis.T, np.maximum(values[::-1][:size], 0.0)
