import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cache_making import make_cache
from memory_reader import MemoryReader, assert_same_stream

from kdcache.config.loader import LoaderConfig
from kdcache.errors import StateError
from kdcache.format.soft_targets import SoftTargets
from kdcache.loader.batches.assemble import BatchLayout
from kdcache.loader.batches.batch import Batch
from kdcache.loader.cache import open_cache
from kdcache.loader.caches import CacheSet
from kdcache.loader.loader import Loader
from kdcache.loader.read import read_mapped

torch = pytest.importorskip("torch")
from torch.utils.data import DataLoader  # noqa: E402

from kdcache.loader.torch_batches import TorchBatch, TorchLoader, to_device, to_torch  # noqa: E402

LENGTHS = np.random.default_rng(0).integers(1, 13, 41).tolist()
OPTIONS = LoaderConfig(seq_len=16, batch_rows=4, packing_buffer=8, num_threads=0)


@pytest.fixture(scope="module")
def reader() -> MemoryReader:
    return MemoryReader(LENGTHS)


def to_numpy(batches: Iterable[TorchBatch]) -> list[Batch]:
    return [Batch(**{name: as_numpy(getattr(b, name)) for name in Batch.__slots__}) for b in batches]


def as_numpy(value: object) -> Any:
    if isinstance(value, SoftTargets):
        return value.map(as_numpy)
    return value.numpy() if isinstance(value, torch.Tensor) else value


def in_workers(loader: TorchLoader, num_workers: int, start: str = "fork", **options: object) -> DataLoader[TorchBatch]:
    context = start if num_workers else None
    return DataLoader(loader, batch_size=None, num_workers=num_workers, multiprocessing_context=context, **options)  # pyright: ignore[reportArgumentType]


def test_tensors_share_the_arrays_memory(reader: MemoryReader) -> None:
    batch = next(iter(Loader(reader, OPTIONS)))
    tensors = to_torch(batch)
    batch.input_ids_BT[0, 0] = 12345
    assert tensors.input_ids_BT[0, 0] == 12345
    assert (tensors.input_ids_BT.dtype, tensors.flat_positions_P.dtype, tensors.teacher.logprobs_PK.dtype) == (
        torch.int32,
        torch.int64,
        torch.float32,
    )
    assert tensors.num_sequences == batch.num_sequences


def test_a_batch_moves_as_a_whole(reader: MemoryReader) -> None:
    batch = next(iter(TorchLoader(Loader(reader, OPTIONS))))
    moved = batch.to("meta")
    assert moved.teacher.logprobs_PK.device.type == moved.input_ids_BT.device.type == "meta"
    assert (moved.num_sequences, moved.state) == (batch.num_sequences, batch.state)


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_any_number_of_workers_gives_the_loader_s_stream(reader: MemoryReader, num_workers: int) -> None:
    loader = TorchLoader(Loader(reader, OPTIONS))
    for epoch in range(2):
        loader.set_epoch(epoch)
        assert_same_stream(to_numpy(in_workers(loader, num_workers)), list(Loader(reader, OPTIONS, epoch=epoch)))


@pytest.mark.slow
@pytest.mark.parametrize(("start", "is_direct"), [("fork", True), ("fork", False), ("spawn", True)])
def test_two_workers_give_the_stream_of_a_cache_on_disk(tmp_path: Path, start: str, is_direct: bool) -> None:
    """Its files are mapped here before the workers are started, and read by the compiled call or record by record."""
    path = make_cache(tmp_path / "cache", "packed", num_units=4, num_sequences=8)
    options = LoaderConfig(seq_len=32, batch_rows=2, packing_buffer=8, num_threads=1, with_roles=not is_direct)
    with open_cache(path) as cache, Loader(cache, options) as inner:
        first = inner._layout.batch(0).rows
        layout = BatchLayout(tuple(map(len, first)), 32, CacheSet(cache).columns, with_roles=not is_direct)
        assert (read_mapped(CacheSet(cache), first, layout, None) is not None) == is_direct
        loader = TorchLoader(inner)
        data = in_workers(loader, 2, start, persistent_workers=True)
        for epoch in range(2):
            with Loader(path, options, epoch=epoch) as alone:
                assert_same_stream(to_numpy(data), list(alone))
        assert data._iterator is not None
        data._iterator._shutdown_workers()  # pyright: ignore[reportAttributeAccessIssue]


def test_more_workers_than_batches_leave_some_without_work() -> None:
    few = MemoryReader([4, 5, 6])
    loader = TorchLoader(Loader(few, OPTIONS))
    assert len(loader) == 1
    assert_same_stream(to_numpy(in_workers(loader, 2)), list(Loader(few, OPTIONS)))


