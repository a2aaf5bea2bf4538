"""The index of a cache: one line per sequence, in the cache's order (by unit, record batch, and index in the record batch).

A fold builds it from the lines of the index before it and those of the new shards.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from kdcache.errors import CorruptCacheError
from kdcache.format import paths
from kdcache.format.manifest import IndexInfo, Manifest, ShardInfo
from kdcache.format.schema import GROUP_FIELDS, INDEX_SCHEMA, index_schema
from kdcache.shown import get_logger
from kdcache.store.files import fs
from kdcache.store.files.disk_errors import read_error
from kdcache.store.files.location import Location, each
from kdcache.store.records.arrow_file import open_arrow_buffer, open_arrow_file
from kdcache.store.remote.remote_file import open_columns
from kdcache.store.remote.remote_read import read_content

_log = get_logger(__name__)

_SOURCES = ("key", "input_ids", "supervised")
"""The columns of a shard from which its lines in the index are made."""


def publish_index(root: Location, manifest: Manifest, new: Sequence[ShardInfo]) -> IndexInfo:
    """Publish the index of a snapshot together with new shards. It equals one made from all the shards.

    Raises:
        CorruptCacheError: a shard is missing, or is not an Arrow file any more.
    """
    schema = index_schema(manifest.identity)
    lines = each(partial(_shard_lines, root, schema), new, root)
    return _publish(root, _sorted_by_unit([_known_lines(root, manifest), *lines], schema))


def publish_index_without(root: Location, manifest: Manifest, units: Collection[int]) -> IndexInfo:
    """Publish the index of a snapshot without some units, whose shards are not opened.

    Raises:
        CorruptCacheError: the snapshot's index is damaged, and so is the shard of another unit.
    """
    kept = tuple(shard for shard in manifest.shards if shard.unit not in units)
    try:
        table = snapshot_index(root, manifest)
        table = table.filter(pa.array(~np.isin(table.column("unit").to_numpy(), list(units))))
    except CorruptCacheError as error:
        _log.warning("%s; it is made again from the shards", error)
        table = index_of_shards(root, kept, index_schema(manifest.identity))
    return _publish(root, table.combine_chunks())


def _publish(root: Location, table: pa.Table) -> IndexInfo:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        # One record batch, however long: a reader's columns are then views of the map. Of several it would have to make copies.
        for batch in table.to_batches():
            writer.write_batch(batch)
    data = sink.getvalue().to_pybytes()
    sha256 = hashlib.sha256(data).hexdigest()
    fs.publish_bytes(root, data, paths.index_name(sha256))
    fs.reached("index published")
    return IndexInfo(name=paths.index_name(sha256), sha256=sha256)


def index_of_shards(root: Location, shards: Iterable[ShardInfo], schema: pa.Schema = INDEX_SCHEMA) -> pa.Table:
    """The index of some shards, read from their small columns alone: what `publish_index` must come to.

    Raises:
        CorruptCacheError: a shard is missing, or is not an Arrow file any more.
    """
    return _sorted_by_unit(list(each(partial(_shard_lines, root, schema), shards, root)), schema)


def open_index(root: Location, info: IndexInfo | None, schema: pa.Schema = INDEX_SCHEMA) -> pa.Table:
    """Open an index, memory-mapped where it is on a disk or kept in a folder for blocks; an empty table for None.

    Args:
        root: of the cache.
        info: names the file.
        schema: see `index_schema`.

    Raises:
        CorruptCacheError: missing, damaged, or not of the schema.
    """
    if info is None:
        return schema.empty_table()
    path = root / info.name
    try:
        table = _index_file(path, info.sha256).read_all()
        table.validate(full=True)
    except (pa.ArrowException, OSError) as error:
        raise read_error(path, error) from error
    if any(table.schema.names.count(field.name) != 1 or table.schema.field(field.name).type != field.type for field in schema):
        raise CorruptCacheError(f"{path}: the schema is not an index's")
    # Others are of a later minor version.
    table = table.select(schema.names)
    if any(column.null_count for column in table.columns):
        raise CorruptCacheError(f"{path}: the index holds nulls")
    return table.replace_schema_metadata(schema.metadata)


def snapshot_index(root: Location, manifest: Manifest) -> pa.Table:
    """The index of a snapshot, with as many sequences as its manifest says; see `open_index`.

    Raises:
        CorruptCacheError: missing, damaged, not of the schema, or of another number of sequences.
    """
    table = open_index(root, manifest.index, index_schema(manifest.identity))
    expected = manifest.total("num_sequences")
    if len(table) != expected:
        raise CorruptCacheError(f"{root}: the index has {len(table)} sequences, the manifest {expected}")
    return table


def _index_file(path: Location, sha256: str) -> pa.RecordBatchFileReader:
    if not isinstance(path, Path):
        return open_arrow_buffer(read_content(path, sha256), where=str(path))
    # The whole file is hashed at each opening: 36 bytes per sequence, and every read of the data depends on it.
    if fs.sha256_of(path) != sha256:
        raise CorruptCacheError(f"{path}: its SHA-256 is not the one in the manifest; the index is damaged")
    return open_arrow_file(path)


def _known_lines(root: Location, manifest: Manifest) -> pa.Table:
    """The lines of a snapshot's own index; read from its shards where the index is damaged."""
    try:
        return snapshot_index(root, manifest)
    except CorruptCacheError as error:
        _log.warning("%s; it is made again from the shards", error)
    return index_of_shards(root, manifest.shards, index_schema(manifest.identity))


