"""Where do the plan, the fold and the resume of a capture stop being linear, at a thousand workers and up to a million units?

Method: no engine. The plan is made of one-character items, one to a unit. A cache gets a journal record for each unit and a
real shard of one sequence (hard links to one file: only its size and its small columns are read). Units are journalled in the
order in which a thousand ranks in step would finish them; rank 0 folds whenever a capture would, and the last rank at the end.
"sum of folds" is all the folding of the whole capture, "last look" what each rank pays at its end to find out whether it is
the last. Beside each figure stands its growth per unit since the row above: x1.00 is linear. CPU seconds of this process.

With --efficiency: wall time of the same capture by one process and by two static ranks at once, for a teacher that only waits
(as for a GPU) and for the fake teacher, which needs a CPU core of its own. Processes are started first and wait for each other;
the best of several rounds.

    python benchmarks/planner.py [--units 1000 10000 100000] [--ranks 1000] [--folder /dev/shm] [--efficiency]

The tables go to stdout as Markdown; numbers quoted elsewhere come from a run of this file.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import msgspec
import numpy as np

from kdcache.capture.executors.run import run_capture
from kdcache.capture.executors.tally import own_units, units_before_fold
from kdcache.capture.plan import Plan, make_plan
from kdcache.config.capture import CaptureConfig, InputConfig, RunConfig
from kdcache.config.load import convert_config
from kdcache.format import paths
from kdcache.format.manifest import Manifest, ShardInfo, shard_to_json
from kdcache.inputs.content import Item, Start
from kdcache.store import chain
from kdcache.store.reader import open_reader
from kdcache.store.writing.writer import CacheWriter
from kdcache.teacher.fake import FakeBackend, FakeTeacher

MAX_LINKS = 50_000
"""Hard links to one file: some file systems allow 65,000."""

WAIT_SECONDS_PER_SEQUENCE = 0.02


@dataclass
class Row:
    """CPU seconds of each step at one number of units; bytes where the name says so."""

    plan: float = 0.0
    own_units: float = 0.0
    sum_of_folds: float = 0.0
    last_fold: float = 0.0
    last_look: float = 0.0
    resume: float = 0.0
    open_reader: float = 0.0
    num_folds: int = 0
    manifests_bytes: int = 0
    newest_manifest_bytes: int = 0


def items(count: int) -> Iterator[Item]:
    return (Item("x", f"a:{n}", Start(0, 2 * n, n)) for n in range(count))


def simulate(num_units: int, num_ranks: int, folder: Path) -> Row:
    row = Row()
    with timed(row, "plan"):
        config = InputConfig(format="lines", paths=("a",))
        plan = make_plan(items(num_units), config=config, template_fingerprint="", unit_chars=1, unit_items=1)
    with timed(row, "own_units"):
        owned = [own_units(plan, RunConfig(rank=rank, world_size=num_ranks)) for rank in range(num_ranks)]
    assert sum(map(len, owned)) == num_units
    writer, template = start_cache(folder, plan)
    shards = Links(folder, template)
    done = folded = 0
    finished = finishing_order(num_units, num_ranks)
    while done < num_units:
        upto = min(num_units, max(done + 1, next_fold(folded, num_ranks)))
        for unit in finished[done:upto]:
            shards.add(int(unit))
        done = folded = upto
        with timed(row, "sum_of_folds"), timed(row, "last_fold", fresh=True):
            manifest = writer.fold()
        row.num_folds += 1
    assert manifest.is_complete
    with timed(row, "last_look"):
        assert len({paths.parse_journal_name(name) for name in os.listdir(folder / paths.JOURNAL)}) == num_units
    with timed(row, "resume"):
        assert len(writer.published_units()) == num_units
    with timed(row, "open_reader"), open_reader(folder) as reader:
        assert len(reader) == num_units
    sizes = [path.stat().st_size for path in (folder / paths.MANIFESTS).iterdir()]
    row.manifests_bytes, row.newest_manifest_bytes = sum(sizes), max(sizes)
    return row


def next_fold(folded: int, num_ranks: int) -> int:
    """Units in all when rank 0 folds next: all ranks go in step."""
    return folded + num_ranks * math.ceil(units_before_fold(folded) / num_ranks)


def finishing_order(num_units: int, num_ranks: int) -> np.ndarray:
    """Round by round, the ranks of each round in some order."""
    rng = np.random.default_rng(0)
    rounds = [np.arange(start, min(start + num_ranks, num_units)) for start in range(0, num_units, num_ranks)]
    return np.concatenate([rng.permutation(units) for units in rounds])


def start_cache(folder: Path, plan: Plan) -> tuple[CacheWriter, ShardInfo]:
    """An empty cache for the plan, and a shard of one sequence as a capture would have made it."""
    manifest = captured(folder.with_name(f"{folder.name}-template"))
    first = msgspec.structs.replace(
        manifest, number=0, parent=None, shards=(), index=None,
        plan=msgspec.structs.replace(manifest.plan, fingerprint=plan.fingerprint, num_units=len(plan.units)),
    )  # fmt: skip
    return CacheWriter.open(folder, first), manifest.shards[0]


def captured(folder: Path) -> Manifest:
    folder.mkdir()
    (folder / "a.txt").write_text("x\n")
    manifest = run_capture(make_config(folder, unit_items=1)).manifest
    return manifest


class Links:
    """Publishes units by linking their shards to a template."""

    def __init__(self, folder: Path, template: ShardInfo) -> None:
        self.folder, self.template, self.count = folder, template, 0
        self.source = folder.with_name(f"{folder.name}-template") / "cache" / template.name

    def add(self, unit: int) -> None:
        shard = msgspec.structs.replace(self.template, unit=unit, name=paths.shard_name(unit, self.template.sha256))
        if self.count and self.count % MAX_LINKS == 0:
            self.source = Path(shutil.copy(self.source, self.source.with_suffix(f".{self.count}")))
        os.link(self.source, self.folder / shard.name)
        (self.folder / paths.journal_name(unit, shard.sha256)).write_bytes(shard_to_json(shard))
        self.count += 1


def make_config(folder: Path, *, unit_items: int, **run: int) -> CaptureConfig:
    return convert_config(
        {
            "input": {"format": "lines", "paths": [str(folder / "a.txt")]},
            "teacher": {"model": "fake", "backend": "fake"},
            "out": str(folder / "cache"),
            "shards": {"unit_items": unit_items},
            "run": run,
        },
        CaptureConfig,
    )


class WaitingTeacher(FakeTeacher):
    """The fake teacher at the speed of a device that this machine does not have."""

    def score(self, sequences, selection, features=()):
        for answer in super().score(sequences, selection, features):
            time.sleep(WAIT_SECONDS_PER_SEQUENCE)
            yield answer


class WaitingBackend(FakeBackend):
    """The backend of `WaitingTeacher`."""

    teacher = "benchmark_planner:WaitingTeacher"


def capture_rank(folder: Path, rank: int, world_size: int, kind: str, start: object) -> None:
    """One process of an efficiency run."""
    if kind == "waiting":
        from kdcache import teacher

        teacher.BACKENDS["fake"] = "benchmark_planner:WaitingBackend"
        import sys

        sys.modules["benchmark_planner"] = sys.modules[__name__]
    warm = folder / f"warm-{rank}"
    captured(warm)  # imports and compiles what there is
    start.wait()  # pyright: ignore[reportAttributeAccessIssue]
    run_capture(make_config(folder, unit_items=8, rank=rank, world_size=world_size))


def wall_seconds(folder: Path, world_size: int, kind: str) -> float:
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(world_size + 1)
    (folder / "a.txt").write_text("".join(f"{n} " + "many words " * 20 + "\n" for n in range(400)))
    processes = [
        context.Process(target=capture_rank, args=(folder, rank, world_size, kind, start)) for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    start.wait()
    started = time.perf_counter()
    for process in processes:
        process.join()
    assert chain.newest_manifest(folder / "cache").is_complete
    return time.perf_counter() - started


class timed:
    """Adds the block's CPU seconds to a field of a row."""

    def __init__(self, row: Row, field: str, *, fresh: bool = False) -> None:
        self.row, self.field, self.fresh = row, field, fresh

    def __enter__(self) -> None:
        self.started = time.process_time()

    def __exit__(self, *_: object) -> None:
        before = 0.0 if self.fresh else getattr(self.row, self.field)
        setattr(self.row, self.field, before + time.process_time() - self.started)


