import gc
import threading

import numpy as np
import pytest
from memory_reader import MemoryReader, assert_same_stream

from kdcache.config.loader import LoaderConfig
from kdcache.loader.batches.buffers import BufferPool
from kdcache.loader.loader import Loader

LENGTHS = np.random.default_rng(0).integers(1, 13, 300).tolist()


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


@pytest.fixture
def pool() -> BufferPool:
    return BufferPool(4)


def test_memory_is_used_again_once_the_array_is_gone(pool: BufferPool) -> None:
    first = pool.take((100, 4), np.float32)
    place = address(first)
    del first
    second = pool.take((99, 4), np.int32)
    assert address(second) == place
    assert pool.num_allocated == 1


def test_memory_that_any_view_still_sees_is_not_used_again(pool: BufferPool) -> None:
    array = pool.take((100, 4), np.float32)
    array[:] = 7
    views = [array[3], array.T[1:3], memoryview(array[5:]), array.view(np.int32)[::2]]
    del array
    while views:
        taken = pool.take((100, 4), np.float32)
        taken[:] = 1
        assert np.asarray(views[-1]).view(np.float32).flat[0] == 7
        del taken
        views.pop()
    assert pool.num_allocated == 2


def test_tensors_hold_on_to_their_memory(pool: BufferPool) -> None:
    torch = pytest.importorskip("torch")
    tensor = torch.from_numpy(pool.take((10,), np.int64)).fill_(5)[2:]
    other = pool.take((10,), np.int64)
    other[:] = 9
    assert tensor.tolist() == [5] * 8
    place = tensor.untyped_storage().data_ptr()
    del tensor
    assert address(pool.take((10,), np.int64)) == place


def test_arrays_are_of_the_shape_and_type_asked_for_also_without_elements(pool: BufferPool) -> None:
    for shape, dtype in [((0, 5), np.int32), ((3, 0), np.float32), ((2, 3), np.float32), ((7,), np.int64)]:
        array = pool.take(shape, dtype)
        assert (array.shape, array.dtype, array.flags.c_contiguous, array.flags.writeable) == (shape, dtype, True, True)


def test_larger_arrays_replace_smaller_buffers_and_no_more_are_kept_than_asked_for() -> None:
    pool = BufferPool(2)
    for size in (10, 1000, 100_000, 90_000, 100_000):
        pool.take((size,), np.uint8)
    assert pool.num_allocated == 3
    several = [pool.take((100_000,), np.uint8) for _ in range(5)]
    del several
    assert len(pool._free["entries"]) == 2


def test_arrays_of_another_purpose_have_buffers_of_their_own(pool: BufferPool) -> None:
    """A feature's vectors are a hundred times larger: small arrays that took their buffers would hold all of that memory."""
    for _ in range(3):
        large, small = pool.take((100_000,), np.uint8, "hidden"), pool.take((10,), np.uint8)
        del large, small
    assert pool.num_allocated == 2


def test_batches_that_are_kept_stay_as_they_were() -> None:
    reader = MemoryReader(LENGTHS)
    options = LoaderConfig(seq_len=16, batch_rows=2, packing_buffer=8, num_threads=2)
    plain = LoaderConfig(seq_len=16, batch_rows=2, packing_buffer=8, num_threads=0)
    assert_same_stream(list(Loader(reader, options)), list(Loader(reader, plain)))


def test_a_loop_that_lets_go_of_its_batches_uses_few_buffers() -> None:
    reader = MemoryReader([8] * 400, supervised="all")
    loader = Loader(reader, LoaderConfig(seq_len=16, batch_rows=2, packing_buffer=8, num_threads=2, prefetch_batches=3))
    allocated: list[int] = []

    def allocate(num_bytes: int) -> np.ndarray:
        allocated.append(num_bytes)
        return np.empty(num_bytes, np.uint8)

    loader.use_buffers(allocate=allocate)
    num_batches = sum(1 for _ in loader)
    assert num_batches == 100
    # Two arrays each: those of the batches ahead, that are being read, and that the loop and the generator hold.
    assert len(allocated) <= 2 * (3 + 2 + 3)


def test_leases_may_end_in_any_thread(pool: BufferPool) -> None:
    arrays = [pool.take((100,), np.uint8) for _ in range(4)]
    thread = threading.Thread(target=arrays.clear)
    thread.start()
    thread.join()
    gc.collect()
    again = [pool.take((100,), np.uint8) for _ in range(4)]
    assert pool.num_allocated == 4
    assert len({address(array) for array in again}) == 4
