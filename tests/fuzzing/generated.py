"""Whole caches of random columns: any codec, selection and vocabulary, values random, zero or all ones, lengths right or off.

The rows are signed, so that every reader goes on to what the columns mean; compiled loops must give what the record path gives.
Shape letters: N tokens, P positions, E entries, X exact ones, D estimates.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hostile
import msgspec
import numpy as np
import pyarrow as pa
from fuzzing.bases import GENERATION, Base
from fuzzing.manifests import parts_of
from fuzzing.reading import findings, read_all
from fuzzing.signing import index_of, row_digests
from numpy.typing import NDArray

from kdcache.codec import get_codec
from kdcache.codec.bit_stream import pack_bits_reference, packed_size
from kdcache.codec.features.columns import feature_fields
from kdcache.format.feature_positions import num_vectors
from kdcache.format.manifest import CodecInfo, FeatureInfo, SelectionInfo
from kdcache.format.schema import DOMAIN_FIELD, FINISH_FIELD, shard_schema
from kdcache.format.selection import fixed_entries, fixed_exact, stores_num_exact

VOCABULARIES = (1, 2, 3, 64, 65, 97, 1000, 128256, 2**24, 2**25, 2**31 - 1, 2**31)
_PARAMS: dict[str, dict[str, list[Any]]] = {
    "top_k": {"k": [0, 1, 3, 5, 8, 64]},
    "top_p_k": {"p": [0.9], "k": [0, 1, 5, 8, 70]},
    "threshold": {"tau": [1.0, 0.5, 0.05, 0.003], "seed": [0]},
    "sampled": {"num_draws": [1, 2, 12, 255, 256, 65535], "seed": [0]},
    "top_k_sampled": {"k": [0, 1, 3, 8], "num_draws": [1, 9, 300], "seed": [0]},
}
_BITS = {"raw": [None], "packed": [None], "quantized": [4, 5, 6, 7, 8], "archive": [4, 5, 6, 7, 8, 16]}


@dataclass(frozen=True)
class Shape:
    """Of one sequence: what lengths of its columns follow from."""

    num_positions: int
    num_entries: int
    num_exact: int


@dataclass
class Maker:
    """Random columns of one cache.

    Attributes:
        wrong: chance that a length is off, or a value out of its range.
    """

    seed: int

    def __post_init__(self) -> None:
        self.rng, self.choose = np.random.default_rng(self.seed), random.Random(self.seed)
        self.wrong = self.choose.choice((0.0, 0.0, 0.02, 0.1))
        self.vocab_size = self.choose.choice(VOCABULARIES)
        self.selection = make_selection(self.choose)
        codec_id = self.choose.choice(("raw", "packed", "packed", "quantized", "quantized", "archive"))
        self.base = Base(codec_id, self.selection, self.choose.choice(_BITS[codec_id]), self.choose.random() < 0.3)
        self.features = tuple(self._feature(name) for name in ("last", "mid")[: self.choose.choice((0, 0, 1, 2))])
        self.supervised_N = np.zeros(0, np.bool_)
        bits = {} if self.base.bits is None else {"bits": self.base.bits}
        self.info = CodecInfo(codec_id=codec_id, params={"vocab_size": self.vocab_size, **bits})
        self.codec = get_codec(codec_id, self.info.params, self.selection)

    def _feature(self, name: str) -> FeatureInfo:
        choose, stride = self.choose.choice, self.choose.choice((1, 1, 3))
        is_attention = self.choose.random() < 0.2
        return FeatureInfo(
            name=name,
            layer=1,
            size=8 if is_attention else choose((1, 3, 8)),
            dtype="float16" if is_attention else choose(("float16", "bfloat16", "int8")),
            pooling="none" if is_attention else choose(("none", "mean", "last")),
            kind="attention" if is_attention else "hidden",
            positions=choose(("supervised", "all")),
            stride=stride,
            offset=choose((0, stride - 1)),
            max_positions=choose((None, None, 1, 5)),
            num_heads=2 if is_attention else None,
            top_keys=4 if is_attention else None,
        )

    def schema(self) -> pa.Schema:
        """Of the shard."""
        return shard_schema(
            [*self.codec.fields(), *feature_fields(self.features)],
            unit=0,
            vocab_size=self.vocab_size,
            selection=self.selection,
            codec=self.info,
            optional=[FINISH_FIELD, DOMAIN_FIELD] if self.base.everything else [],
            features=self.features,
        )

    def row(self, schema: pa.Schema) -> dict[str, Any]:
        """The values of one sequence, by column."""
        num_tokens = self.choose.choice((1, 2, 5, 12, 33, 60))
        supervised_N = self.rng.random(num_tokens) < self.choose.choice((0, 0.3, 1))
        self.supervised_N = supervised_N
        counts_P, is_null = self._counts(int(supervised_N.sum()))
        num_exact_P = self._num_exact(counts_P)
        shape = Shape(len(counts_P), int(counts_P.sum()), int(num_exact_P.sum()))
        row: dict[str, Any] = {
            "key": self.rng.bytes(16),
            "source": "made",
            "input_ids": self.rng.integers(0, self.vocab_size, num_tokens).astype(np.int32),
            "supervised": np.resize(supervised_N, self._length(num_tokens)),
            "roles": None if self._seldom(0.6) else self.rng.integers(0, 5 + 4 * self._is_wrong(), self._length(num_tokens)),
            "turn_starts": np.sort(self.rng.integers(0, num_tokens + 3 * self._is_wrong(), self.choose.choice((0, 1, 3)))),
            "num_entries": None if is_null or self._is_wrong() else np.resize(counts_P, self._length(len(counts_P))),
            "finish": self.choose.choice((0, 1, 2)) + 5 * self._is_wrong(),
            "domain": "d",
            "group": b"g" * 16,
            "preference": self.choose.choice((0, 1, 2)) + 3 * self._is_wrong(),
        }
        for field in schema:
            if field.name not in row and field.name != "digest":
                row[field.name] = self._column(field, shape, num_exact_P)
        return row

    def _counts(self, num_positions: int) -> tuple[NDArray[np.int64], bool]:
        """(P,) entries of each position, and whether the selection says them."""
        most = min(self.selection.params.get("k", 70) if self.selection.kind.startswith("top_") else 70, 70)
        fixed = fixed_entries(self.selection)
        if fixed is not None and self._seldom(0.6):
            return np.full(num_positions, fixed), True
        counts_P = self.rng.integers(0, most + 1, num_positions) if self._seldom(0.5) else np.full(num_positions, most)
        if num_positions and self._is_wrong():
            counts_P[self.rng.integers(num_positions)] = self.choose.choice((0, most + 1, 300, 65535))
        return counts_P, False

    def _num_exact(self, counts_P: NDArray[np.int64]) -> NDArray[np.int64]:
        if stores_num_exact(self.selection):
            return self.rng.integers(0, counts_P + 1)
        fixed = fixed_exact(self.selection)
        return counts_P if fixed is None else np.minimum(fixed, counts_P)

    def _column(self, field: pa.Field, shape: Shape, num_exact_P: NDArray[np.int64]) -> Any:
        """Values of a codec's column: a stream of bits, or a list."""
        if pa.types.is_large_binary(field.type):
            return self._stream(field.name, shape)
        dtype = field.type.value_type.to_pandas_dtype()
        length = self._length(self._num_values(field.name, shape))
        if field.name == "num_exact":
            return np.resize(num_exact_P, length)
        if field.name == "token_ids" and self._seldom(0.9):
            return self.rng.integers(0, self.vocab_size, length)
        if field.name == "estimate_counts" and self._seldom(0.9):
            return self.rng.integers(1, min(self.selection.params["num_draws"], np.iinfo(dtype).max) + 1, length)
        return self._values(np.dtype(dtype), length)

    def _num_values(self, name: str, shape: Shape) -> int:
        for feature in self.features:
            rows = num_vectors(feature, self.supervised_N)
            if name.startswith(f"feature:{feature.name}"):
                return rows if name.endswith(":scale") else rows * feature.size
        return {
            "token_ids": shape.num_entries,
            "logprobs": shape.num_entries if self.base.codec == "raw" else shape.num_exact,
            "log_z": shape.num_positions * len(self.selection.temperatures),
            "estimate_counts": shape.num_entries - shape.num_exact,
        }.get(name, int(self.rng.integers(shape.num_positions + 1)) if name.startswith("outside") else shape.num_positions)

    def _stream(self, name: str, shape: Shape) -> bytes:
        if name == "archive":
            return self._values(np.dtype(np.uint8), max(8, self._length(shape.num_entries))).tobytes()
        if name == "token_ids_packed":
            ids_E = self.rng.integers(0, self.vocab_size, shape.num_entries)
            stream = pack_bits_reference(ids_E.astype(np.int32), max(1, (self.vocab_size - 1).bit_length()))
            return np.resize(stream, self._length(len(stream))).tobytes() if len(stream) else b""
        width = self.base.bits or 8
        length = shape.num_exact
        if name == "estimate_counts":
            width, length = int(self.selection.params["num_draws"]).bit_length(), shape.num_entries - shape.num_exact
        return self._values(np.dtype(np.uint8), self._length(packed_size(length, width))).tobytes()

    def _values(self, dtype: np.dtype[Any], length: int) -> NDArray[Any]:
        """Random bytes, zeros, all ones, or what could be meant."""
        kind = self.choose.random()
        if kind < 0.25:
            return np.frombuffer(self.rng.bytes(length * dtype.itemsize), dtype)
        if kind < 0.4:
            return np.frombuffer((b"\0", b"\xff")[kind < 0.32] * (length * dtype.itemsize), dtype)
        return (-5 * self.rng.random(length)).astype(dtype) if dtype.kind == "f" else self.rng.integers(0, 100, length)

    def _length(self, right: int) -> int:
        wrong = (right + 1, right - 1, right * 2, 0, right + 64, right // 2, right + 8, right - 8)
        return max(0, self.choose.choice(wrong)) if self._is_wrong() else right

    def _is_wrong(self) -> bool:
        return self.choose.random() < self.wrong

    def _seldom(self, chance: float) -> bool:
        return self.choose.random() < chance


def make_selection(choose: random.Random) -> SelectionInfo:
    """Any kind of selection, with corners among its parameters."""
    kind = choose.choice(sorted(_PARAMS))
    return SelectionInfo(
        kind=kind,
        params={name: choose.choice(values) for name, values in _PARAMS[kind].items()},
        temperatures=choose.choice([(), (), (2.0,), (2.0, 0.5)]),
        entropy=choose.random() < 0.3,
    )


def trial(seed: int, folder: Path) -> list[str]:
    """Make a cache, read it in every way; gives what must not be."""
    maker = Maker(seed)
    schema = maker.schema()
    rows = [maker.row(schema) for _ in range(maker.choose.choice((1, 2, 4, 6)))]
    columns = [_array([row[field.name] for row in rows], field.type) for field in schema if field.name != "digest"]
    batch = pa.RecordBatch.from_arrays([*columns, pa.array([0] * len(rows), pa.uint64())], schema=schema)
    batch = pa.RecordBatch.from_arrays([*columns, pa.array(row_digests(schema, batch), pa.uint64())], schema=schema)
    parts = parts_of("packed everything" if maker.base.everything else "packed top_k").copy()
    identity = parts.newest["identity"]
    identity |= msgspec.to_builtins(
        {
            "selection": maker.selection,
            "codec": maker.info,
            "features": maker.features,
            "domains": maker.base.everything,
            "groups": maker.base.everything,
        }
    )
    identity["teacher"]["vocab_size"] = maker.vocab_size
    identity["generation"] = msgspec.to_builtins(GENERATION) if maker.base.everything else None
    parts.newest["plan"]["num_units"] = 1
    parts.shards = [hostile.file_bytes([batch], schema)]
    parts.index, (num_rows,) = index_of(parts.shards)
    parts.newest["shards"] = [parts.newest["shards"][0] | {"num_sequences": num_rows, "num_finished": {}}]
    return findings(read_all(parts.write(folder / "cache"), everything=seed % 4 == 0))


def _array(values: list[Any], kind: pa.DataType) -> pa.Array:
    """An Arrow column; of lists, wrapped around where a value does not fit."""
    if not pa.types.is_list(kind):
        return pa.array(values, kind)
    dtype = bool if pa.types.is_boolean(kind.value_type) else kind.value_type.to_pandas_dtype()
    lists = [np.zeros(0, dtype) if value is None else np.asarray(value).astype(dtype) for value in values]
    offsets = np.cumsum([0, *map(len, lists)]).astype(np.int32)
    missing = np.array([value is None for value in values])
    flat = pa.array(np.concatenate(lists), kind.value_type)
    return pa.ListArray.from_arrays(pa.array(offsets), flat, type=kind, mask=pa.array(missing) if missing.any() else None)
