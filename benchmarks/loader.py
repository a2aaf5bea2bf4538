"""How many tokens does a CPU second bring into a trainer's batches: our loader, other data libraries, and a memory copy?

Method: synthetic rows (`loader_rows.py`: 300 to 700 tokens, K = 64 of 151,936 ids, float16 logprobs), written as a cache of
each of our codecs and by each library's own writer, and read back in a process of its own from the page cache, on one core,
without worker processes. How passes are timed: `loader_measure.py`. Per CPU second of the process, all its threads counted,
since wall time measures the machine's other jobs too; the best of --rounds. "/ floor" is the median over rounds of a rate over
the floor's in the same process and round.

- Floors: bytes copied from a memory map into one batch's room, sequence by sequence in random order, not decoded and not
  checked. "packed": all columns of the cache of codec `packed`; "raw": int32 ids and float16 logprobs, of which there are more.
  These two map the file anew for every pass, so that its page faults are in them; readers keep their maps, as does the third
  floor, "packed, map kept": the bytes alone.
- Others: each by its documented calls, in the fastest way found, one sequence a call for `random`; for `packed` a whole
  batch's sequences by one call where the library has one, placed by the plan that our loader made, which costs them nothing.
  Their dtypes stay (int32, float16). Ours become float32, twice the bytes to write, or with "float16" the same: beside a
  library that gives float16 either of ours may stand, beside one that gives float32 only ours that do.
- Ours, "loader": `sequential` and `random` are unpacked batches of 16 rows as `kdcache.Loader` gives them, with labels,
  positions and segments, which the others need not make there; its planning is counted. "[i]": `kdcache.open(...)[i]`, copied.
- Integrity: on wherever a library has it; ours compares each row's digest at each read ("verify off" beside it).
- Bytes: of all files. Ours hold more than the rows: tails, targets outside the support, masks, keys, digests, an index.
- "Wanted": ours must be ahead of each other library at its number of bytes or fewer, with logprobs as exact as its own; and
  verified random access with codec `packed` reach 0.75 of the floor.

    python -m venv /tmp/baselines
    /tmp/baselines/bin/pip install uv torch==2.13.0+cpu   # first, from where CPU builds are had: others would bring CUDA's
    printf 'numpy>=2\\ntransformers>=5\\n' >/tmp/overrides; echo torchvision >/tmp/excludes
    /tmp/baselines/bin/uv pip install --python /tmp/baselines/bin/python --overrides /tmp/overrides --excludes /tmp/excludes \\
        'torch==2.13.0+cpu' mosaicml-streaming litdata 'datasets>=5' pylance vortex-data pyarrow xxhash
    python benchmarks/loader.py --baseline-python /tmp/baselines/bin/python [--out benchmarks/results]

(The overrides: mosaicml-streaming asks for an older NumPy and transformers, hence an old datasets. torchvision it only imports;
a stub stands in for it.) About three minutes; a library that is not there is reported so. --quick: to see that it works.
First batches on a million sequences and resident memory: `loader_scale.py`; where our time goes: `loader_parts.py`.
Writes loader.md and loader.json to --out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loader_baselines import BASELINES
from loader_report import report
from loader_rows import CODECS, write_cache, write_packed_floor, write_plan, write_rows

HERE = Path(__file__).parent
QUIET = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def child(command: Sequence[str | Path], scratch: Path, timeout: float) -> dict[str, Any]:
    """The JSON of a process's last line; {"failed": ...} with its last words where there is none."""
    for name in ("home", "tmp"):
        (scratch / name).mkdir(exist_ok=True)
    folders = {"HOME": str(scratch / "home"), "HF_HOME": str(scratch / "home"), "TMPDIR": str(scratch / "tmp")}
    try:
        done = subprocess.run(
            list(map(str, command)),
            capture_output=True,
            text=True,
            timeout=timeout,
            env=os.environ | QUIET | folders,
            check=False,
        )
    except (subprocess.TimeoutExpired, OSError) as error:
        return {"failed": str(error)[-300:]}
    last = (done.stdout.strip().splitlines() or [""])[-1]
    if done.returncode or not last.startswith("{"):
        return {"failed": (done.stderr.strip().splitlines() or ["no output"])[-1][-300:]}
    return json.loads(last)


