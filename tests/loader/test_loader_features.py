"""Hidden states in batches: each row beside its position, whatever the packing, the mask and the codec's place."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from memory_reader import STRIDE, MemoryReader

from kdcache.config.loader import LoaderConfig, MaskConfig
from kdcache.errors import ConfigError
from kdcache.format.manifest import FeatureInfo
from kdcache.loader.batches.batch import Batch, stack_batches
from kdcache.loader.loader import Loader
from kdcache.loader.view import PackedView
from kdcache.store.reader import open_reader
from kdcache.store.writing.writer import CacheWriter

H = 3
FEATURES = (
    FeatureInfo(name="inner", layer=1, size=H),
    FeatureInfo(name="coarse", layer=1, size=H, dtype="int8"),
    FeatureInfo(name="whole", layer=2, size=H, pooling="mean"),
)
NAMES = tuple(feature.name for feature in FEATURES)
OPTIONS = LoaderConfig(seq_len=16, batch_rows=4, packing_buffer=8, num_threads=0, features=NAMES)
MASK = MaskConfig(drop_first=2)


def numbers(sequence: int, t: int) -> list[float]:
    """What a feature holds at a position; whole numbers up to 2048 are exact in float16."""
    return [sequence, t, -sequence]


def make_reader(lengths: list[int], features: tuple[FeatureInfo, ...] = FEATURES) -> MemoryReader:
    """A cache in memory, sequences 1.., with features that say where they come from."""
    memory = MemoryReader(lengths)
    for number, record in enumerate(memory.records):
        rows = np.array([numbers(number, int(t)) for t in record.sequence.positions_P], np.float32).reshape(-1, H)
        whole = np.array([numbers(number, 0)], np.float32)
        made = {f.name: rows if f.pooling == "none" else whole for f in features}
        memory.records[number] = replace(record, distributions=replace(record.distributions, features=made))
    memory.manifest = msgspec.structs.replace(
        memory.manifest, identity=msgspec.structs.replace(memory.manifest.identity, features=features)
    )
    return memory


LENGTHS = np.random.default_rng(1).integers(1, 13, 40).tolist()


def check_batch(batch: Batch) -> None:
    """By the token ids, which say of which sequence and position they are."""
    assert batch.features is not None
    assert tuple(batch.features) == NAMES
    tokens = batch.input_ids_BT.reshape(-1)[batch.flat_positions_P] - 1
    expected_PH = np.array([numbers(*divmod(int(token), STRIDE)) for token in tokens], np.float32).reshape(-1, H)
    np.testing.assert_array_equal(batch.features["inner"].float32(), expected_PH)
    assert batch.features["inner"].values_FH.dtype == np.float16
    largest_P1 = np.abs(expected_PH).max(axis=-1, keepdims=True, initial=0)
    assert batch.features["coarse"].values_FH.dtype == np.int8
    assert (np.abs(batch.features["coarse"].float32() - expected_PH) <= largest_P1 / 254 * 1.001).all()
    np.testing.assert_array_equal(batch.features["coarse"].slots_F, batch.flat_positions_P)
    first_tokens = batch.input_ids_BT[(batch.position_ids_BT == 0) & (batch.segment_ids_BT > 0)] - 1
    expected_GH = np.array([numbers(int(token) // STRIDE, 0) for token in first_tokens], np.float32).reshape(-1, H)
    np.testing.assert_array_equal(batch.features["whole"].float32(), expected_GH)
    np.testing.assert_array_equal(batch.features["whole"].slots_F, np.arange(batch.num_sequences))
    assert batch.sequence_indices_S is not None
    np.testing.assert_array_equal(batch.sequence_indices_S, first_tokens // STRIDE)


@pytest.mark.parametrize("mask", [MaskConfig(), MASK])
@pytest.mark.parametrize("packing", ["first_fit", "none"])
def test_each_row_is_its_positions_and_each_pooled_row_its_sequences(tmp_path: Path, mask: MaskConfig, packing: str):
    memory = make_reader(LENGTHS)
    writer = CacheWriter.open(tmp_path / "cache", memory.manifest, record_batch_bytes=2000)
    writer.write_unit(0, memory.records)
    writer.fold()
    options = msgspec.structs.replace(OPTIONS, mask=mask, packing=packing)
    with open_reader(tmp_path / "cache") as reader, Loader(reader, options) as loader:
        batches = list(loader)
        assert sum(batch.num_sequences for batch in batches) == len(LENGTHS)
        for batch in batches:
            check_batch(batch)
        check_batch(stack_batches(batches))
        bare = next(iter(Loader(reader, msgspec.structs.replace(options, features=()))))
        assert bare.features is None
        np.testing.assert_array_equal(bare.flat_positions_P, batches[0].flat_positions_P)
        if packing == "first_fit":
            check_batch(PackedView(reader, options)[0])


def test_features_are_tensors_of_a_torch_batch():
    torch = pytest.importorskip("torch")
    from kdcache.loader.torch_batches import to_torch

    batch = next(iter(Loader(make_exact(), msgspec.structs.replace(OPTIONS, features=("inner",)))))
    made = to_torch(batch).to("cpu")
    assert made.features is not None
    assert torch.equal(made.features["inner"].float32(), torch.from_numpy(batch.features["inner"].float32()))
    assert torch.equal(made.features["inner"].slots_F, made.flat_positions_P)
    assert to_torch(replace(batch, features=None)).features is None


def make_exact() -> MemoryReader:
    return make_reader(LENGTHS, FEATURES[:1])


def test_a_state_goes_on_with_other_features():
    with Loader(make_exact(), msgspec.structs.replace(OPTIONS, features=("inner",))) as loader:
        first = iter(loader)
        next(first)
        state, second = loader.state_dict(), next(first)
    with Loader(make_exact(), msgspec.structs.replace(OPTIONS, features=())) as loader:
        loader.load_state_dict(state)
        again = next(iter(loader))
    np.testing.assert_array_equal(again.input_ids_BT, second.input_ids_BT)
    assert again.features is None


def test_features_that_the_caches_do_not_have_or_not_alike_are_refused():
    with pytest.raises(ConfigError, match=r"cache 0 has no feature 'outer'; it has inner, coarse, whole"):
        Loader(make_reader(LENGTHS), msgspec.structs.replace(OPTIONS, features=("outer",)))
    with pytest.raises(ConfigError, match=r"cache 0 has no feature 'inner'; it has none"):
        Loader(MemoryReader(LENGTHS), msgspec.structs.replace(OPTIONS, features=("inner",)))
    other = make_reader(LENGTHS, (msgspec.structs.replace(FEATURES[0], pooling="last"),))
    with pytest.raises(ConfigError, match=r"pooling 'none' in cache 0, but pooling 'last' in cache 1"):
        Loader([make_exact(), other], msgspec.structs.replace(OPTIONS, features=("inner",)))
