"""What is fitted to a sample, against the definition in float64, and projections: exact, reported, the same for ever."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest
from feature_making import UNFITTED

from kdcache.codec.features.constants import NOTHING, FeatureConstants
from kdcache.codec.features.fit import channel_ranges, fit_feature, needs_fit
from kdcache.codec.features.projection import project_features, project_vectors, random_matrix, splitmix64
from kdcache.codec.features.vectors import encode_vectors
from kdcache.errors import ConfigError, FormatError, LossError
from kdcache.format.feature_vectors import FeatureVectors
from kdcache.format.manifest import FeatureInfo, ProjectionInfo

SPECTRUM_H = 2.0 ** -np.arange(20)


def sample_of(num_vectors: int, seed: int = 0) -> np.ndarray:
    """Normal numbers with known variances along hidden directions, around a center."""
    rng = np.random.default_rng(seed)
    turned, _ = np.linalg.qr(rng.normal(0, 1, (20, 20)))
    return (rng.normal(0, np.sqrt(SPECTRUM_H), (num_vectors, 20)) @ turned + rng.normal(0, 3, 20)).astype(np.float32)


def pca(size: int, **fields: object) -> FeatureInfo:
    projection = ProjectionInfo(kind="pca", full_size=20)
    return FeatureInfo(name="x", layer=1, size=size, projection=projection, **fields)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("num_vectors", [500, 12])
def test_a_basis_is_that_of_the_singular_values_and_what_it_drops_is_said(num_vectors):
    sample = sample_of(num_vectors)
    centered = sample.astype(np.float64) - sample.mean(axis=0, dtype=np.float64)
    _, singular, directions = np.linalg.svd(centered, full_matrices=False)
    fit = fit_feature(pca(5), sample)
    basis = fit.constants.basis
    assert basis is not None
    np.testing.assert_allclose(np.abs(np.sum(basis * directions[:5], axis=1)), 1.0, atol=1e-5)
    np.testing.assert_allclose(basis @ basis.T, np.eye(5), atol=1e-6)
    assert (basis[np.arange(5), np.abs(basis).argmax(axis=1)] > 0).all()
    projection = fit.info.projection
    assert projection is not None
    assert projection.dropped == pytest.approx(1 - (singular[:5] ** 2).sum() / (singular**2).sum(), rel=1e-6)
    assert projection.digest == fit.sidecars[0].info.sha256
    assert {name: tensor.shape for name, tensor in fit.sidecars[0].info.tensors.items()} == {
        "basis": (5, 20), "center": (20,), "variances": (5,),
    }  # fmt: skip


def test_what_is_reconstructed_misses_the_dropped_variance_and_no_more():
    sample, later = np.split(sample_of(3500), [2000])
    fit = fit_feature(pca(6), sample)
    coefficients = project_vectors(fit.info, later, fit.constants)
    assert coefficients.dtype == np.float32
    stored, _ = encode_vectors(fit.info, coefficients, fit.constants)
    vectors = FeatureVectors(fit.info, stored, np.arange(len(later)), basis=fit.constants.basis, center=fit.constants.center)
    off = np.square(vectors.reconstructed() - later).sum() / np.square(later - later.mean(axis=0)).sum()
    assert fit.info.projection is not None
    assert fit.info.projection.dropped == pytest.approx(off, rel=0.1)
    torch = pytest.importorskip("torch")
    tensors = vectors.map(torch.from_numpy)
    np.testing.assert_allclose(tensors.reconstructed().numpy(), vectors.reconstructed(), atol=1e-5)


def test_a_fit_is_a_function_of_the_sample_alone():
    feature = pca(4, dtype="int8", scale="channel")
    assert needs_fit(feature)
    first, second = (fit_feature(feature, sample_of(300)) for _ in range(2))
    assert first.info == second.info
    assert not needs_fit(first.info)
    assert [sidecar.data for sidecar in first.sidecars] == [sidecar.data for sidecar in second.sidecars]
    assert [sidecar.info.name for sidecar in first.sidecars] == ["pca:x", "scale:x"]
    assert fit_feature(feature, sample_of(300, seed=1)).info != first.info


def test_a_channel_that_the_sample_shows_as_constant_has_a_scale():
    sample = np.ones((50, 8), np.float32)
    sample[:, :5] += np.random.default_rng(0).normal(0, 1, (50, 5)).astype(np.float32)
    mean_H, scale_H = channel_ranges(sample)
    assert (scale_H > 0).all()
    np.testing.assert_allclose(scale_H[5:], np.median(scale_H) * 0.01, rtol=1e-5)
    np.testing.assert_array_equal(mean_H[5:], 1.0)
    assert (channel_ranges(np.zeros((9, 3), np.float32))[1] == 1.0).all()


@pytest.mark.parametrize(
    ("sample", "sentence"),
    [
        (sample_of(5), r"'x' needs more than 5 vectors, its projection\.size, .* the input gives 5"),
        (np.full((9, 20), np.nan, np.float32), "not finite"),
    ],
)
def test_a_sample_that_will_not_do_is_refused(sample, sentence):
    with pytest.raises(ConfigError, match=sentence):
        fit_feature(pca(5), sample)


def test_what_has_not_been_fitted_is_not_stored():
    with pytest.raises(FormatError, match="'x' has no basis: it has not been fitted"):
        project_vectors(pca(5), sample_of(3))
    feature = FeatureInfo(name="x", layer=1, size=20, dtype="int8", scale="channel")
    with pytest.raises(FormatError, match="'x' has no mean and scale"):
        encode_vectors(feature, sample_of(3), FeatureConstants())


def test_the_random_matrix_is_the_same_for_ever():
    # Vigna's splitmix64 at seed 0, and the first entries of ours: golden numbers, never to change.
    states = np.arange(3, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert splitmix64(states).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    matrix = random_matrix(3, 2, 7)
    np.testing.assert_allclose(matrix, GOLDEN_3_2_7, rtol=1e-6)
    assert not matrix.flags.writeable
    assert (random_matrix(3, 2, 8) != matrix).all()


GOLDEN_3_2_7 = [[-0.33667412, -0.46158651], [-0.61380208, -0.47140445], [0.42401963, 0.93573076]]


def test_the_random_matrix_is_that_of_its_definition():
    mask, state = 2**64 - 1, 7
    uniforms = []

    def mixed(state: int) -> int:
        z = (state + 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    state = mixed(7)
    for _ in range(2 * 8):
        uniforms.append(((mixed(state) >> 11) + 1) / 2**53)
        state = (state + 0x9E3779B97F4A7C15) & mask
    expected = []
    for u1, u2 in zip(uniforms[::2], uniforms[1::2], strict=True):
        radius = math.sqrt(-2 * math.log(u1))
        expected += [radius * math.cos(2 * math.pi * u2), radius * math.sin(2 * math.pi * u2)]
    np.testing.assert_allclose(random_matrix(5, 3, 7).reshape(-1), np.array(expected[:15]) / math.sqrt(3), rtol=1e-6)


def test_random_projections_keep_lengths_and_products():
    rng = np.random.default_rng(3)
    values = rng.normal(0, 1, (60, 512)).astype(np.float32)
    feature = FeatureInfo(name="x", layer=1, size=256, projection=ProjectionInfo(kind="random", full_size=512, seed=3))
    assert not needs_fit(feature)
    small = project_vectors(feature, values)
    assert small.shape == (60, 256)
    products, kept = values @ values.T / 512, small @ small.T / 512
    assert abs(np.diag(kept).mean() - 1) < 0.02
    assert np.sqrt(np.square(products - kept).mean()) < 2 / np.sqrt(256)
    vectors = FeatureVectors(feature, small.astype(np.float16), np.arange(60))
    with pytest.raises(LossError, match="'random', which cannot be undone"):
        vectors.reconstructed()


def test_features_without_a_projection_pass_as_they_are():
    values = {"plain": np.ones((2, 12), np.float32), "attention_2": np.zeros((2, 6), np.float32), "attention_2:distance": None}
    made = project_features([UNFITTED["plain"], UNFITTED["attention_2"]], {}, values)  # pyright: ignore[reportArgumentType]
    assert made["plain"] is values["plain"]
    assert set(made) == set(values)


def test_a_bfloat16_is_torchs():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    values = (rng.normal(0, 1, 4000) * 10.0 ** rng.integers(-38, 38, 4000)).astype(np.float32)
    values = np.concatenate([values, np.array([0.0, -0.0, 1.00390625, 1.01171875, 65504.0], np.float32)])
    feature = FeatureInfo(name="x", layer=1, size=1, dtype="bfloat16")
    bits, _ = encode_vectors(feature, values[:, None], NOTHING)
    expected = torch.from_numpy(values).to(torch.bfloat16)
    assert torch.equal(torch.from_numpy(bits[:, 0].view(np.int16)), expected.view(torch.int16))
    decoded = FeatureVectors(feature, bits, np.arange(len(bits))).float32()
    np.testing.assert_array_equal(decoded[:, 0], expected.float().numpy())


def test_heads_and_tails():
    attention = msgspec.structs.replace(UNFITTED["attention_2"])
    values = np.array([[0.5, 0.25, 0, 0.125, 0.125, 0.125]], np.float16)
    vectors = FeatureVectors(attention, values, np.zeros(1, np.int64), distances_FH=np.zeros((1, 6), np.int32))
    assert vectors.heads().shape == (1, 2, 3)
    np.testing.assert_allclose(vectors.tails(), [[0.25, 0.625]])
    torch = pytest.importorskip("torch")
    np.testing.assert_allclose(vectors.map(torch.from_numpy).tails().numpy(), [[0.25, 0.625]])
    with pytest.raises(LossError, match="'plain' of kind 'hidden' has no heads"):
        FeatureVectors(UNFITTED["plain"], np.zeros((1, 12), np.float16), np.zeros(1, np.int64)).heads()
