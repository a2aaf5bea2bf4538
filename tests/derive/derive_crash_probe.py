"""Run by test_derive_run.py in a process of its own: derives a cache in forks of itself, each really killed at a fault point.

Argument: an empty folder. Standard output: JSON with the number of `kills` and `failures`, a sentence each.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))

from cache_making import content_of
from derive_cases import selected_cache

from kdcache.derive.config import DeriveConfig
from kdcache.derive.reduction.reduce import Reduction
from kdcache.derive.run import derive
from kdcache.store.files import fs
from kdcache.store.reader import open_reader
from kdcache.store.verify import verify_cache

KILLS = {
    ("temp file written", 2): 0,
    ("shard published", 1): 0,
    ("journal published", 2): 0,
    ("index published", 1): 0,
    ("manifest published", 2): 6,
}
"""(fault point, occurrence) -> sequences that readers see then."""

OPTIONS = DeriveConfig(mix=(0.5, 0.5), reduce=Reduction(draws=40), where="num_tokens > 12", unit_sequences=3)


def deadly(kill: tuple[str, int]) -> Callable[[str], None]:
    seen = 0

    def reached(name: str) -> None:
        nonlocal seen
        seen += name == kill[0]
        if (name, seen) == kill:
            os.kill(os.getpid(), signal.SIGKILL)

    return reached


def derive_in_a_fork(sources: list[Path], target: Path, reached: Callable[[str], None]) -> int:
    """The status that the child ended with."""
    pid = os.fork()
    if pid == 0:
        fs.reached = reached
        try:
            derive(sources, target, OPTIONS)
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(pid, 0)[1]


def main() -> None:
    folder = Path(sys.argv[1])
    sources = [selected_cache(folder / name, "threshold", seed=seed) for seed, name in enumerate("ab")]
    derive(sources, folder / "undisturbed", OPTIONS)
    expected, failures = content_of(folder / "undisturbed"), []
    for kill, num_visible in KILLS.items():
        target = folder / f"killed at {kill[0]}"
        if not os.WIFSIGNALED(derive_in_a_fork(sources, target, deadly(kill))):
            failures.append(f"{kill}: was not killed")
        with open_reader(target) as reader:
            if len(reader) != num_visible:
                failures.append(f"{kill}: {len(reader)} sequences are visible")
        derive(sources, target, OPTIONS)
        failures += [f"{kill}: {problem}" for problem in verify_cache(target).problems]
        if content_of(target) != expected:
            failures.append(f"{kill}: the content is not an undisturbed run's")
    json.dump({"kills": len(KILLS), "failures": failures}, sys.stdout)


if __name__ == "__main__":
    main()
