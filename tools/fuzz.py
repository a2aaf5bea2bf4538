"""Tries hostile inputs on every reader for as long as you say: `python tools/fuzz.py --minutes 30 [--seed N] [TARGET ...]`.

Each trial is a pure function of its target and seed, and runs in a child process of its own, with bounds on memory and time. A
signal, a hang, an exception that is not ours, more memory than the bound, or two ways of reading that differ is a finding: what
was read is kept in a folder, and a line says how to run the trial again. Exit status 1 where there was one.

The targets are in tests/fuzzing/; its tests run a few seeds of each.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TARGETS = ("manifests", "arrow", "generated", "codecs", "foreign_files", "texts")
WARM_SEEDS = 12
"""Trials that this process does itself, so that children need not import or compile anything."""

Trial = Callable[[int, Path], list[str]]


@dataclass(frozen=True)
class Limits:
    """Of one child."""

    seconds: float
    memory_bytes: int
    resident_bytes: int


def prepare() -> None:
    """One thread everywhere, as children are forked; the tests and this checkout on the path."""
    for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import warnings

    import pyarrow as pa

    warnings.simplefilter("ignore")
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)


def memory() -> tuple[int, int]:
    """Bytes of this process: of its address space, and of what is resident."""
    pages = Path("/proc/self/statm").read_text().split()
    return int(pages[0]) * resource.getpagesize(), int(pages[1]) * resource.getpagesize()


def run_child(trial: Trial, seed: int, folder: Path, limits: Limits) -> list[str]:
    """What a trial finds, or what became of its process."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if not child:
        os.close(read_end)
        _be_child(trial, seed, folder, write_end, limits)
    os.close(write_end)
    data, hung = _read(read_end, limits.seconds)
    if hung:
        os.kill(child, signal.SIGKILL)
    os.close(read_end)
    _, status, usage = os.wait4(child, 0)
    if hung:
        return [f"hang: still running after {limits.seconds:.0f} s"]
    if os.WIFSIGNALED(status):
        return [f"signal: {signal.Signals(os.WTERMSIG(status)).name}"]
    before, _, answer = data.partition(b"\n")
    found: list[str] = json.loads(answer) if answer else [f"exit: the child ended with status {status >> 8} and no answer"]
    grown = usage.ru_maxrss * 1024 - int(before or 0)
    if grown > limits.resident_bytes:
        found.append(f"memory: {grown >> 20} MiB more than before")
    return found


def _be_child(trial: Trial, seed: int, folder: Path, answer: int, limits: Limits) -> None:
    """Run one trial and end this process."""
    try:
        os.write(answer, b"%d\n" % memory()[1])
        resource.setrlimit(resource.RLIMIT_AS, (memory()[0] + limits.memory_bytes,) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, 1)
        os.dup2(nothing, 2)
        os.write(answer, json.dumps([str(found)[:2000] for found in trial(seed, folder)][:20]).encode())
    except BaseException as error:  # the trial's own fault, or one that no reader may let out
        os.write(answer, json.dumps([f"trial: {type(error).__name__}: {str(error)[:500]}"]).encode())
    finally:
        os._exit(0)


def _read(answer: int, seconds: float) -> tuple[bytes, bool]:
    """All that the child says, and whether it did not come to an end."""
    data, end = b"", time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        if select.select([answer], [], [], left)[0]:
            piece = os.read(answer, 1 << 16)
            if not piece:
                return data, False
            data += piece
    return data, True


@dataclass
class Session:
    """All trials of one call.

    Attributes:
        out: where inputs of findings are kept.
        seen: findings by their first words, so that each kind is kept once.
    """

    out: Path
    limits: Limits
    seen: Counter[tuple[str, str]]

    def run(self, target: str, trial: Trial, seeds: range, until: float) -> int:
        """Trials until the time is over; gives their number."""
        work = Path(tempfile.mkdtemp(prefix="kdcache-fuzz-work-"))
        done = 0
        try:
            for seed in seeds:
                if time.monotonic() > until:
                    break
                shutil.rmtree(work, ignore_errors=True)
                work.mkdir()
                for finding in run_child(trial, seed, work, self.limits):
                    self._keep(target, seed, finding, work)
                done += 1
        finally:
            shutil.rmtree(work, ignore_errors=True)
        return done

    def _keep(self, target: str, seed: int, finding: str, work: Path) -> None:
        kind = (target, finding.partition(" at ")[2] or finding[:60])
        self.seen[kind] += 1
        if self.seen[kind] > 1:
            return
        place = self.out / f"{target}-{seed}"
        shutil.copytree(work, place, dirs_exist_ok=True, symlinks=True)
        (place / "finding.txt").write_text(f"{finding}\n")
        again = f"python tools/fuzz.py {target} --seed {seed} --trials 1"
        print(f"{target}, seed {seed}: {finding}\n  kept in {place}; again: {again}", flush=True)


def load_target(name: str) -> Trial:
    """A target's trial, warmed up: `module` of tests/fuzzing, or `package.module:function` of any other."""
    module, _, function = name.partition(":")
    trial: Trial = getattr(import_module(module if function else f"fuzzing.{module}"), function or "trial")
    if not function:
        with tempfile.TemporaryDirectory(prefix="kdcache-fuzz-warm-") as folder:
            for seed in range(WARM_SEEDS):
                trial(seed, Path(folder))
    return trial


def main(arguments: list[str] | None = None) -> int:
    """Run the targets one after another, each for its share of the time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "targets", nargs="*", default=list(TARGETS), metavar="TARGET", help=f"of {', '.join(TARGETS)}; all by default"
    )
    parser.add_argument("--minutes", type=float, default=30.0, help="for all targets together (30)")
    parser.add_argument("--trials", type=int, default=10**12, help="at most so many of each target")
    parser.add_argument(
        "--seed", type=int, default=None, help="of the first trial; each next one has the next (the time of day)"
    )
    parser.add_argument("--out", type=Path, default=None, help="where inputs of findings are kept (a new folder under /tmp)")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds of one trial (60)")
    parser.add_argument("--memory", type=float, default=3.0, help="GiB of address space that a trial may add (3)")
    parser.add_argument("--resident", type=float, default=0.6, help="GiB of memory that a trial may use (0.6)")
    options = parser.parse_args(arguments)
    prepare()
    limits = Limits(options.timeout, int(options.memory * 2**30), int(options.resident * 2**30))
    session = Session(options.out or Path(tempfile.mkdtemp(prefix="kdcache-fuzz-found-")), limits, Counter())
    first = int(time.time()) if options.seed is None else options.seed
    for target in options.targets:
        started = time.monotonic()
        trial = load_target(target)
        until = time.monotonic() + 60 * options.minutes / len(options.targets)
        done = session.run(target, trial, range(first, first + options.trials), until)
        print(f"{target}: {done:,} trials from seed {first} in {time.monotonic() - started:.0f} s", flush=True)
    return summary(session.seen)


def summary(seen: Counter[tuple[str, Any]]) -> int:
    """Print how often each kind of finding came; gives the exit status."""
    for (target, kind), number in sorted(seen.items()):
        print(f"{number:6,} x {target}: {kind}")
    print("nothing found" if not seen else f"{len(seen)} kinds of findings")
    return int(bool(seen))


if __name__ == "__main__":
    sys.exit(main())
