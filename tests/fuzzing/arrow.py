"""Shards and indexes whose Arrow framing, offsets or values are changed, with rows, index and files signed anew."""

from __future__ import annotations

import random
from pathlib import Path

import hostile
import pyarrow as pa
from fuzzing import arrow_bytes
from fuzzing.bases import BASES
from fuzzing.manifests import parts_of
from fuzzing.reading import findings, read_all
from fuzzing.signing import Parts, batches_of, index_of, sign_rows

_EXTRA = {
    "x_view": lambda rows: pa.array([f"longer than twelve bytes {row}" for row in range(rows)], pa.string_view()),
    "x_list_view": lambda rows: pa.array([[1, 2]] * rows, pa.list_view(pa.int32())),
    "x_map": lambda rows: pa.array([[(1, 2)]] * rows, pa.map_(pa.int32(), pa.int32())),
    "x_runs": lambda rows: pa.RunEndEncodedArray.from_arrays(pa.array([rows], pa.int32()), pa.array([7])),
    "x_nulls": lambda rows: pa.array([[]] * rows, pa.list_(pa.null())),
    "x_fixed": lambda rows: pa.array([[1, 2]] * rows, pa.list_(pa.int8(), 2)),
    "x_decimal": lambda rows: pa.array([1] * rows, pa.decimal256(40, 2)),
    "x_struct": lambda rows: pa.array([{"a": 1}] * rows, pa.struct([("a", pa.int8())])),
    "x_bool": lambda rows: pa.array([True] * rows),
}
"""Columns of types that no shard of ours has: a later minor version may add some, and a reader leaves them alone."""


def trial(seed: int, folder: Path) -> list[str]:
    """Spoil a shard or the index, read the cache in every way; gives what must not be."""
    rng = random.Random(seed)
    parts = parts_of(rng.choice(sorted(BASES))).copy()
    number = rng.randrange(len(parts.shards))
    if rng.random() < 0.12:
        parts.index = arrow_bytes.mutated(parts.index, rng)
    else:
        if rng.random() < 0.25:
            parts.shards = [_with_more_columns(shard, rng) for shard in parts.shards]
        parts.shards[number] = sign_rows(arrow_bytes.mutated(parts.shards[number], rng))
        _index_again(parts)
    return findings(read_all(parts.write(folder / "cache"), everything=seed % 4 == 0))


def _index_again(parts: Parts) -> None:
    try:
        parts.index, numbers = index_of(parts.shards)
    except Exception:  # Arrow refuses a shard: the old index does as well as any
        return
    for shard, num_rows in zip(parts.newest["shards"], numbers, strict=True):
        shard["num_sequences"] = num_rows


def _with_more_columns(shard: bytes, rng: random.Random) -> bytes:
    schema, batches = batches_of(shard)
    chosen = [_EXTRA[name] for name in rng.sample(sorted(_EXTRA), rng.randint(1, 4))]
    names = [f"x_{place}" for place in range(len(chosen))]
    fields = [pa.field(name, make(1).type) for name, make in zip(names, chosen, strict=True)]
    schema = pa.schema([*schema, *fields], metadata=schema.metadata)
    columns = [[*batch.columns, *(make(batch.num_rows) for make in chosen)] for batch in batches]
    return hostile.file_bytes([pa.RecordBatch.from_arrays(each, schema=schema) for each in columns], schema)
