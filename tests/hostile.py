"""Caches made to be refused: each function spoils one thing in a sound cache of one unit, with every digest that is not the
point made right again, as someone would who means harm.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from kdcache.format import paths
from kdcache.format.arrow_messages import record_batch_spans
from kdcache.format.schema import DIGEST, INDEX_SCHEMA, METADATA_KEY, sequence_digest
from kdcache.store.records.column_view import column_view

Fields = dict[str, Any]


def manifest_path(cache: Path) -> Path:
    return cache / paths.manifest_name(1)


def signed_json(fields: Fields) -> bytes:
    """The fields with a right digest."""
    fields = {name: value for name, value in fields.items() if name != "digest"}
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return json.dumps(fields | {"digest": hashlib.sha256(text.encode()).hexdigest()}).encode()


def edit_manifest(cache: Path, change: Callable[[Fields], None]) -> None:
    fields = json.loads(manifest_path(cache).read_bytes())
    change(fields)
    manifest_path(cache).write_bytes(signed_json(fields))


def shard_path(cache: Path) -> Path:
    (path,) = (cache / paths.DATA).iterdir()
    return path


def shard_batches(cache: Path) -> list[pa.RecordBatch]:
    reader = pa.ipc.open_file(shard_path(cache).read_bytes())
    return [reader.get_batch(i) for i in range(reader.num_record_batches)]


def file_bytes(batches: list[pa.RecordBatch], schema: pa.Schema, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def replace_shard(cache: Path, data: bytes) -> None:
    """Other bytes for the shard, its name, size and SHA-256 in the manifest made right."""
    shard_path(cache).unlink()
    sha256 = hashlib.sha256(data).hexdigest()
    name = paths.shard_name(0, sha256)
    (cache / name).write_bytes(data)
    edit_manifest(cache, lambda fields: fields["shards"][0].update(name=name, sha256=sha256, num_bytes=len(data)))


def replace_index(cache: Path, data: bytes) -> None:
    sha256 = hashlib.sha256(data).hexdigest()
    (cache / paths.index_name(sha256)).write_bytes(data)
    edit_manifest(cache, lambda fields: fields["index"].update(name=paths.index_name(sha256), sha256=sha256))


def edit_index(cache: Path, **columns: list[int]) -> None:
    name = json.loads(manifest_path(cache).read_bytes())["index"]["name"]
    table = pa.ipc.open_file((cache / name).read_bytes()).read_all()
    for name, values in columns.items():
        table = table.set_column(table.schema.get_field_index(name), INDEX_SCHEMA.field(name), pa.array(values, pa.uint32()))
    replace_index(cache, file_bytes(table.combine_chunks().to_batches(), INDEX_SCHEMA))


def edit_rows(cache: Path, change: Callable[[Fields], None], metadata: Fields | None = None) -> None:
    """Change the columns of the first record batch (name -> Arrow array), sign its rows, write the shard again."""
    batches = shard_batches(cache)
    schema = batches[0].schema
    if metadata:
        about = json.loads(schema.metadata[METADATA_KEY]) | metadata
        schema = schema.with_metadata({METADATA_KEY: json.dumps(about)})
    names = schema.names[:-1]
    columns = {name: batches[0].column(name) for name in names}
    change(columns)
    views = {name: column_view(column) for name, column in columns.items()}
    digests = [sequence_digest({n: view[row] for n, view in views.items()}, names) for row in range(batches[0].num_rows)]
    first = pa.RecordBatch.from_arrays([*columns.values(), pa.array(digests, pa.uint64())], schema=schema)
    rest = [pa.RecordBatch.from_arrays(batch.columns, schema=schema) for batch in batches[1:]]
    replace_shard(cache, file_bytes([first, *rest], schema))


def edit_metadata(cache: Path, **changes: Any) -> None:
    """Other metadata in the shard's schema."""
    edit_rows(cache, lambda columns: None, changes)


def set_list(name: str, values: list[Any]) -> Callable[[Fields], None]:
    def change(columns: Fields) -> None:
        columns[name] = pa.array([values], columns[name].type)

    return change