def _sorted_by_unit(tables: list[pa.Table], schema: pa.Schema) -> pa.Table:
    table = pa.concat_tables([schema.empty_table(), *tables])
    # Stable: the sequences of a unit are in order already.
    order = np.argsort(table.column("unit").to_numpy(), kind="stable")
    return table.take(pa.array(order)).combine_chunks()


def _shard_lines(root: Location, schema: pa.Schema, shard: ShardInfo) -> pa.Table:
    path = root / shard.name
    groups = [field.name for field in GROUP_FIELDS if field.name in schema.names]
    try:
        file = open_arrow_file(path) if isinstance(path, Path) else open_columns(path, shard.num_bytes, (*_SOURCES, *groups))
        return pa.Table.from_batches(_file_lines(file, shard.unit, schema, groups), schema)
    except (pa.ArrowException, OSError, KeyError, IndexError) as error:
        raise read_error(root / shard.name, error) from error


def _file_lines(
    reader: pa.RecordBatchFileReader, unit: int, schema: pa.Schema, groups: Sequence[str]
) -> Iterator[pa.RecordBatch]:
    for index in range(reader.num_record_batches):
        batch = reader.get_batch(index)
        batch.validate(full=True)
        num_sequences = batch.num_rows
        yield pa.RecordBatch.from_arrays(
            [
                _copied(batch, "key", schema),
                pa.array(np.full(num_sequences, unit, np.uint32)),
                pa.array(np.full(num_sequences, index, np.uint32)),
                pa.array(np.arange(num_sequences, dtype=np.uint32)),
                _lengths(batch.column("input_ids")),
                _num_true(batch.column("supervised")),
                *(_copied(batch, name, schema) for name in groups),
            ],
            schema=schema,
        )


def _copied(batch: pa.RecordBatch, name: str, schema: pa.Schema) -> pa.Array:
    """A column of a shard that the index holds as well, and outlives the mapping of the shard."""
    return pa.array(batch.column(name).to_pylist(), schema.field(name).type)


def _lengths(column: pa.ListArray) -> pa.Array:
    return pa.array(np.diff(column.offsets.to_numpy()).astype(np.uint32))


def _num_true(column: pa.ListArray) -> pa.Array:
    flags = column.values.to_numpy(zero_copy_only=False)
    sums = np.concatenate([[0], np.cumsum(flags)])
    offsets = column.offsets.to_numpy()
    return pa.array((sums[offsets[1:]] - sums[offsets[:-1]]).astype(np.uint32))