def ours(folder: Path, arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Every codec through the loader, `packed` by number and without checks too; and threads."""
    runs = [(f"{codec}, loader", ["loader", codec], []) for codec in arguments.codecs]
    half = ["--logprob-dtype", "float16"]
    runs += [("packed, loader, float16", ["loader", "packed"], half)]
    runs += [("packed, loader, verify off", ["loader", "packed"], ["--no-verify"])]
    runs += [("packed, loader, float16, verify off", ["loader", "packed"], [*half, "--no-verify"])]
    runs += [("packed, [i]", ["map", "packed"], []), ("threads", ["threads", "packed"], [])]
    results = {}
    for name, (kind, codec), flags in runs:
        command = [sys.executable, HERE / "loader_ours.py", kind, codec, folder / "rows", folder / codec, *flags]
        results[name] = said(name, child([*command, *timing(arguments)], folder, arguments.timeout))
    return results


def others(folder: Path, arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    results: dict[str, dict[str, Any]] = {}
    for number, name in enumerate(arguments.others):
        if arguments.baseline_python is None:
            results[name] = {"not_installed": "no --baseline-python was given"}
            continue
        command = [arguments.baseline_python, HERE / "loader_baselines.py", name, folder / "rows", folder / f"baseline{number}"]
        results[name] = said(name, child([*command, *timing(arguments)], folder, arguments.timeout))
    return results


def timing(arguments: argparse.Namespace) -> list[str]:
    return ["--seconds", str(arguments.seconds), "--rounds", str(arguments.rounds)]


def said(name: str, result: dict[str, Any]) -> dict[str, Any]:
    print(f"{name}: {result.get('failed') or result.get('not_installed') or 'measured'}", file=sys.stderr, flush=True)
    return result


def run(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything that is measured, as it is kept in loader.json."""
    start, load = time.perf_counter(), os.getloadavg()[0]
    rows = write_rows(folder / "rows", arguments.sequences, arguments.k)
    for codec in {*arguments.codecs, "packed"}:
        write_cache(folder / codec, rows, codec)
    write_packed_floor(folder / "rows", folder / "packed")
    write_plan(folder / "rows", folder / "packed")
    about = {"sequences": len(rows), "tokens": rows.num_tokens, "k": rows.k, "cpu": processor_name(), "load_before": load}
    about |= {"seconds": arguments.seconds, "rounds": arguments.rounds}
    floor_bytes = {name: (folder / "rows" / f"{name}.bin").stat().st_size for name in ("packed", "raw")}
    measured = {"ours": ours(folder, arguments), "others": others(folder, arguments)}
    return about | {"floor_bytes": floor_bytes} | measured | {"took": time.perf_counter() - start}


def processor_name() -> str:
    """As Linux says it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown processor")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--baseline-python", type=Path, help="of an environment with the other libraries")
    parser.add_argument("--codecs", nargs="+", choices=CODECS, default=list(CODECS), help="of ours; packed is always made")
    parser.add_argument("--others", nargs="*", choices=BASELINES, default=list(BASELINES), help="of the other libraries")
    parser.add_argument("--sequences", type=int, default=800)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=0.3, help="CPU seconds of a pass")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--timeout", type=float, default=120, help="wall seconds after which a process is given up")
    parser.add_argument("--folder", type=Path, help="where all is written (nine copies); a temporary folder by default")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--quick", action="store_true", help="24 sequences, K = 8, one short round")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.sequences, arguments.k, arguments.seconds, arguments.rounds = 24, 8, 0.01, 1
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        results = run(Path(temporary), arguments)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "loader.json").write_text(json.dumps(results, indent=1) + "\n")
    (arguments.out / "loader.md").write_text(report(results))
    print(report(results))


if __name__ == "__main__":
    main()
