"""Run by test_crash.py in a process of its own: writes a small cache in forks of itself, each really killed at one fault point.

Standard input: JSON with `folder` (an empty one), `store` (null: the caches are in the folder; a URI: in that store), and
`occurrences` (of each point: `every`, `some`, the first, the middle and the last, or `one`, the middle). Standard output: JSON
with `occurrences` (point -> how often an undisturbed run reaches it) and `failures` (sentences).
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
from cache_making import Content, content_of, make_manifest, make_unit

from kdcache.config.remote import RemoteConfig
from kdcache.format import paths
from kdcache.format.sidecar import make_sidecar
from kdcache.store import chain
from kdcache.store.files import fs
from kdcache.store.files.location import Location, RemotePath, locate
from kdcache.store.reader import open_reader
from kdcache.store.verify import verify_cache
from kdcache.store.writing.writer import CacheWriter

NUM_UNITS = 3  # one less in a store, where everything takes requests
WRITTEN_TWICE = 1

# The first writer's shard is the one that a fold takes (its name sorts first): whether the second came to its end or not must
# not matter to the content.
FIRST_BYTES, SECOND_BYTES = 10**6, 1


def write_cache(root: Location) -> None:
    """What a capture does, and beside it a second writer that did one unit again: other bytes, to be swept at the end."""
    sidecars = [make_sidecar("fitted", {"x": np.arange(3.0)})]
    first = CacheWriter.open(root, make_manifest(NUM_UNITS), record_batch_bytes=FIRST_BYTES, sidecars=sidecars)
    second = CacheWriter.open(root, make_manifest(NUM_UNITS), record_batch_bytes=SECOND_BYTES)
    for unit in range(NUM_UNITS):
        if unit in first.published_units():
            continue
        first.write_unit(unit, make_unit(unit))
        if unit == WRITTEN_TWICE:
            second.write_unit(unit, make_unit(unit))
        else:
            first.fold()
    first.add_sidecar("collected", {"x": np.arange(4.0)})
    first.fold()


def in_a_fork(root: Location, reached: Callable[[str], None]) -> int | None:
    """Write the cache in a child; the signal that killed it, or None when it came to its end."""
    pid = os.fork()
    if pid == 0:
        fs.reached = reached
        status = 1
        try:
            write_cache(root)
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit(f"the child failed with status {os.WEXITSTATUS(status)}")
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else None


def count_occurrences(root: Location) -> Counter[str]:
    """How often an undisturbed run reaches each point; run here, as a child could not tell."""
    occurrences: Counter[str] = Counter()
    harmless, fs.reached = fs.reached, lambda point: occurrences.update([point])
    write_cache(root)
    fs.reached = harmless
    return occurrences


def deadly(point: str, occurrence: int) -> Callable[[str], None]:
    seen = 0

    def reached(name: str) -> None:
        nonlocal seen
        seen += name == point
        if name == point and seen == occurrence:
            os.kill(os.getpid(), signal.SIGKILL)

    return reached


def problems_after_a_kill(root: Location, copy: Path, kill: tuple[str, int], expected: Content) -> list[str]:
    if in_a_fork(root, deadly(*kill)) != signal.SIGKILL:
        return ["the child was not killed"]
    problems = []
    if chain.manifest_numbers(root):
        problems += [f"after the kill: {problem}" for problem in verify_cache(root).problems]
    if in_a_fork(root, lambda name: None) is not None:
        return [*problems, "the rerun was killed"]
    problems += [f"after the rerun: {problem}" for problem in verify_cache(root).problems]
    fetch(root, copy)
    problems += [f"left over: {path.name}" for path in left_over(root)]
    return problems + differences(content_of(copy), expected) + unneeded(copy, expected)


def fetch(root: Location, copy: Path) -> None:
    """A cache in a store, copied to a folder; one in a folder is there already."""
    if isinstance(root, RemotePath):
        for directory in (*paths.DIRECTORIES, paths.SIDECARS):
            (copy / directory).mkdir(parents=True)
            for path in (root / directory).iterdir():
                path.download(copy / directory / path.name)


def left_over(root: Location) -> list[Path]:
    temp = root / "tmp" if isinstance(root, Path) else Path(str(root.config.spool_dir))
    return list(temp.iterdir())


def places(folder: Path, store: str | None, name: str) -> tuple[Location, Path]:
    """Where a cache is to be made, and the folder in which it is looked at afterwards."""
    if store is None:
        return folder / name, folder / name
    return locate(f"{store}/{name}", RemoteConfig(spool_dir=str(folder / "spool"))), folder / name


def differences(found: Content, expected: Content) -> list[str]:
    names = ("shards", "index", "files")
    return [f"{n} are not an undisturbed run's" for n in names if getattr(found, n) != getattr(expected, n)]


def unneeded(root: Path, expected: Content) -> list[str]:
    """Shards and journal records that no manifest names."""
    shards = {name for name in expected.files if name.startswith("data/")}
    records = {name.replace("data/", "journal/").replace(".arrow", ".json") for name in shards}
    found = {f"{d}/{path.name}" for d in ("data", "journal") for path in (root / d).iterdir()}
    manifest = chain.newest_manifest(root)
    found |= {path.name for path in (root / paths.SIDECARS).iterdir()}
    shards |= {paths.sidecar_name(sidecar.sha256).rpartition("/")[2] for sidecar in manifest.sidecars}
    return [f"not as in an undisturbed run: {name}" for name in sorted(found ^ (shards | records))]


def let_the_first_writer_win(folder: Path) -> None:
    """Shards are named by content, so that which name comes first changes with the format: found out, not written down."""
    global FIRST_BYTES, SECOND_BYTES
    write_cache(folder)
    with open_reader(folder) as reader:
        if reader.num_record_batches(WRITTEN_TWICE) != 1:
            FIRST_BYTES, SECOND_BYTES = SECOND_BYTES, FIRST_BYTES
    shutil.rmtree(folder)


def chosen(count: int, which: str) -> list[int]:
    """Which of so many occurrences, counted from 1."""
    if which == "every":
        return list(range(1, count + 1))
    middle = count // 2 + 1
    return sorted(({min(1, count), middle, count} if which == "some" else {min(middle, count)}) - {0})


def main() -> None:
    global NUM_UNITS
    task = json.load(sys.stdin)
    folder, store = Path(task["folder"]), task["store"]
    NUM_UNITS -= store is not None
    let_the_first_writer_win(folder / "trial")
    root, copy = places(folder, store, "undisturbed")
    occurrences = count_occurrences(root)
    fetch(root, copy)
    expected = content_of(copy)
    failures = []
    for point in fs.FAULT_POINTS if store is None else fs.REMOTE_FAULT_POINTS:
        count = occurrences[point]
        for occurrence in chosen(count, task["occurrences"]):
            root, copy = places(folder, store, f"killed at {point} {occurrence}")
            problems = problems_after_a_kill(root, copy, (point, occurrence), expected)
            failures += [f"{point!r}, occurrence {occurrence} of {count}: {problem}" for problem in problems]
            shutil.rmtree(copy)
    json.dump({"occurrences": occurrences, "failures": failures}, sys.stdout)


if __name__ == "__main__":
    main()
