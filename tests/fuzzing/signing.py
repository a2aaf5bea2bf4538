"""A cache taken apart into JSON and bytes, and put together with every digest right: as someone would who means harm."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hostile
import msgspec
import pyarrow as pa

from kdcache.format import paths
from kdcache.format.schema import DIGEST, INDEX_SCHEMA, METADATA_KEY
from kdcache.store.records.batch import digest_of
from kdcache.store.records.column_view import column_view

Fields = dict[str, Any]


def signed(fields: Fields) -> bytes:
    """The JSON with its own digest, floats in the format's form."""
    fields = {name: value for name, value in fields.items() if name != "digest"}
    digest = hashlib.sha256(msgspec.json.encode(fields, order="sorted")).hexdigest()
    return msgspec.json.encode(fields | {"digest": digest})


@dataclass
class Parts:
    """A cache in memory: manifests 0 and 1, the shards' bytes in their order, the index's."""

    first: Fields
    newest: Fields
    shards: list[bytes]
    index: bytes
    sidecars: dict[str, bytes] = field(default_factory=dict)

    @classmethod
    def read(cls, cache: Path) -> Parts:
        """Those of a cache with one fold."""
        first, newest = (json.loads((cache / paths.manifest_name(number)).read_bytes()) for number in (0, 1))
        shards = [(cache / shard["name"]).read_bytes() for shard in newest["shards"]]
        sidecars = {name: (cache / name).read_bytes() for name in map(_file_of, newest["sidecars"])}
        return cls(first, newest, shards, (cache / newest["index"]["name"]).read_bytes(), sidecars)

    def copy(self) -> Parts:
        """Another with JSON of its own."""
        first, newest = (json.loads(json.dumps(fields)) for fields in (self.first, self.newest))
        return Parts(first, newest, list(self.shards), self.index, self.sidecars)

    def write(self, cache: Path) -> Path:
        """Put it together in an empty folder, names, sizes and digests made right as far as the JSON has places for them."""
        shutil.rmtree(cache, ignore_errors=True)
        for name in (*paths.DIRECTORIES, paths.SIDECARS):
            (cache / name).mkdir(parents=True)
        for name, data in self.sidecars.items():
            (cache / name).write_bytes(data)
        for shard, data in zip(self._entries(), self.shards, strict=False):
            sha256 = hashlib.sha256(data).hexdigest()
            unit = shard.get("unit")
            name = paths.shard_name(unit if isinstance(unit, int) and 0 <= unit < 10**9 else 0, sha256)
            shard.update(sha256=sha256, name=name, num_bytes=len(data))
            (cache / name).write_bytes(data)
        if isinstance(self.newest.get("index"), dict):
            sha256 = hashlib.sha256(self.index).hexdigest()
            self.newest["index"] = {"name": paths.index_name(sha256), "sha256": sha256}
            (cache / paths.index_name(sha256)).write_bytes(self.index)
        self.first.update({name: self.newest[name] for name in ("identity", "plan") if name in self.newest})
        first = signed(self.first)
        self.newest["parent"] = json.loads(first)["digest"]
        (cache / paths.manifest_name(0)).write_bytes(first)
        (cache / paths.manifest_name(1)).write_bytes(signed(self.newest))
        return cache

    def tell_the_shards(self) -> None:
        """Put into the shards' metadata what the manifest says of them, so that the two agree."""
        identity = self.newest["identity"]
        about = {name: identity[name] for name in ("selection", "codec", "features")}
        about["vocab_size"] = identity["teacher"]["vocab_size"]
        for number, (shard, data) in enumerate(zip(self._entries(), self.shards, strict=False)):
            schema, batches = batches_of(data)
            fields = json.loads((schema.metadata or {})[METADATA_KEY]) | about | {"unit": shard.get("unit")}
            schema = schema.with_metadata({METADATA_KEY: msgspec.json.encode(fields)})
            batches = [pa.RecordBatch.from_arrays(batch.columns, schema=schema) for batch in batches]
            self.shards[number] = hostile.file_bytes(batches, schema)

    def _entries(self) -> list[Fields]:
        shards = self.newest.get("shards")
        return [shard for shard in shards if isinstance(shard, dict)] if isinstance(shards, list) else []


def _file_of(sidecar: Fields) -> str:
    return paths.sidecar_name(sidecar["sha256"])


def batches_of(data: bytes | pa.Buffer) -> tuple[pa.Schema, list[pa.RecordBatch]]:
    """The schema and the record batches of an Arrow file, not validated."""
    reader = pa.ipc.open_file(data)
    return reader.schema, [reader.get_batch(number) for number in range(reader.num_record_batches)]


def row_digests(schema: pa.Schema, batch: pa.RecordBatch) -> list[int]:
    """The right digest of each row; raises ArrowInvalid where the batch is none that can be read."""
    batch.validate(full=True)
    names = json.loads(schema.metadata[METADATA_KEY])["digest_columns"]
    views = [column_view(batch.column(name)) for name in names]
    return [digest_of([view.value_bytes(row) for view in views]) for row in range(batch.num_rows)]


def sign_rows(data: bytes) -> bytes:
    """The same file with right digests wherever a reader would come so far as to compare them."""
    buffer = pa.py_buffer(bytearray(data))
    out = bytearray(data)
    try:
        schema, batches = batches_of(buffer)
        for batch in batches:
            digests = b"".join(digest.to_bytes(8, "little") for digest in row_digests(schema, batch))
            at = batch.column(DIGEST).buffers()[1].address - buffer.address
            out[at : at + len(digests)] = digests
    except Exception:  # Arrow refuses it: so will the reader
        return data
    return bytes(out)


def index_of(shards: list[bytes]) -> tuple[bytes, list[int]]:
    """The index that belongs to some shards, of units 0 and on, and the number of rows of each."""
    rows, numbers = [], []
    for unit, data in enumerate(shards):
        _, batches = batches_of(data)
        for number, batch in enumerate(batches):
            batch.validate(full=True)
            ids, flags = column_view(batch.column("input_ids")), column_view(batch.column("supervised"))
            keys = batch.column("key").to_pylist()
            rows += [
                (keys[row], unit, number, row, len(ids[row]), int(flags[row].sum()))  # type: ignore[arg-type, union-attr]
                for row in range(batch.num_rows)
            ]
        numbers.append(sum(batch.num_rows for batch in batches))
    columns = [pa.array(list(c), field.type) for c, field in zip(zip(*rows, strict=True), INDEX_SCHEMA, strict=True)]
    return hostile.file_bytes([pa.RecordBatch.from_arrays(columns, schema=INDEX_SCHEMA)], INDEX_SCHEMA), numbers