def flip(path: Path, place: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


def cut(path: Path, end: int) -> None:
    path.write_bytes(path.read_bytes()[:end])


def flip_a_stored_value(cache: Path) -> None:
    """One bit of the first sequence's token ids, where they stand in the file."""
    path = shard_path(cache)
    ids = shard_batches(cache)[0].column("input_ids").values.to_numpy().tobytes()
    flip(path, path.read_bytes().index(ids) + 5)


def swap_rows(cache: Path) -> None:
    """The first two record batches change places: every row is sound, and two are not where the index says."""
    batches = shard_batches(cache)
    replace_shard(cache, file_bytes([batches[1], batches[0], *batches[2:]], batches[0].schema))


def compress(cache: Path) -> None:
    batches = shard_batches(cache)
    replace_shard(cache, file_bytes(batches, batches[0].schema, compression="zstd"))


def compress_index(cache: Path) -> None:
    zeros = [pa.array([bytes(16)] * 10**6, pa.binary(16)), *[pa.array(np.zeros(10**6, np.uint32))] * 5]
    batch = pa.RecordBatch.from_arrays(zeros, schema=INDEX_SCHEMA)
    replace_index(cache, file_bytes([batch], INDEX_SCHEMA, compression="zstd"))


def older_arrow(cache: Path) -> None:
    """Arrow's metadata version V4, in which a key beside a message may say that its buffers are compressed."""
    batches = shard_batches(cache)
    replace_shard(cache, file_bytes(batches, batches[0].schema, metadata_version=pa.ipc.MetadataVersion.V4))


def with_keys_beside(cache: Path) -> None:
    """A record batch that carries keys of its own."""
    batches, sink = shard_batches(cache), pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batches[0].schema) as writer:
        for batch in batches:
            writer.write_batch(batch, custom_metadata={"ARROW:experimental_compression": "ZSTD"})
    replace_shard(cache, sink.getvalue().to_pybytes())


def repeat_a_batch(data: bytes) -> bytes:
    """The footer names the first record batch where it named the second."""
    places = record_batch_spans(memoryview(data), len(data))
    assert places is not None
    first, second = (struct.pack("<qi4xq", *place) for place in places[:2])
    at = data.rindex(second)
    return data[:at] + first + data[at + len(second) :]


def repeat_in_index(cache: Path) -> None:
    """An index of three rows in two record batches of which the second is the first again."""
    name = json.loads(manifest_path(cache).read_bytes())["index"]["name"]
    table = pa.ipc.open_file((cache / name).read_bytes()).read_all().combine_chunks()
    replace_index(cache, repeat_a_batch(file_bytes(table.to_batches(max_chunksize=2), INDEX_SCHEMA)))


def unsigned_row(cache: Path) -> None:
    """The digest covers all columns but one."""
    batches = shard_batches(cache)
    names = json.loads(batches[0].schema.metadata[METADATA_KEY])["digest_columns"]
    edit_metadata(cache, digest_columns=[name for name in names if name != "logprobs"])


def foreign_arrow_file(cache: Path) -> None:
    replace_shard(cache, file_bytes([pa.record_batch({"x": [1, 2]})], pa.schema([("x", pa.int64())])))


def without_a_column(cache: Path) -> None:
    batches = [batch.drop_columns([DIGEST]) for batch in shard_batches(cache)]
    replace_shard(cache, file_bytes(batches, batches[0].schema))


def replaced_codec(codec: Fields) -> Callable[[Path], None]:
    def spoil(cache: Path) -> None:
        edit_metadata(cache, codec=codec)
        edit_manifest(cache, lambda fields: fields["identity"].update(codec=codec))

    return spoil


def replaced_selection(selection: Fields) -> Callable[[Path], None]:
    def spoil(cache: Path) -> None:
        edit_metadata(cache, selection=selection)
        edit_manifest(cache, lambda fields: fields["identity"].update(selection=selection))

    return spoil
