"""The rows of the loader benchmark: made once, written as plain arrays for all readers and as caches of our codecs.

A row is one sequence: N token ids (int32), and for each of its N positions K entry ids (int32, distinct) and K logprobs
(float16, falling). Entry ids are 70 % log-uniform (Zipf's law with exponent 1) and 30 % uniform over the vocabulary; an id that
a position has already is drawn again, uniformly. Logprobs: a power law with noise, a tail of 5 %.

Shape letters: S sequences, N tokens of all of them, K entries per position.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from loader_measure import Rows
from loader_scale import VOCAB_SIZE, make_identity
from numpy.typing import NDArray

from kdcache.config.loader import LoaderConfig
from kdcache.format.manifest import CodecInfo, Manifest, PlanInfo
from kdcache.format.record import NO_TARGET, SequenceRecord, TokenSequence, distributions_from_dense, sequence_key
from kdcache.loader.cache import open_cache
from kdcache.loader.loader import Loader
from kdcache.store.writing.writer import CacheWriter

LENGTHS, SEQ_LEN, BATCH_ROWS = (300, 700), 1024, 8
SHARD_SEQUENCES = 100


@dataclass(frozen=True)
class OurCodec:
    """A codec, its parameters, and whether float16 logprobs come back as they were."""

    codec_id: str
    params: dict[str, Any]
    is_lossless: bool


CODECS = {
    "raw": OurCodec("raw", {"vocab_size": VOCAB_SIZE}, True),
    "packed": OurCodec("packed", {"vocab_size": VOCAB_SIZE}, True),
    "quantized": OurCodec("quantized", {"vocab_size": VOCAB_SIZE, "bits": 8}, False),
    "quantized7": OurCodec("quantized", {"vocab_size": VOCAB_SIZE, "bits": 7}, False),
    "archive": OurCodec("archive", {"vocab_size": VOCAB_SIZE, "bits": 8}, False),
    "archive16": OurCodec("archive", {"vocab_size": VOCAB_SIZE, "bits": 16}, True),
}


def write_rows(folder: Path, num_sequences: int, k: int, seed: int = 0) -> Rows:
    """The rows as .npy files; two of them hold the same rows one after another as bytes, for the floor."""
    rng = np.random.default_rng(seed)
    lengths_S = rng.integers(LENGTHS[0], LENGTHS[1] + 1, num_sequences)
    starts_S1 = np.concatenate([[0], np.cumsum(lengths_S)])
    num_tokens = int(starts_S1[-1])
    folder.mkdir(parents=True)
    np.save(folder / "starts.npy", starts_S1)
    np.save(folder / "order.npy", rng.permutation(num_sequences))
    np.save(folder / "input_ids.npy", _zipf(rng, (num_tokens,)))
    token_ids_NK, logprobs_NK = np.empty((num_tokens, k), np.int32), np.empty((num_tokens, k), np.float16)
    for start, stop in pairwise(starts_S1):
        ids_PK, logprobs_PK = _distinct_ids(rng, int(stop - start), k), _logprobs(rng, int(stop - start), k)
        ranks_PK = np.lexsort((ids_PK, -logprobs_PK), axis=1)  # equal logprobs by rising id, as a cache keeps them
        token_ids_NK[start:stop] = np.take_along_axis(ids_PK, ranks_PK, axis=1)
        logprobs_NK[start:stop] = np.take_along_axis(logprobs_PK, ranks_PK, axis=1)
    np.save(folder / "token_ids.npy", token_ids_NK)
    np.save(folder / "logprobs.npy", logprobs_NK)
    with (folder / "raw.bin").open("wb") as file:
        for values in _raw_rows(folder, starts_S1):
            file.write(values)
    np.save(folder / "raw_starts.npy", starts_S1 * (6 * k + 4))
    return Rows.load(folder)


def write_cache(folder: Path, rows: Rows, name: str) -> None:
    """The rows as a cache of one of CODECS; the capture's record of them: tails, targets outside the support, keys, digests."""
    codec = CODECS[name]
    identity = msgspec.structs.replace(make_identity(rows.k), codec=CodecInfo(codec_id=codec.codec_id, params=codec.params))
    units = [range(at, min(at + SHARD_SEQUENCES, len(rows))) for at in range(0, len(rows), SHARD_SEQUENCES)]
    manifest = Manifest(number=0, parent=None, identity=identity, plan=PlanInfo(fingerprint="0", num_units=len(units)))
    writer = CacheWriter.open(str(folder), manifest)
    for unit, numbers in enumerate(units):
        writer.write_unit(unit, (_record(rows, number) for number in numbers))
    writer.fold()


