"""How soon does a loader give its first batch, and how much memory does it hold, from ten thousand to ten million sequences?

Method: a real shard of a thousand sequences (`packed`, --k entries a position), and an index that names its rows again and
again until there are as many sequences as asked for; data and index are read as those of any cache. For each size a fresh
process opens the cache, makes a loader and reads --batches batches of a shuffled epoch; then another resumes in the middle of
it, which has to pack all blocks of rows in front of that place.

"open" is `kdcache.open` (the whole index is hashed), "first batch" from the call of `Loader` until it is there; imports are not
counted. "own memory" (RssAnon) is what the process has allocated; "mapped" (RssFile) are pages of files it has looked at, which
all processes of a machine share and the kernel takes back when it needs them. Both are less what they were before the cache was
opened. Wall seconds of one process.

    python benchmarks/loader_scale.py [--sequences 10000 100000 1000000 10000000] [--k 16] [--batches 50] [--folder DIR]

The table goes to stdout as Markdown; numbers quoted elsewhere come from a run of this file.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa

from kdcache.config.loader import LoaderConfig
from kdcache.format import paths
from kdcache.format.manifest import (
    CodecInfo,
    Identity,
    IndexInfo,
    Manifest,
    PlanInfo,
    SelectionInfo,
    TeacherIdentity,
    TokenizerIdentity,
)
from kdcache.format.record import Distributions, SequenceRecord, TokenSequence, sequence_key
from kdcache.loader.cache import open_cache
from kdcache.loader.loader import Loader
from kdcache.store import chain
from kdcache.store.index import open_index
from kdcache.store.writing.writer import CacheWriter

VOCAB_SIZE, SHARD_SEQUENCES, LENGTHS = 151_936, 1000, (16, 64)
OPTIONS = LoaderConfig(seq_len=256, batch_rows=8, num_threads=1)


def make_record(number: int, k: int, lengths: tuple[int, int] = LENGTHS) -> SequenceRecord:
    """A sequence of noise with a number of tokens between two, supervised everywhere."""
    rng = np.random.default_rng(number)
    num_tokens = int(rng.integers(lengths[0], lengths[1] + 1))
    ids_N, supervised_N = rng.integers(0, VOCAB_SIZE // 2, num_tokens).astype(np.int32), np.ones(num_tokens, bool)
    sequence = TokenSequence(
        input_ids_N=ids_N,
        supervised_N=supervised_N,
        roles_N=np.zeros(num_tokens, np.uint8),
        turn_starts=np.zeros(1, np.int32),
        source=f"noise#{number}",
        key=sequence_key(ids_N, supervised_N, ""),
    )
    distributions = Distributions(
        # In the upper half of the vocabulary, so that no target is among them.
        token_ids_E=(VOCAB_SIZE // 2 + np.tile(np.arange(k), num_tokens)).astype(np.int32),
        logprobs_E=-np.sort(rng.exponential(3, (num_tokens, k)) + 3, axis=1).astype(np.float32).reshape(-1),
        offsets_P1=np.arange(num_tokens + 1, dtype=np.int64) * k,
        tail_mass_P=np.full(num_tokens, 0.1, np.float32),
        outside_target_logprobs=np.full(num_tokens - 1, -9, np.float32),
    )
    return SequenceRecord(sequence, distributions)


def make_identity(k: int) -> Identity:
    """What the caches of these benchmarks say of themselves."""
    return Identity(
        teacher=TeacherIdentity(
            model="noise",
            architecture="None",
            vocab_size=VOCAB_SIZE,
            dtype="float32",
            engine="fake",
            engine_version="0",
            context_length=4096,
        ),
        tokenizer=TokenizerIdentity(name="noise", fingerprint="0", vocab_size=VOCAB_SIZE),
        selection=SelectionInfo(kind="top_k", params={"k": k}),
        codec=CodecInfo(codec_id="packed", params={"vocab_size": VOCAB_SIZE}),
        input_fingerprint="0",
    )


def make_cache(folder: Path, num_sequences: int, k: int) -> None:
    """A cache whose index has num_sequences rows, all of them of the one shard that there is."""
    identity = make_identity(k)
    empty = Manifest(number=0, parent=None, identity=identity, plan=PlanInfo(fingerprint="0", num_units=1))
    writer = CacheWriter.open(folder, empty)
    writer.write_unit(0, [make_record(number, k) for number in range(SHARD_SEQUENCES)])
    writer.fold()
    newest = chain.newest_manifest(folder)
    index = open_index(folder, newest.index)
    rows = index.take(pa.array(np.arange(num_sequences) % SHARD_SEQUENCES)).combine_chunks()
    temporary = folder / "index.arrow"
    with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, rows.schema) as file:
        file.write_table(rows)
    sha256 = hashlib.file_digest(temporary.open("rb"), "sha256").hexdigest()
    temporary.rename(folder / paths.index_name(sha256))
    shard = msgspec.structs.replace(newest.shards[0], num_sequences=num_sequences)
    manifest = Manifest(
        number=newest.number + 1,
        parent=newest.digest,
        identity=identity,
        plan=newest.plan,
        shards=(shard,),
        index=IndexInfo(name=paths.index_name(sha256), sha256=sha256),
    )
    if not chain.add_manifest(folder, manifest):
        raise RuntimeError(f"{folder} has manifest {manifest.number} already")


def memory() -> dict[str, float]:
    """MiB that this process has allocated, and of files that it has mapped and looked at."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(fields[name].split()[0]) / 1024 for name in ("RssAnon", "RssFile")}


