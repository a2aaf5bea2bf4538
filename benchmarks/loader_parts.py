"""Where does the time of a packed batch go: finding and checking rows, decoding them, placing tokens, or the plan?

Method: a cache of noise in the `packed` profile (--sequences of 300 to 700 tokens, K = --k), read in the epoch's shuffled
order from the page cache, no threads. First whole epochs, best of --rounds, in CPU seconds of this process: with logprobs in
float32 and in float16, without the digests, and record by record, as caches in object stores are read. Beside them as many
tokens, 6 K + 4 bytes each, copied from a memory map, sequence by sequence in random order, into one batch's room: the floor.
Then each step by itself, on one record of middle length, called again and again: its data is in the processor's caches there,
so the steps add up to less than the epoch. Last the epoch with threads, in wall seconds.

    python benchmarks/loader_parts.py [--sequences 400] [--k 64] [--rounds 5] [--threads 1 2 4] [--folder DIR]

The tables go to stdout as Markdown; numbers quoted elsewhere come from a run of this file.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from loader_scale import make_identity, make_record
from numpy.typing import NDArray

from kdcache.codec.base import EntryArrays
from kdcache.config.loader import LoaderConfig
from kdcache.format.manifest import Manifest, PlanInfo
from kdcache.loader.base import Reader
from kdcache.loader.batches.assemble import BatchLayout, assemble
from kdcache.loader.batches.buffers import BufferPool
from kdcache.loader.batches.mask import choose
from kdcache.loader.cache import Cache, cache_of, open_cache
from kdcache.loader.caches import CacheSet
from kdcache.loader.loader import Loader
from kdcache.loader.read import read_mapped
from kdcache.store.records.batch import digest_of
from kdcache.store.records.column_view import ColumnView
from kdcache.store.records.numba_xxh3 import sequence_digests
from kdcache.store.writing.writer import CacheWriter

SEQ_LEN, BATCH_ROWS, LENGTHS = 1024, 8, (300, 700)


def write(folder: Path, num_sequences: int, k: int) -> None:
    """A cache of one shard."""
    manifest = Manifest(number=0, parent=None, identity=make_identity(k), plan=PlanInfo(fingerprint="0", num_units=1))
    writer = CacheWriter.open(folder, manifest)
    writer.write_unit(0, [make_record(number, k, LENGTHS) for number in range(num_sequences)])
    writer.fold()


class RecordByRecord:
    """A reader whose sequences are not to be mapped, so that batches are assembled from records."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    def __len__(self) -> int:
        return len(self._reader)

    def mapped(self, _: NDArray[np.int64]) -> None:
        return None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)


def epoch_seconds(
    cache: Any, num_threads: int, clock: Callable[[], float], rounds: int, logprob_dtype: Any = "float32"
) -> float:
    """Of the fastest of some epochs, each with a plan and an order of its own, after one to warm up."""
    options = LoaderConfig(seq_len=SEQ_LEN, batch_rows=BATCH_ROWS, num_threads=num_threads, logprob_dtype=logprob_dtype)
    with Loader(cache, options) as loader:
        seconds = []
        for _ in range(rounds + 1):
            start = clock()
            for _ in loader:
                pass
            seconds.append(clock() - start)
    return min(seconds[1:])


def copy_seconds(cache: Cache, folder: Path, k: int, rounds: int) -> float:
    """Of copying ids and float16 logprobs of as many tokens from a memory map."""
    bytes_per_token = 6 * k + 4
    lengths_S = cache.num_tokens_S.astype(np.int64) * bytes_per_token
    starts_S = np.cumsum(lengths_S) - lengths_S
    np.random.default_rng(0).integers(0, 255, int(lengths_S.sum()), np.uint8).tofile(folder / "raw")
    data, room = np.memmap(folder / "raw", np.uint8, "r"), np.empty(SEQ_LEN * BATCH_ROWS * bytes_per_token, np.uint8)
    order, seconds = np.random.default_rng(1).permutation(len(lengths_S)), []
    for _ in range(rounds + 1):
        start, filled = time.process_time(), 0
        for s in order:
            filled = 0 if filled + lengths_S[s] > len(room) else filled
            room[filled : filled + lengths_S[s]] = data[starts_S[s] : starts_S[s] + lengths_S[s]]
            filled += lengths_S[s]
        seconds.append(time.process_time() - start)
    return min(seconds[1:])