def write_packed_floor(folder: Path, cache_folder: Path) -> None:
    """Each sequence's columns of the `packed` cache as bytes, one sequence after another."""
    lengths = [0]
    with open_cache(cache_folder) as cache, (folder / "packed.bin").open("wb") as file:
        for number in range(len(cache)):
            unit, batch, row = cache.reader.locate(number)
            views = cache.reader.record_batch(unit, batch).views.values()
            lengths.append(sum(file.write(part) for view in views if (part := view.value_bytes(row)) is not None))
    np.save(folder / "packed_starts.npy", np.cumsum(lengths))


def write_plan(folder: Path, cache_folder: Path) -> None:
    """`plan.npy`, (S, 3): batch, row and sequence of an epoch of packed batches, for readers that have no packing; and
    `shape.npy`: rows of a batch and tokens of a row."""
    with (
        open_cache(cache_folder) as cache,
        Loader(cache, LoaderConfig(seq_len=SEQ_LEN, batch_rows=BATCH_ROWS, num_threads=0)) as loader,
    ):
        plan = [
            (batch, row, int(number))
            for batch in range(len(loader))
            for row, numbers in enumerate(loader._layout.batch(batch).rows)
            for number in numbers
        ]
    np.save(folder / "plan.npy", np.array(plan, np.int64))
    np.save(folder / "shape.npy", np.array([BATCH_ROWS, SEQ_LEN]))


def _zipf(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.int32]:
    return (VOCAB_SIZE ** rng.random(shape)).astype(np.int32) - 1


def _distinct_ids(rng: np.random.Generator, num_positions: int, k: int) -> NDArray[np.int32]:
    shape = num_positions, k
    ids_PK = np.where(rng.random(shape) < 0.7, _zipf(rng, shape), rng.integers(0, VOCAB_SIZE, shape, np.int32))
    while True:
        ranks_PK = ids_PK.argsort(axis=1)
        sorted_PK = np.take_along_axis(ids_PK, ranks_PK, axis=1)
        again_PK = np.zeros(shape, bool)
        np.put_along_axis(again_PK, ranks_PK[:, 1:], sorted_PK[:, 1:] == sorted_PK[:, :-1], axis=1)
        if not again_PK.any():
            return ids_PK
        ids_PK[again_PK] = rng.integers(0, VOCAB_SIZE, int(again_PK.sum()))


def _logprobs(rng: np.random.Generator, num_positions: int, k: int) -> NDArray[np.float16]:
    slope_P1 = rng.uniform(0.8, 4, (num_positions, 1))
    logits_PK = rng.normal(0, 0.3, (num_positions, k)) - slope_P1 * np.log(np.arange(1, k + 1))
    logits_PK = -np.sort(-logits_PK, axis=1)
    return (logits_PK - np.log(np.exp(logits_PK).sum(axis=1, keepdims=True)) + np.log(0.95)).astype(np.float16)


def _raw_rows(folder: Path, starts_S1: NDArray[np.int64]) -> Iterator[bytes]:
    arrays = [np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("input_ids", "token_ids", "logprobs")]
    for start, stop in pairwise(starts_S1):
        yield b"".join(array[start:stop].tobytes() for array in arrays)


def _record(rows: Rows, number: int) -> SequenceRecord:
    ids_N, token_ids, logprobs = (np.array(values) for values in rows.row(number))
    supervised_N, num_tokens = np.ones(len(ids_N), bool), len(ids_N)
    sequence = TokenSequence(
        input_ids_N=ids_N,
        supervised_N=supervised_N,
        roles_N=np.zeros(num_tokens, np.uint8),
        turn_starts=np.zeros(1, np.int32),
        source=f"noise#{number}",
        key=sequence_key(ids_N, supervised_N, ""),
    )
    targets_P = np.append(ids_N[1:], np.int32(NO_TARGET))
    shape = num_tokens, rows.k
    distributions = distributions_from_dense(
        token_ids.reshape(shape), logprobs.reshape(shape), targets_P, np.full(num_tokens, -12.0)
    )
    return SequenceRecord(sequence, distributions)
