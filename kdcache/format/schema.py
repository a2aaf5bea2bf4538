"""The Arrow schema of a shard and of an index, and the digest of a sequence. The spec is README.md in this folder.

A shard's columns are the fixed ones below, then the codec's, then `digest`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import xxhash

from kdcache.errors import CorruptCacheError, FormatError, UnsupportedVersionError
from kdcache.format.manifest import FORMAT_NAME, FORMAT_VERSION, CodecInfo, FeatureInfo, Identity, SelectionInfo
from kdcache.format.manifest_checks import check_content
from kdcache.format.record import KEY_BYTES

METADATA_KEY = b"kdcache"
DIGEST = "digest"
DIGEST_KIND = "xxh3_64"
NULL_LENGTH = 2**64 - 1

SEQUENCE_FIELDS = (
    pa.field("key", pa.binary(KEY_BYTES), nullable=False),
    pa.field("source", pa.string(), nullable=False),
    pa.field("input_ids", pa.list_(pa.int32()), nullable=False),
    pa.field("supervised", pa.list_(pa.bool_()), nullable=False),
    pa.field("roles", pa.list_(pa.uint8())),
    pa.field("turn_starts", pa.list_(pa.int32()), nullable=False),
    pa.field("num_entries", pa.list_(pa.uint16())),
)
"""Columns every codec shares. `roles` is null where every token's role is `none`; `num_entries` (entries per position) is null
where every position has the number that the selection fixes (`k` of `top_k`)."""

FINISH_FIELD = pa.field("finish", pa.uint8(), nullable=False)
"""Follows them where the teacher wrote the sequences' ends itself: index into FINISHES."""

DOMAIN_FIELD = pa.field("domain", pa.string(), nullable=False)
"""Follows where the input named domains."""

GROUP_FIELDS = (
    pa.field("group", pa.binary(KEY_BYTES), nullable=False),
    pa.field("preference", pa.uint8(), nullable=False),
)
"""Follow where the input named groups, in shards and in the index: all zeros for no group; index into PREFERENCES."""

INDEX_SCHEMA = pa.schema(
    [
        pa.field("key", pa.binary(KEY_BYTES), nullable=False),
        pa.field("unit", pa.uint32(), nullable=False),
        pa.field("record_batch", pa.uint32(), nullable=False),
        pa.field("row", pa.uint32(), nullable=False),
        pa.field("num_tokens", pa.uint32(), nullable=False),
        pa.field("num_positions", pa.uint32(), nullable=False),
    ]
)
"""`unit` names the shard; `record_batch` and `row` say which of its sequences is meant. The index is ordered by these three."""


OPTIONAL_FIELDS = (FINISH_FIELD, DOMAIN_FIELD, *GROUP_FIELDS)
"""Columns that some shards have, in their order."""


class ShardMetadata(msgspec.Struct, frozen=True, kw_only=True):
    """What a shard says of itself, under the key `kdcache` of its schema metadata, so that it can be decoded alone.

    Attributes:
        digest_columns: the columns that `digest` covers, in order. A reader must know every one of them; columns of a newer
            minor version that it does not know are not among them.
        digest: how it is taken; another way is another feature, which a reader must know.
    """

    format: str = FORMAT_NAME
    format_version: tuple[int, int] = FORMAT_VERSION
    unit: int
    vocab_size: int
    selection: SelectionInfo
    codec: CodecInfo
    digest_columns: tuple[str, ...]
    alignment: str = "position t has read tokens 0..t and predicts token t+1"
    digest: str = DIGEST_KIND
    features: tuple[FeatureInfo, ...] = ()


def optional_fields(identity: Identity) -> list[pa.Field]:
    """Those of OPTIONAL_FIELDS that the shards of a cache of this identity have, in their order."""
    groups = GROUP_FIELDS if identity.groups else ()
    return [*[FINISH_FIELD] * (identity.generation is not None), *[DOMAIN_FIELD] * identity.domains, *groups]


def index_schema(identity: Identity) -> pa.Schema:
    """The schema of the index of a cache of this identity: INDEX_SCHEMA, with groups where it has them."""
    return pa.schema([*INDEX_SCHEMA, *GROUP_FIELDS]) if identity.groups else INDEX_SCHEMA


def shard_schema(
    codec_fields: Sequence[pa.Field],
    *,
    unit: int,
    vocab_size: int,
    selection: SelectionInfo,
    codec: CodecInfo,
    optional: Sequence[pa.Field] = (),
    features: tuple[FeatureInfo, ...] = (),
) -> pa.Schema:
    """The schema of a shard written with this codec, its metadata included.

    Args:
        codec_fields: followed by the features'.
        unit, vocab_size, selection, codec, features: what the shard says of itself.
        optional: see `optional_fields`.
    """
    columns = [*SEQUENCE_FIELDS, *optional, *codec_fields]
    fields = [*columns, pa.field(DIGEST, pa.uint64(), nullable=False)]
    names = tuple(field.name for field in columns)
    metadata = ShardMetadata(
        unit=unit, vocab_size=vocab_size, selection=selection, codec=codec, digest_columns=names, features=features
    )
    return pa.schema(fields, metadata={METADATA_KEY: msgspec.json.encode(metadata, order="sorted")})


def shard_metadata(schema: pa.Schema, *, where: str) -> ShardMetadata:
    """Read and check what a shard says of itself.

    Raises:
        CorruptCacheError: no or broken metadata. UnsupportedVersionError: another major version or digest.
    """
    data = (schema.metadata or {}).get(METADATA_KEY)
    if data is None:
        raise CorruptCacheError(f"{where}: no kdcache metadata in the Arrow schema; not a shard of a cache")
    try:
        metadata = msgspec.json.decode(data, type=ShardMetadata)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptCacheError(f"{where}: broken kdcache metadata: {error}") from error
    if metadata.format != FORMAT_NAME:
        raise CorruptCacheError(f"{where}: format is {metadata.format!r}, expected {FORMAT_NAME!r}")
    if metadata.format_version[0] != FORMAT_VERSION[0]:
        raise UnsupportedVersionError(
            f"{where}: format version {metadata.format_version}, this kdcache reads {FORMAT_VERSION[0]}.x"
        )
    if metadata.digest != DIGEST_KIND:
        raise UnsupportedVersionError(
            f"{where}: sequences have digests of kind {metadata.digest!r}, this kdcache knows {DIGEST_KIND!r}"
        )
    try:
        check_content(metadata.vocab_size, metadata.selection, metadata.features)
    except FormatError as error:
        kind = UnsupportedVersionError if isinstance(error, UnsupportedVersionError) else CorruptCacheError
        raise kind(f"{where}: {error}") from error
    return metadata


def sequence_digest(values: Mapping[str, Any], names: Sequence[str]) -> int:
    """xxh3_64 over a sequence: for each column in order its length in bytes (uint64, little-endian) and its bytes.

    Args:
        values: column name -> bytes-like, C-contiguous little-endian array (bools as one byte each), or None for null.
        names: the columns to hash, in order: `ShardMetadata.digest_columns`.
    """
    hasher = xxhash.xxh3_64()
    for name in names:
        value = values[name]
        if value is None:
            hasher.update(NULL_LENGTH.to_bytes(8, "little"))
            continue
        view = np.ascontiguousarray(value).view(np.uint8) if isinstance(value, np.ndarray) else np.frombuffer(value, np.uint8)
        hasher.update(len(view).to_bytes(8, "little"))
        hasher.update(view.data)
    return hasher.intdigest()