def step_seconds(function: Callable[[], object], rounds: int, calls: int = 200) -> float:
    function()
    seconds = []
    for _ in range(rounds):
        start = time.process_time()
        for _ in range(calls):
            function()
        seconds.append((time.process_time() - start) / calls)
    return min(seconds)


def steps(cache: Cache, rounds: int) -> Iterator[tuple[str, float, int]]:
    """Name, CPU seconds and tokens of each step."""
    number = int(np.argsort(cache.num_tokens_S)[len(cache) // 2])
    caches, pool = CacheSet(cache), BufferPool(8)
    unit, batch, row = cache.reader.locate(number)
    reader = cache.reader.record_batch(unit, batch)
    record = reader.encoded(row)
    layout = BatchLayout((1,), SEQ_LEN, caches.columns)
    out = assemble([record], layout, pool)
    arrays = EntryArrays(out.teacher.token_ids_PK, out.teacher.logprobs_PK, out.teacher.tail_mass_P)
    views = list(reader.views.values())
    parts_1C2 = np.array([value_of(view, row) for view in views], np.int64)[None]
    rows = [np.array([number])]
    found: dict[str, Callable[[], object]] = {
        "batch of this row by its addresses": lambda: read_mapped(caches, rows, layout, pool),
        "- of which its digest, compiled": lambda: sequence_digests(parts_1C2),
        "record found and checked": lambda: caches.record(number),
        "- of which its digest": lambda: digest_of([view.value_bytes(row) for view in views]),
        "batch of this record": lambda: assemble([record], layout, pool),
        "- of which entries decoded": lambda: record.codec.decode_many_into([record.decode_task(arrays)]),
        "- of which the mask": lambda: choose(record.sequence, layout.mask),
    }
    for name, function in found.items():
        yield name, step_seconds(function, rounds), record.sequence.num_tokens


def value_of(view: ColumnView, row: int) -> tuple[int, int]:
    """Address and bytes of a row's value."""
    addresses_S, num_bytes_S = view.addresses()
    return int(addresses_S[row]), int(num_bytes_S[row])


def epochs(cache: Cache, folder: Path, rounds: int) -> Iterator[tuple[str, float]]:
    """Name and seconds of each way to read an epoch."""
    clock = time.process_time
    yield "epoch of packed batches, verified", epoch_seconds(cache, 0, clock, rounds)
    yield "- with logprobs in float16", epoch_seconds(cache, 0, clock, rounds, "float16")
    yield "- record by record", epoch_seconds(cache_of(cast("Reader", RecordByRecord(cache.reader))), 0, clock, rounds)
    with open_cache(folder / "cache", verify=False) as unchecked:
        yield "- without digests", epoch_seconds(unchecked, 0, clock, rounds)
        yield "- without digests, in float16", epoch_seconds(unchecked, 0, clock, rounds, "float16")


def lines(arguments: argparse.Namespace, folder: Path) -> Iterator[str]:
    write(folder / "cache", arguments.sequences, arguments.k)
    with open_cache(folder / "cache") as cache:
        num_tokens = int(cache.num_tokens_S.sum())
        floor = copy_seconds(cache, folder, arguments.k, arguments.rounds)
        yield "| per CPU second | million tokens | ns per token |"
        yield "|---|---:|---:|"
        for name, seconds in (*epochs(cache, folder, arguments.rounds), ("copy from a memory map", floor)):
            yield f"| {name} | {num_tokens / seconds / 1e6:.1f} | {seconds / num_tokens * 1e9:.0f} |"
        yield "\n| step, one record again and again | us | ns per token |\n|---|---:|---:|"
        for name, seconds, tokens in steps(cache, arguments.rounds):
            yield f"| {name} | {seconds * 1e6:.1f} | {seconds / tokens * 1e9:.0f} |"
        yield "\n| threads | million tokens per wall second |\n|---:|---:|"
        for num_threads in arguments.threads:
            seconds = epoch_seconds(cache, num_threads, time.perf_counter, arguments.rounds)
            yield f"| {num_threads} | {num_tokens / seconds / 1e6:.1f} |"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=400)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--folder", help="where the cache is made; a temporary folder by default")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        for line in lines(arguments, Path(temporary)):
            print(line, flush=True)


if __name__ == "__main__":
    main()
