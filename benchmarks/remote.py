"""What does it cost a loader to read its cache from an object store, and how much is asked for twice?

Method: one cache of made-up records, on a disk and in a store in this process's memory, in which every request waits
`--latency` milliseconds (threads wait side by side, so this is latency and not bandwidth). One epoch of the loader from each,
in both orders: tokens per second and per CPU second of this process, requests for data, and bytes asked for as a multiple of
the cache's own. `memory`: record batches are kept in memory, `--share` of the cache; `blocks, cold` and `warm`: the first and
the second epoch with a folder that holds `--share` of it. Where that is too little for the look-ahead, it is refused, as it
should be: an order over the whole cache wants all of it. A real store's bandwidth is not in it: give an empty
`--uri s3://bucket/prefix`, which is filled, to measure that.

    python benchmarks/remote.py [--units 16] [--sequences 200] [--latency 30] [--uri memory://benchmark/cache]

The table goes to stdout as Markdown; numbers quoted elsewhere come from a run of this file.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from cache_making import make_identity, make_manifest, make_sequence

from kdcache.config.loader import LoaderConfig
from kdcache.config.remote import RemoteConfig
from kdcache.errors import ConfigError
from kdcache.format.record import NO_TARGET, Distributions, SequenceRecord
from kdcache.loader.cache import open_cache
from kdcache.loader.loader import Loader
from kdcache.store.files._fsspec import ObjectStore
from kdcache.store.files.location import locate
from kdcache.store.writing.writer import CacheWriter

VOCAB_SIZE, K, NUM_TOKENS = 32_000, 64, 500


class Meter:
    """Counts a store's reads of data and makes all its requests wait."""

    def __init__(self, latency: float) -> None:
        self.latency, self.num_requests, self.num_bytes = latency, 0, 0
        self._read, self._request = ObjectStore.read, ObjectStore._request
        meter = self

        def request(store: ObjectStore, *args, **kwargs):
            time.sleep(meter.latency)
            return meter._request(store, *args, **kwargs)

        def read(store: ObjectStore, uri: str, start: int, stop: int, seconds: float) -> bytes:
            if "/data/" in uri:
                meter.num_requests, meter.num_bytes = meter.num_requests + 1, meter.num_bytes + stop - start
            return meter._read(store, uri, start, stop, seconds)

        ObjectStore.read, ObjectStore._request = read, request  # type: ignore[method-assign]


def make_record(seed: int) -> SequenceRecord:
    """K ids, one from each K-th of the vocabulary, with falling logprobs."""
    sequence, rng = make_sequence(seed, num_tokens=NUM_TOKENS, vocab_size=VOCAB_SIZE), np.random.default_rng((seed, 2))
    targets_P = sequence.target_ids_P
    step = VOCAB_SIZE // K
    ids_PK = np.sort(rng.integers(0, step, (len(targets_P), K)) + np.arange(K) * step, axis=1).astype(np.int32)
    logprobs_PK = -np.sort(rng.exponential(2.0, (len(targets_P), K)), axis=1).astype(np.float32) - np.float32(4.5)
    is_outside_P = ~(ids_PK == targets_P[:, None]).any(axis=1) & (targets_P != NO_TARGET)
    distributions = Distributions(
        token_ids_E=ids_PK.ravel(),
        logprobs_E=logprobs_PK.ravel(),
        offsets_P1=np.arange(len(targets_P) + 1, dtype=np.int64) * K,
        tail_mass_P=np.clip(1 - np.exp(logprobs_PK).sum(axis=1), 0, 1).astype(np.float32),
        outside_target_logprobs=np.full(int(is_outside_P.sum()), -12.0, np.float32),
    )
    return SequenceRecord(sequence, distributions)


def make_cache(folder: Path, num_units: int, num_sequences: int) -> int:
    """Write it; gives the bytes of its shards."""
    identity = make_identity("packed", vocab_size=VOCAB_SIZE, k=K)
    writer = CacheWriter.open(folder, make_manifest(num_units, identity), record_batch_bytes=2**20)
    for unit in range(num_units):
        writer.write_unit(unit, (make_record(unit * num_sequences + i) for i in range(num_sequences)))
    return int(writer.fold().total("num_bytes"))


def copy(folder: Path, uri: str) -> None:
    for path in sorted(folder.rglob("*.*")):
        if path.is_file():
            (locate(uri) / path.relative_to(folder).as_posix()).write_bytes(path.read_bytes())  # type: ignore[union-attr]


def measure(name: str, uri: str, order: str, meter: Meter, num_bytes: int, remote: RemoteConfig | None = None) -> None:
    """One epoch, and its line of the table."""
    meter.num_requests = meter.num_bytes = 0
    options = LoaderConfig(seq_len=2048, batch_rows=4, packing_buffer=64, order=order, local_shards=4)  # type: ignore[arg-type]
    with open_cache(uri, remote=remote) as cache, Loader(cache, options) as loader:
        wall, cpu, num_tokens = time.perf_counter(), time.process_time(), int(cache.num_tokens_S.sum())
        try:
            for _ in loader:
                pass
        except ConfigError as error:
            print(
                f"| {order} | {name} | refused: {str(error).partition(' bytes: ')[0].rpartition(' ')[2]} bytes wanted | | | |"
            )
            return
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    share = meter.num_bytes / num_bytes
    rates = f"{num_tokens / wall / 1e6:.2f} | {num_tokens / cpu / 1e6:.2f}"
    print(f"| {order} | {name} | {rates} | {meter.num_requests} | {share:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", type=int, default=16)
    parser.add_argument("--sequences", type=int, default=200)
    parser.add_argument("--latency", type=float, default=30.0, help="milliseconds")
    parser.add_argument("--share", type=float, default=0.6)
    parser.add_argument("--uri", default="memory://benchmark/cache")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temp:
        folder = Path(temp) / "cache"
        num_bytes = make_cache(folder, args.units, args.sequences)
        copy(folder, args.uri)
        meter = Meter(args.latency / 1000)
        print(f"{args.units} shards of {num_bytes / args.units / 2**20:.1f} MiB at {args.uri}, {args.latency:g} ms a request\n")
        print("| order | from | Mtokens/s | Mtokens/CPU-s | requests | bytes asked for |\n|---|---|---|---|---|---|")
        for order in ("global", "local"):
            measure("disk", str(folder), order, meter, num_bytes)
            measure("memory", args.uri, order, meter, num_bytes, RemoteConfig(memory_bytes=int(num_bytes * args.share)))
            blocks = RemoteConfig(block_dir=f"{temp}/blocks-{order}", block_bytes=int(num_bytes * args.share))
            for state in ("cold", "warm"):
                measure(f"blocks, {state}", args.uri, order, meter, num_bytes, blocks)


if __name__ == "__main__":
    main()
