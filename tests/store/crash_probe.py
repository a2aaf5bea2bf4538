"""Run by test_crash.py in a process of its own: writes a small cache in forks of itself, each really killed at one fault point.

Standard input: JSON with `folder` (an empty one) and `every` (true: at each occurrence of each point; false: the first, the
middle and the last). Standard output: JSON with `occurrences` (point -> how often an undisturbed run reaches it) and `failures`
(sentences).
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

from cache_making import Content, content_of, make_manifest, make_unit

from kdcache.store import chain, fs
from kdcache.store.reader import open_cache
from kdcache.store.verify import verify_cache
from kdcache.store.writer import CacheWriter

NUM_UNITS = 3
WRITTEN_TWICE = 1

# The first writer's shard is the one that a fold takes (its name sorts first): whether the second came to its end or not must
# not matter to the content.
FIRST_BYTES, SECOND_BYTES = 10**6, 1


def write_cache(root: Path) -> None:
    """What a capture does, and beside it a second writer that did one unit again: other bytes, to be swept at the end."""
    first = CacheWriter.open(root, make_manifest(NUM_UNITS), record_batch_bytes=FIRST_BYTES)
    second = CacheWriter.open(root, make_manifest(NUM_UNITS), record_batch_bytes=SECOND_BYTES)
    for unit in range(NUM_UNITS):
        if unit in first.published_units():
            continue
        first.write_unit(unit, make_unit(unit))
        if unit == WRITTEN_TWICE:
            second.write_unit(unit, make_unit(unit))
        else:
            first.fold()
    first.fold()


def in_a_fork(root: Path, reached: Callable[[str], None]) -> int | None:
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


def count_occurrences(root: Path) -> Counter[str]:
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


def problems_after_a_kill(root: Path, point: str, occurrence: int, expected: Content) -> list[str]:
    if in_a_fork(root, deadly(point, occurrence)) != signal.SIGKILL:
        return ["the child was not killed"]
    problems = []
    if chain.manifest_numbers(root):
        problems += [f"after the kill: {problem}" for problem in verify_cache(root).problems]
    if in_a_fork(root, lambda name: None) is not None:
        return [*problems, "the rerun was killed"]
    problems += [f"after the rerun: {problem}" for problem in verify_cache(root).problems]
    problems += [f"left over: {path.name}" for path in (root / "tmp").iterdir()]
    return problems + differences(content_of(root), expected) + unneeded(root, expected)


def differences(found: Content, expected: Content) -> list[str]:
    names = ("shards", "index", "files")
    return [f"{n} are not an undisturbed run's" for n in names if getattr(found, n) != getattr(expected, n)]


def unneeded(root: Path, expected: Content) -> list[str]:
    """Shards and journal records that no manifest names."""
    shards = {name for name in expected.files if name.startswith("data/")}
    records = {name.replace("data/", "journal/").replace(".arrow", ".json") for name in shards}
    found = {f"{d}/{path.name}" for d in ("data", "journal") for path in (root / d).iterdir()}
    return [f"not as in an undisturbed run: {name}" for name in sorted(found ^ (shards | records))]


def let_the_first_writer_win(folder: Path) -> None:
    """Shards are named by content, so that which name comes first changes with the format: found out, not written down."""
    global FIRST_BYTES, SECOND_BYTES
    write_cache(folder)
    with open_cache(folder) as reader:
        if reader.num_record_batches(WRITTEN_TWICE) != 1:
            FIRST_BYTES, SECOND_BYTES = SECOND_BYTES, FIRST_BYTES
    shutil.rmtree(folder)


def main() -> None:
    task = json.load(sys.stdin)
    folder = Path(task["folder"])
    let_the_first_writer_win(folder / "trial")
    occurrences = count_occurrences(folder / "undisturbed")
    expected = content_of(folder / "undisturbed")
    failures = []
    for point in fs.FAULT_POINTS:
        count = occurrences[point]
        for occurrence in range(1, count + 1) if task["every"] else sorted({min(1, count), count // 2 + 1, count} - {0}):
            root = folder / "killed"
            problems = problems_after_a_kill(root, point, occurrence, expected)
            failures += [f"{point!r}, occurrence {occurrence} of {count}: {problem}" for problem in problems]
            shutil.rmtree(root)
    json.dump({"occurrences": occurrences, "failures": failures}, sys.stdout)


if __name__ == "__main__":
    main()
