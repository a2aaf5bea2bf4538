from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from kdcache.errors import CorruptCacheError
from kdcache.store.records.arrow_file import open_arrow_file


def write(path, table: pa.Table, **options) -> None:
    with (
        pa.OSFile(str(path), "wb") as sink,
        pa.ipc.new_file(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as f,
    ):
        f.write_table(table, max_chunksize=1000)


def test_a_plain_file_is_mapped_and_its_batches_outlive_the_reader(tmp_path):
    write(tmp_path / "f", pa.table({"x": np.arange(2500), "s": [str(i) for i in range(2500)]}))
    before = pa.total_allocated_bytes()
    batch = open_arrow_file(tmp_path / "f").get_batch(2)
    assert pa.total_allocated_bytes() == before
    assert batch.column("x").to_pylist() == list(range(2000, 2500))


def test_a_file_without_batches_is_one(tmp_path):
    write(tmp_path / "f", pa.table({"x": np.zeros(0)}))
    assert open_arrow_file(tmp_path / "f").read_all().num_rows == 0


@pytest.mark.parametrize("compression", ["zstd", "lz4"])
def test_compressed_buffers_are_refused_before_anything_is_allocated_for_them(tmp_path, compression):
    write(tmp_path / "f", pa.table({"x": np.zeros(10**6)}), compression=compression)
    pool = pa.default_memory_pool()
    before = pool.bytes_allocated()
    with pytest.raises(CorruptCacheError, match=r"f: has compressed buffers"):
        open_arrow_file(tmp_path / "f")
    assert pool.bytes_allocated() == before


def test_dictionaries_are_refused(tmp_path):
    write(tmp_path / "f", pa.table({"x": pa.array(["a", "b"]).dictionary_encode()}))
    with pytest.raises(CorruptCacheError, match="dictionaries"):
        open_arrow_file(tmp_path / "f")


@pytest.mark.parametrize(
    "data", [b"", b"ARROW1", b"ARROW1\0\0" + bytes(4) + b"ARROW1", b"x" * 1000, b"ARROW1\0\0" + b"\xff" * 100 + b"ARROW1"]
)
def test_what_is_no_arrow_file_is_refused(tmp_path, data):
    (tmp_path / "f").write_bytes(data)
    with pytest.raises(CorruptCacheError, match="f: cannot be read as an Arrow file"):
        open_arrow_file(tmp_path / "f")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(CorruptCacheError, match="No such file"):
        open_arrow_file(tmp_path / "f")