def test_persistent_workers_go_on_to_the_next_epoch(reader: MemoryReader) -> None:
    data = in_workers(TorchLoader(Loader(reader, OPTIONS)), 2, persistent_workers=True)
    for epoch in range(2):
        assert_same_stream(to_numpy(data), list(Loader(reader, OPTIONS, epoch=epoch)))


def test_persistent_workers_refuse_to_go_on_from_different_places(reader: MemoryReader) -> None:
    data = in_workers(TorchLoader(Loader(reader, OPTIONS)), 2, persistent_workers=True, prefetch_factor=1)
    for _ in data:
        break
    with pytest.raises(StateError, match="persistent workers"):
        list(data)
    assert data._iterator is not None
    # The error's traceback holds on to the iterator: collected later, it would wait five seconds for each worker.
    data._iterator._shutdown_workers()  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_state_of_every_batch_resumes_behind_it(reader: MemoryReader, num_workers: int) -> None:
    whole = list(in_workers(TorchLoader(Loader(reader, OPTIONS)), num_workers))
    for step in (0, len(whole) // 2, len(whole) - 2, len(whole) - 1):
        resumed = TorchLoader(Loader(reader, OPTIONS))
        state = whole[step].state
        assert state is not None
        resumed.load_state_dict(state)
        expected = to_numpy(whole[step + 1 :]) or list(Loader(reader, OPTIONS, epoch=1))
        assert_same_stream(to_numpy(in_workers(resumed, num_workers)), expected)


def test_the_adapter_has_the_loader_s_state_and_length(reader: MemoryReader) -> None:
    inner = Loader(reader, OPTIONS)
    loader = TorchLoader(inner)
    assert len(loader) == len(inner) == len(in_workers(loader, 0))
    for batch in loader:
        assert batch.state == loader.state_dict() == inner.state_dict()
    loader.close()
    with pytest.raises(StateError, match="closed"):
        list(loader)


def test_batches_on_another_device_come_in_the_same_order(reader: MemoryReader) -> None:
    loader = TorchLoader(Loader(reader, OPTIONS))
    moved = list(to_device(loader, "cpu"))
    assert_same_stream(to_numpy(moved), list(Loader(reader, OPTIONS)))
    assert moved[-1].state == loader.state_dict()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_copied_ahead_from_pinned_memory_are_the_loader_s(reader: MemoryReader) -> None:
    loader = TorchLoader(Loader(reader, OPTIONS), pin_memory=True)
    moved = [batch.to("cpu") for batch in to_device(loader, "cuda")]
    assert_same_stream(to_numpy(moved), list(Loader(reader, OPTIONS)))


def stateful(reader: MemoryReader, num_workers: int) -> Any:
    stateful_dataloader = pytest.importorskip("torchdata.stateful_dataloader")
    context = "fork" if num_workers else None
    loader = TorchLoader(Loader(reader, OPTIONS))
    return stateful_dataloader.StatefulDataLoader(
        loader, batch_size=None, num_workers=num_workers, multiprocessing_context=context
    )


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")  # torchdata, when it is imported
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stateful_data_loader_goes_on_behind_any_batch(reader: MemoryReader, num_workers: int) -> None:
    whole = list(Loader(reader, OPTIONS))
    for step in (1, len(whole) // 2, len(whole) - 1, len(whole)):
        first = stateful(reader, num_workers)
        batches = iter(first)
        given = [next(batches) for _ in range(step)]
        state = json.loads(json.dumps(first.state_dict()))
        del batches
        resumed = stateful(reader, num_workers)
        resumed.load_state_dict(state)
        rest = list(resumed)
        if step == len(whole) and num_workers == 0:  # the loader itself begins no empty epoch
            assert_same_stream(to_numpy(rest), list(Loader(reader, OPTIONS, epoch=1)))
        else:
            assert_same_stream(to_numpy(given + rest), whole)


def test_a_worker_s_place_needs_as_many_workers(reader: MemoryReader) -> None:
    place = {"start": Loader(reader, OPTIONS).state_dict(), "first": 1, "num_workers": 3}
    loader = TorchLoader(Loader(reader, OPTIONS))
    loader.load_state_dict(place)
    batches = iter(in_workers(loader, 2))
    with pytest.raises(StateError, match="one of 3 workers, here are 2"):
        next(batches)
    batches._shutdown_workers()  # pyright: ignore[reportAttributeAccessIssue] - as above
