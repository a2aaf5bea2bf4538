"""How much of what live distillation gives a student does a cache of few bytes give?

Method: one teacher; text that it has not read, captured once for each of CACHES; then students that differ in nothing but their
targets: for each seed the same first weights, the same batches in the same order (a digest of their ids is compared) and as
many steps. `labels` learns from the text; `live` from the teacher's whole softmax, the teacher run beside it on each batch; the
others from entries, by the trainer's own step. On held-out text:

- loss and KL(teacher || student), nats per token; top-1 agreement with the teacher: over seeds, mean and standard deviation.
- ECE = sum over 15 equal bins of the top-1 probability of (share of tokens in the bin) * |accuracy - mean top-1 probability|
  (Guo et al. 2017, arXiv:1706.04599, equation 3), against the token that came.
- share of the live gain = (labels - x) / (labels - live) of each seed's three students, in loss and in KL: mean, and a 95%
  interval by Student's t over the seeds.
- bytes per position: entries, scalars, numbers of entries. Apart: text (ids, masks, names) and framing (Arrow's, digests).

    python benchmarks/fidelity.py [--teacher FOLDER] [--only NAME ...] [--budget-seconds S]
    python benchmarks/fidelity.py --quick --work FOLDER          a toy: shows that every part works

--teacher is a folder as tools/train_teacher makes it; without, one is trained. Each student has one thread (two OpenMP threads
stall on a busy machine, see tools/teacher_replicas.py). Run again, it goes on with what is not in --work yet. The defaults take
about 45 CPU seconds per student and 200 where the teacher runs beside: half an hour on two cores, the teacher's 5 minutes
included. --quick: a CPU minute.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from fidelity_report import collect, report, write
from fidelity_students import QUICK, SETTINGS, calibrate, capture, result_path, train_and_score

ROOT = Path(__file__).resolve().parents[1]
QUIET = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1",
         "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}  # fmt: skip
"""Of the processes that are started; the last two as in tools/train_teacher."""


def make_teacher(options: argparse.Namespace) -> str:
    """The teacher's folder; trained into the work folder where none is named and none is there."""
    folder = options.teacher or options.work / "teacher"
    if not (folder / "text" / "heldback.jsonl").exists():
        if options.teacher:
            raise SystemExit(f"fidelity: {folder} has no text/heldback.jsonl; give a folder that tools/train_teacher made")
        how = ["--seconds", str(options.teacher_seconds)]
        if options.quick:
            texts = [str(Path(sysconfig.get_paths()["stdlib"]) / name) for name in ("email", "unittest", "importlib")]
            how = ["--steps", "40", "--hidden-size", "64", "--num-layers", "1", "--vocab-size", "320", "--seq-len", "64"]
            how += ["--threads", "1", "--text", *texts]
        command = [sys.executable, str(ROOT / "tools" / "train_teacher.py"), "--out", str(folder), *how]
        subprocess.run(command, check=True)
    return str(folder.resolve())


def make_plan(options: argparse.Namespace, known: dict[str, Any], caches: Path | None = None) -> dict[str, Any]:
    """What the work folder's results depend on; kept there, and compared when the command is run again.

    `caches` is a folder of caches that several work folders share; None for the work folder's own.
    """
    names = (
        "seq_len",
        "hidden_size",
        "num_layers",
        "steps",
        "batch_rows",
        "lr",
        "beta2",
        "heldout_tokens",
        "max_texts",
        "device",
    )
    plan: dict[str, Any] = {name: getattr(options, name) for name in names}
    plan |= {"teacher": make_teacher(options), "work": str(options.work.resolve())}
    plan |= {"caches": str(caches.resolve())} if caches else {}
    path = options.work / "plan.json"
    if path.exists():
        kept = json.loads(path.read_text())
        other = [name for name in plan if plan[name] != kept.get(name)]
        if other:
            raise SystemExit(f"fidelity: {options.work} was begun with {other[0]} = {kept.get(other[0])!r}, not "
                             f"{plan[other[0]]!r}; name another --work, or remove it")  # fmt: skip
        return kept
    plan["taus"] = calibrate(plan, [cache for cache, _ in known.values()])
    path.write_text(json.dumps(plan, indent=1) + "\n")
    return plan


def work(plan: dict[str, Any], settings: dict[str, Any], options: argparse.Namespace) -> None:
    """Captures, then students, --jobs at a time; what is there already is left as it is."""
    deadline = time.time() + options.budget_seconds
    os.environ.update(QUIET)
    todo = [(name, seed) for seed in range(options.seeds) for name in settings if not result_path(plan, name, seed).exists()]
    caches = dict.fromkeys(settings[name][0] for name, _ in todo)
    if not todo:
        return
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        for said in pool.map(capture, *zip(*((plan, cache, deadline) for cache in caches), strict=True)):
            say(said)
        for said in pool.map(train_and_score, *zip(*((plan, *task, deadline) for task in todo), strict=True)):
            say(said)


def say(what: str | None) -> None:
    if what:
        print(what, file=sys.stderr, flush=True)


SIZES = {
    "seeds": 3,
    "seq_len": 256,
    "hidden_size": 64,
    "num_layers": 1,
    "steps": 1200,
    "batch_rows": 4,
    "heldout_tokens": 20_000,
}
TOY = {"seq_len": 64, "hidden_size": 64, "num_layers": 1, "steps": 30, "seeds": 2, "heldout_tokens": 2000, "max_texts": 3}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, metavar="FOLDER")
    parser.add_argument("--teacher-seconds", type=float, default=300, help="of training one (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=ROOT / "demo-output" / "fidelity", metavar="FOLDER")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="of the results (default: benchmarks/results)")
    parser.add_argument(
        "--only",
        action="append",
        choices=[*SETTINGS, *(set(QUICK) - set(SETTINGS))],
        metavar="NAME",
        help=f"of: {'; '.join(SETTINGS)}",
    )
    parser.add_argument("--budget-seconds", type=float, default=math.inf, help="start no student after so long")
    parser.add_argument("--jobs", type=int, default=2, help="students at a time (default: %(default)s)")
    for name, size in SIZES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=size, help="(default: %(default)s)")
    parser.add_argument("--lr", type=float, default=3e-3, help="(default: %(default)s)")
    parser.add_argument("--beta2", type=float, default=0.999, help="of AdamW (default: %(default)s)")
    parser.add_argument("--max-texts", type=int, help="of those held back that are captured (default: all)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="toy sizes, fewer kinds: does it work?")
    parser.add_argument("--report-only", action="store_true", help="table, verdict and picture anew from the json in --out")
    options = parser.parse_args(argv)
    if options.quick:
        vars(options).update(TOY)
        if other := set(options.only or ()) - set(QUICK):
            parser.error(f"--quick has no {min(other)!r}; it has {'; '.join(QUICK)}")
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    if options.report_only:
        print(report((options.out or ROOT / "benchmarks" / "results") / "fidelity"))
        return 0
    options.work.mkdir(parents=True, exist_ok=True)
    known = QUICK if options.quick else SETTINGS
    plan = make_plan(options, known)
    chosen = {name: known[name] for name in options.only or known}
    work(plan, chosen, options)
    out = options.out or (options.work if options.quick else ROOT / "benchmarks" / "results")
    out.mkdir(parents=True, exist_ok=True)
    stem = out / f"fidelity{'-quick' if options.quick else ''}"
    print(write(plan, collect(plan, known, options.seeds), stem, num_students=len(known) * options.seeds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
