import pickle

import pytest
from memory_reader import MemoryReader, assert_same, assert_same_stream

from kdcache.config.loader import LoaderConfig
from kdcache.errors import ConfigError
from kdcache.loader.batches.batch import stack_batches
from kdcache.loader.loader import Loader
from kdcache.loader.view import PackedView

OPTIONS = LoaderConfig(seq_len=12, batch_rows=3, packing_buffer=7, num_threads=0)


@pytest.fixture(scope="module")
def reader() -> MemoryReader:
    return MemoryReader([3, 12, 5, 1, 7, 7, 2, 9, 4, 4, 6, 11, 1, 1, 8])


def test_the_rows_of_a_view_stacked_are_the_loader_s_batches(reader: MemoryReader) -> None:
    view = PackedView(reader, OPTIONS, epoch=2)
    batches = list(Loader(reader, OPTIONS, epoch=2))
    num_full = len(view) // 3
    stacked = [stack_batches([view[r] for r in range(b * 3, b * 3 + 3)]) for b in range(num_full)]
    assert_same_stream(stacked, batches[:num_full])


def test_a_view_behaves_as_a_sequence(reader: MemoryReader) -> None:
    view = PackedView(reader, OPTIONS)
    assert_same(view[-1], view[len(view) - 1])
    assert sum(row.num_sequences for row in view) == len(reader)
    for outside in (len(view), -len(view) - 1):
        with pytest.raises(IndexError, match="rows"):
            view[outside]


def test_a_row_reads_its_own_sequences_only() -> None:
    reader = MemoryReader([3] * 100)
    view = PackedView(reader, OPTIONS)
    row = view[10]
    assert len(reader.reads) == row.num_sequences == 4


def test_a_view_can_be_pickled(reader: MemoryReader) -> None:
    view = PackedView(reader, OPTIONS, epoch=1)
    assert_same_stream(list(pickle.loads(pickle.dumps(view))), list(view))


def test_a_view_refuses_what_a_loader_refuses(reader: MemoryReader) -> None:
    with pytest.raises(ConfigError, match="seq_len is 4"):
        PackedView(reader, LoaderConfig(seq_len=4))
    with pytest.raises(ConfigError, match="epoch is -1"):
        PackedView(reader, OPTIONS, epoch=-1)
