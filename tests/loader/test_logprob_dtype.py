"""Logprobs handed out as float16 are those of float32, wherever a cache holds no others; elsewhere they are refused."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
from cache_making import make_cache, make_identity, make_manifest, make_record
from memory_reader import MemoryReader

from kdcache.config.loader import LoaderConfig, MaskConfig
from kdcache.errors import ConfigError
from kdcache.format.manifest import CodecInfo, SelectionInfo
from kdcache.loader.batches.batch import stack_batches
from kdcache.loader.loader import Loader
from kdcache.loader.torch_batches import TorchLoader, to_torch
from kdcache.loader.view import PackedView
from kdcache.store.writing.writer import CacheWriter

SINGLE = LoaderConfig(seq_len=32, batch_rows=2, num_threads=0)
HALF = msgspec.structs.replace(SINGLE, logprob_dtype="float16")


def write(path: Path, codec_id: str, bits: int | None = None, selection: SelectionInfo | None = None) -> Path:
    params = {"vocab_size": 97} | ({} if bits is None else {"bits": bits})
    identity = msgspec.structs.replace(
        make_identity(codec_id, selection=selection), codec=CodecInfo(codec_id=codec_id, params=params)
    )
    writer = CacheWriter.open(path, make_manifest(1, identity))
    writer.write_unit(0, [make_record(i, num_tokens=5 + i, is_ragged=i % 3 == 0) for i in range(12)])
    writer.fold()
    return path


@pytest.mark.parametrize(("codec_id", "bits"), [("packed", None), ("archive", 16)])
@pytest.mark.parametrize("mask", [MaskConfig(), MaskConfig(drop_first=2)], ids=["all", "masked"])
def test_a_batch_of_float16_holds_the_values_of_float32(tmp_path: Path, codec_id: str, bits: int | None, mask: MaskConfig):
    path = write(tmp_path / "c", codec_id, bits)
    single, half = (msgspec.structs.replace(options, mask=mask) for options in (SINGLE, HALF))
    with Loader(path, single) as loader:
        expected = list(loader)
    with Loader(path, half) as loader:
        found = list(loader)
    for batch, other in zip(found, expected, strict=True):
        assert (batch.teacher.logprobs_PK.dtype, other.teacher.logprobs_PK.dtype) == (np.float16, np.float32)
        np.testing.assert_array_equal(batch.teacher.logprobs_PK, other.teacher.logprobs_PK)
        np.testing.assert_array_equal(batch.teacher.token_ids_PK, other.teacher.token_ids_PK)
    assert stack_batches(found).teacher.logprobs_PK.dtype == np.float16


def test_the_view_and_tensors_have_the_dtype_too_and_a_state_goes_on_with_the_other(tmp_path: Path):
    path = write(tmp_path / "c", "packed")
    view = PackedView(path, HALF)
    rows = list(view)
    assert {row.teacher.logprobs_PK.dtype for row in rows} == {np.dtype(np.float16)}
    assert str(to_torch(rows[0]).teacher.logprobs_PK.dtype) == "torch.float16"
    with Loader(path, HALF) as half, Loader(path, SINGLE) as single:
        batches = iter(TorchLoader(half))
        first = next(batches)
        assert str(first.teacher.logprobs_PK.dtype) == "torch.float16"
        assert first.state is not None
        single.load_state_dict(first.state)
        np.testing.assert_array_equal(next(batches).input_ids_BT.numpy(), next(iter(single)).input_ids_BT)


@pytest.mark.parametrize(("codec_id", "bits"), [("raw", None), ("quantized", 8), ("archive", 8)])
def test_logprobs_that_are_no_float16_are_refused_in_a_sentence(tmp_path: Path, codec_id: str, bits: int | None):
    path = write(tmp_path / "c", codec_id, bits)
    with pytest.raises(ConfigError, match=rf"'float16', but cache 0 \(codec '{codec_id}'.*use 'float32'"):
        Loader(path, HALF)
    with pytest.raises(ConfigError, match="'float16', but cache 0"):
        PackedView(path, HALF)


def test_estimates_are_no_float16_and_of_several_caches_the_one_that_is_refused_is_named(tmp_path: Path):
    threshold = SelectionInfo(kind="sampled", params={"num_draws": 8})
    memory = MemoryReader([3], k=5)
    identity = replace_selection(memory, threshold)
    with pytest.raises(ConfigError, match="selection 'sampled'"):
        Loader(identity, HALF)
    with pytest.raises(ConfigError, match="but cache 1 "):
        Loader([make_cache(tmp_path / "a", "packed"), make_cache(tmp_path / "b", "raw")], HALF)


def replace_selection(memory: MemoryReader, selection: SelectionInfo) -> MemoryReader:
    packed = CodecInfo(codec_id="packed", params={"vocab_size": 2**20})
    identity = msgspec.structs.replace(memory.manifest.identity, selection=selection, codec=packed)
    memory.manifest = msgspec.structs.replace(memory.manifest, identity=identity)
    return memory