def print_scaling(units: Sequence[int], rows: Sequence[Row]) -> None:
    names = [field.name for field in fields(Row)]
    print("| units | " + " | ".join(name.replace("_", " ") for name in names) + " |")
    print("|---:|" + "---:|" * len(names))
    for place, (count, row) in enumerate(zip(units, rows, strict=True)):
        print(f"| {count:,} | " + " | ".join(_cell(name, row, count, rows, units, place) for name in names) + " |")


def _cell(name: str, row: Row, count: int, rows: Sequence[Row], units: Sequence[int], place: int) -> str:
    value = getattr(row, name)
    if name == "num_folds":
        return str(value)
    shown = f"{value / 1e6:,.1f} MB" if name.endswith("bytes") else f"{value:.3f} s"
    before = getattr(rows[place - 1], name) / units[place - 1] if place else 0
    return shown if before <= 0 else f"{shown} (x{value / count / before:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", type=int, nargs="*", default=[1000, 10_000, 100_000])
    parser.add_argument("--ranks", type=int, default=1000)
    parser.add_argument("--folder", type=Path, default=None, help="where the caches are made; a memory file system measures us")
    parser.add_argument("--efficiency", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    rows = []
    for count in args.units:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            rows.append(simulate(count, args.ranks, Path(folder) / "simulated"))
    if rows:
        print_scaling(args.units, rows)
    if args.efficiency:
        print("\n| teacher | one process | two ranks | efficiency |\n|---|---:|---:|---:|")
        for kind in ("waiting", "fake"):
            best = {}
            for world_size in (1, 2) * args.rounds:
                with tempfile.TemporaryDirectory(dir=args.folder) as folder:
                    seconds = wall_seconds(Path(folder), world_size, kind)
                best[world_size] = min(seconds, best.get(world_size, seconds))
            print(f"| {kind} | {best[1]:.2f} s | {best[2]:.2f} s | {best[1] / best[2] / 2:.2f} |")


if __name__ == "__main__":
    main()
