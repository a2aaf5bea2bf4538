"""Features of every kind in batches: each vector with the slot of its token, as it is stored, under masks, mixes and torch."""

from __future__ import annotations

import pickle

import msgspec
import numpy as np
import pytest
from feature_making import ALL_KINDS, UNFITTED, fitted, full_vectors, make_feature_cache, most_off, record_with

from kdcache.codec.features.fit import fit_feature
from kdcache.config.loader import LoaderConfig, MaskConfig
from kdcache.errors import ConfigError
from kdcache.format.feature_positions import feature_positions
from kdcache.format.record import distances_key
from kdcache.loader.batches.batch import Batch, stack_batches
from kdcache.loader.cache import open_cache
from kdcache.loader.loader import Loader
from kdcache.loader.view import PackedView

FITS = fitted(ALL_KINDS)
NAMES = tuple(fit.info.name for fit in FITS)
LENGTHS = (12, 7, 1, 16, 9, 5, 12, 3)
RECORDS = [
    record_with(seed, FITS, supervised=("all", "holes", "none", "every")[seed % 4], num_tokens=length)
    for seed, length in enumerate(LENGTHS)
]
OPTIONS = LoaderConfig(seq_len=32, batch_rows=2, packing_buffer=8, num_threads=0, features=NAMES)
MASK = MaskConfig(drop_first=3)


@pytest.fixture(scope="module")
def cache_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("kinds") / "c"
    make_feature_cache(path, RECORDS, FITS, record_batch_bytes=2000)
    return path


def check_batch(batch: Batch, mask: MaskConfig) -> None:
    """Each vector is that of the token in its slot, by the definition of the feature's positions."""
    assert batch.features is not None
    assert batch.sequence_indices_S is not None
    starts = np.flatnonzero((batch.position_ids_BT.reshape(-1) == 0) & (batch.segment_ids_BT.reshape(-1) > 0))
    assert len(starts) == batch.num_sequences == len(batch.sequence_indices_S)
    for fit in FITS:
        vectors, at = batch.features[fit.info.name], 0
        for index, (start, sequence) in enumerate(zip(starts.tolist(), batch.sequence_indices_S.tolist(), strict=True)):
            record = RECORDS[sequence]
            positions_F = feature_positions(fit.info, record.sequence.supervised_N)
            keep_F = np.ones(len(positions_F), bool)
            if fit.info.positions == "supervised":
                keep_F = positions_F >= mask.drop_first
            expected = record.distributions.features[fit.info.name]
            if fit.info.pooling == "none":
                slots, expected = positions_F[keep_F] + start, expected[keep_F]
            else:
                slots = np.array([index])
            end = at + len(slots)
            np.testing.assert_array_equal(vectors.slots_F[at:end], slots)
            off = np.abs(vectors.float32()[at:end] - expected)
            assert (off <= most_off(fit.info, expected, fit.constants)).all()
            if vectors.distances_FH is not None:
                distances = record.distributions.features[distances_key(fit.info)]
                np.testing.assert_array_equal(vectors.distances_FH[at:end], distances[keep_F])
            at = end
        assert at == len(vectors)


@pytest.mark.parametrize("mask", [MaskConfig(), MASK])
def test_each_vector_has_the_slot_of_its_token(cache_path, mask):
    options = msgspec.structs.replace(OPTIONS, mask=mask)
    with open_cache(cache_path) as cache, Loader(cache, options) as loader:
        batches = list(loader)
        for batch in batches:
            check_batch(batch, mask)
        check_batch(stack_batches(batches), mask)
        check_batch(PackedView(cache, options)[1], mask)
        check_batch(pickle.loads(pickle.dumps(batches[0])), mask)
    assert {name: vectors.values_FH.dtype for name, vectors in batches[0].features.items()} == {
        fit.info.name: {"float16": np.float16, "bfloat16": np.uint16, "int8": np.int8}[fit.info.dtype] for fit in FITS
    }


def test_tensors_have_torchs_dtypes_and_decode_alike(cache_path):
    torch = pytest.importorskip("torch")
    from kdcache.loader.torch_batches import to_torch

    with open_cache(cache_path) as cache:
        batch = next(iter(Loader(cache, OPTIONS)))
    made = to_torch(batch).to("cpu")
    assert made.features is not None
    assert batch.features is not None
    assert torch.equal(made.sequence_indices_S, torch.from_numpy(batch.sequence_indices_S))
    for name, vectors in made.features.items():
        assert vectors.values_FH.dtype == getattr(torch, vectors.info.dtype)
        np.testing.assert_allclose(vectors.float32().numpy(), batch.features[name].float32(), rtol=1e-6, atol=1e-6)
        some = torch.arange(len(vectors)) % 2 == 0
        assert torch.equal(vectors.at(some).slots_F, vectors.slots_F[some])
        assert torch.equal(vectors.at(some).float32(), vectors.float32()[some])
    small = made.features["small"]
    assert small.reconstructed().shape == (len(small), 12)
    np.testing.assert_allclose(small.reconstructed().numpy(), batch.features["small"].reconstructed(), rtol=1e-5, atol=1e-4)


def test_a_pooled_feature_of_all_sequences_comes_as_one(cache_path):
    with open_cache(cache_path) as cache:
        vectors = cache.pooled_features("whole")
        np.testing.assert_array_equal(vectors.slots_F, np.arange(len(RECORDS)))
        for index, record in enumerate(RECORDS):
            np.testing.assert_allclose(vectors.float32()[index], record.distributions.features["whole"][0], rtol=2**-8)
        some = cache.select([3, 1]).pooled_features("whole")
        np.testing.assert_array_equal(some.values_FH, vectors.values_FH[[3, 1]])
        with pytest.raises(ConfigError, match="'plain' has a vector for each position"):
            cache.pooled_features("plain")


def test_caches_whose_numbers_mean_something_else_do_not_share_a_batch(cache_path, tmp_path):
    other = [fit_feature(UNFITTED["channels"], full_vectors(9, UNFITTED["channels"], 99))]
    make_feature_cache(tmp_path / "o", [record_with(3, other)], other)
    options = msgspec.structs.replace(OPTIONS, features=("channels",))
    with pytest.raises(ConfigError, match=r"'channels' has scale_digest '.*' in cache 0, but .* in cache 1; they cannot share"):
        Loader([cache_path, tmp_path / "o"], options)
    same = fitted([UNFITTED["channels"]])
    make_feature_cache(tmp_path / "s", [record_with(3, same)], same)
    with Loader([cache_path, tmp_path / "s"], options) as loader:
        assert all(batch.features and len(batch.features["channels"]) == batch.num_positions for batch in loader)