def measure(folder: Path, num_batches: int, state: dict[str, object] | None) -> dict[str, object]:
    """What one process sees: seconds, MiB, and the state in the middle of the epoch where none is given."""
    before, start = memory(), time.perf_counter()
    with open_cache(folder) as cache:
        opened = time.perf_counter()
        with Loader(cache, OPTIONS) as loader:
            if state is not None:
                loader.load_state_dict(state)
            batches = iter(loader)
            next(batches)
            first = time.perf_counter()
            for _ in range(num_batches - 1):
                next(batches, None)
            after = memory()
            middle = {"next_batch": int(cache.num_tokens_S.sum(dtype=np.int64)) // (OPTIONS.seq_len * OPTIONS.batch_rows) // 2}
            return {
                "open": opened - start,
                "first": first - opened,
                "state": loader.state_dict() | middle,
                **{name: after[name] - before[name] for name in after},
            }


def warm_up(folder: Path) -> None:
    """Import and compile what reading needs, with a cache of its own."""
    make_cache(folder, SHARD_SEQUENCES, 2)
    measure(folder, 3, None)


def in_fresh_process(folder: Path, num_batches: int, state: object) -> dict[str, object]:
    command = [sys.executable, __file__, "--child", str(folder), "--batches", str(num_batches), "--state", json.dumps(state)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def rows(arguments: argparse.Namespace, folder: Path) -> Iterator[str]:
    yield "| sequences | open s | first batch s | own memory MiB | mapped MiB | first batch after a resume in the middle s |"
    yield "|---:|---:|---:|---:|---:|---:|"
    for num_sequences in arguments.sequences:
        cache = folder / str(num_sequences)
        make_cache(cache, num_sequences, arguments.k)
        new = in_fresh_process(cache, arguments.batches, None)
        resumed = in_fresh_process(cache, 1, new["state"])
        cells = [f"{num_sequences:,}", *(f"{new[n]:.2f}" for n in ("open", "first"))]
        cells += [f"{new[n]:.0f}" for n in ("RssAnon", "RssFile")]
        yield f"| {' | '.join(cells)} | {resumed['first']:.2f} |"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, nargs="+", default=[10**4, 10**5, 10**6, 10**7])
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--batches", type=int, default=50)
    parser.add_argument("--folder", help="where the caches are made; a temporary folder by default")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--state", default="null", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        if arguments.child:
            warm_up(Path(temporary) / "warm")
            print(json.dumps(measure(Path(arguments.child), arguments.batches, json.loads(arguments.state))))
            return
        for line in rows(arguments, Path(temporary)):
            print(line, flush=True)


if __name__ == "__main__":
    main()
