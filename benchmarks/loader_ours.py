"""kdcache's side of the loader benchmark: one cache read through the loader, or by number.

    python benchmarks/loader_ours.py loader|map|threads CODEC ROWS CACHE [--no-verify] [--logprob-dtype float16] [--seconds 0.3]
        [--rounds 3]

`loader`: batches of the loader without threads: unpacked (one sequence per row) in stored and in random order, and packed in
random order; the plan of each epoch is made within the time. `map`: `kdcache.open(...)[i]`, copied into a batch as the
baselines' rows are. `threads`: packed batches with 0, 1 and 2 prefetch threads, on as many cores as there are.
The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from loader_measure import MODES, Room, Row, Rows, check, measure, num_bytes, steps, use_one_core
from loader_rows import BATCH_ROWS, CODECS, SEQ_LEN

from kdcache.config.loader import LoaderConfig
from kdcache.loader.cache import Cache, open_cache
from kdcache.loader.loader import Loader

OPTIONS = {
    "sequential": LoaderConfig(
        seq_len=SEQ_LEN, batch_rows=2 * BATCH_ROWS, packing="none", pad_to="longest", shuffle=False, num_threads=0
    ),
    "random": LoaderConfig(seq_len=SEQ_LEN, batch_rows=2 * BATCH_ROWS, packing="none", pad_to="longest", num_threads=0),
    "packed": LoaderConfig(seq_len=SEQ_LEN, batch_rows=BATCH_ROWS, num_threads=0),
}
"""About as many tokens in an unpacked batch as in a packed one."""


class MapReader:
    """The map-style cache as the baselines are read."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache

    def get(self, numbers: list[int]) -> Iterable[Row]:
        return map(_row, self.cache.get(numbers))

    def scan(self) -> Iterable[Row]:
        return (_row(self.cache[number]) for number in range(len(self.cache)))


def _row(record: Any) -> Row:
    return record.sequence.input_ids_N, record.distributions.token_ids_E, record.distributions.logprobs_E


class LoaderReader:
    """The rows as they stand in the batches of an unshuffled epoch, one sequence each: only to be checked."""

    def __init__(self, cache: Cache, logprob_dtype: str = "float32") -> None:
        self.cache = cache
        options = LoaderConfig(seq_len=SEQ_LEN, batch_rows=1, packing="none", shuffle=False, num_threads=0)
        self.options = giving(options, logprob_dtype)

    def get(self, numbers: list[int]) -> Iterable[Row]:
        options = self.options
        with Loader(self.cache.select(numbers), options) as loader:
            yield from (
                (batch.input_ids_BT[0, : batch.num_tokens], batch.teacher.token_ids_PK, batch.teacher.logprobs_PK)
                for batch in loader
            )

    def scan(self) -> Iterable[Row]:
        return self.get(list(range(len(self.cache))))


def giving(options: LoaderConfig, logprob_dtype: str) -> LoaderConfig:
    """The options with logprobs of this dtype."""
    return msgspec.structs.replace(options, logprob_dtype=logprob_dtype)


def epoch(loader: Loader) -> Callable[[], Iterator[int]]:
    """Tokens of each batch of the epoch, or of the rest of one that was left in the middle."""
    return lambda: (batch.num_tokens for batch in loader)


def modes(kind: str, cache: Cache, rows: Rows, logprob_dtype: str = "float32") -> dict[str, Callable[[], Iterator[int]]]:
    if kind == "map":
        reader, room = MapReader(cache), Room(BATCH_ROWS, SEQ_LEN, rows.k, np.float32)
        return {mode: (lambda mode=mode: steps(mode, reader, rows, room)) for mode in MODES}
    if kind == "loader":
        return {mode: epoch(Loader(cache, giving(options, logprob_dtype))) for mode, options in OPTIONS.items()}
    options = giving(OPTIONS["packed"], logprob_dtype)
    return {str(n): epoch(Loader(cache, msgspec.structs.replace(options, num_threads=n))) for n in (0, 1, 2)}


def result(arguments: argparse.Namespace) -> dict[str, Any]:
    rows = Rows.load(arguments.rows)
    with open_cache(arguments.cache, verify=arguments.verify) as cache:
        if CODECS[arguments.codec].is_lossless:
            check(MapReader(cache) if arguments.kind == "map" else LoaderReader(cache, arguments.logprob_dtype), rows)
        if arguments.kind != "threads":
            use_one_core()
        readers = modes(arguments.kind, cache, rows, arguments.logprob_dtype)
        passes = measure(readers, rows, arguments.seconds, arguments.rounds)
    about = {"checked": "each row's digest" if arguments.verify else "off", "is_lossless": CODECS[arguments.codec].is_lossless}
    return about | {
        "bytes": num_bytes(arguments.cache),
        "tokens": rows.num_tokens,
        "dtype": arguments.logprob_dtype,
        "passes": passes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("loader", "map", "threads"))
    parser.add_argument("codec", choices=CODECS)
    parser.add_argument("rows", type=Path)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--no-verify", dest="verify", action="store_false")
    parser.add_argument("--logprob-dtype", choices=("float32", "float16"), default="float32", help="not of map")
    parser.add_argument("--seconds", type=float, default=0.3)
    parser.add_argument("--rounds", type=int, default=3)
    print(json.dumps(result(parser.parse_args())), flush=True)


if __name__ == "__main__":
    main()
