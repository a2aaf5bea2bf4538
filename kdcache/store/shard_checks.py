"""Open a shard on a disk, and check that a shard is the one that the manifest means."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from kdcache.codec import get_codec
from kdcache.codec.features.columns import feature_fields
from kdcache.errors import CorruptCacheError
from kdcache.format.manifest import CodecInfo, Manifest, ShardInfo
from kdcache.format.schema import (
    DOMAIN_FIELD,
    FINISH_FIELD,
    GROUP_FIELDS,
    OPTIONAL_FIELDS,
    ShardMetadata,
    shard_metadata,
    shard_schema,
)
from kdcache.store.files.disk_errors import read_error
from kdcache.store.records.arrow_file import open_arrow_file


def open_shard(root: Path, shard: ShardInfo, manifest: Manifest) -> tuple[pa.RecordBatchFileReader, ShardMetadata]:
    """Map a shard and check that it is the one that the manifest means.

    Raises:
        CorruptCacheError: missing, of another size, not Arrow, or of another schema, unit, selection or codec.
    """
    path = root / shard.name
    try:
        num_bytes = path.stat().st_size
        if num_bytes != shard.num_bytes:
            raise CorruptCacheError(
                f"{path}: has {num_bytes} bytes, the manifest says {shard.num_bytes}; the shard is truncated or damaged"
            )
    except OSError as error:
        raise read_error(path, error) from error
    file = open_arrow_file(path)
    return file, check_shard(file.schema, shard, manifest, str(path))


def check_shard(schema: pa.Schema, shard: ShardInfo, manifest: Manifest, where: str) -> ShardMetadata:
    """Check a shard's metadata; raises CorruptCacheError unless its schema, unit, selection and codec are the manifest's."""
    metadata = shard_metadata(schema, where=where)
    _check_schema(schema, metadata, shard, manifest, where)
    return metadata


def _check_schema(schema: pa.Schema, metadata: ShardMetadata, shard: ShardInfo, manifest: Manifest, where: str) -> None:
    identity = manifest.identity
    ours = (shard.unit, identity.teacher.vocab_size, identity.selection, identity.codec, identity.features)
    theirs = (metadata.unit, metadata.vocab_size, metadata.selection, metadata.codec, metadata.features)
    if ours != theirs:
        raise CorruptCacheError(f"{where}: says that it is {theirs}, the manifest says {ours}")
    if identity.codec.params.get("vocab_size", metadata.vocab_size) != metadata.vocab_size:
        raise CorruptCacheError(f"{where}: the codec has {identity.codec.params}, the teacher {metadata.vocab_size} ids")
    for name, meaning, is_meant in (
        (FINISH_FIELD.name, "how answers ended", identity.generation is not None),
        (DOMAIN_FIELD.name, "sequences' domains", identity.domains),
        (GROUP_FIELDS[0].name, "sequences' groups", identity.groups),
    ):
        if (name in metadata.digest_columns) != is_meant:
            raise CorruptCacheError(f"{where}: says {'not ' * is_meant}{meaning}, the manifest says otherwise")
    expected = expected_schema(metadata.codec, metadata)
    for field in expected:
        if schema.get_field_index(field.name) < 0 or not schema.field(field.name).type.equals(field.type):
            raise CorruptCacheError(f"{where}: column {field.name!r} of type {field.type} is missing")
    if list(metadata.digest_columns) != expected.names[:-1]:
        raise CorruptCacheError(f"{where}: the digest covers {list(metadata.digest_columns)}, expected {expected.names[:-1]}")


def expected_schema(codec: CodecInfo, metadata: ShardMetadata) -> pa.Schema:
    """The schema that a shard with this metadata has in this format version."""
    fields = [*get_codec(codec.codec_id, codec.params, metadata.selection).fields(), *feature_fields(metadata.features)]
    optional = [field for field in OPTIONAL_FIELDS if field.name in metadata.digest_columns]
    return shard_schema(
        fields, unit=metadata.unit, vocab_size=metadata.vocab_size, selection=metadata.selection, codec=metadata.codec,
        optional=optional, features=metadata.features,
    )  # fmt: skip
