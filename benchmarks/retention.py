"""What does a student of at most 60 % of its teacher's size keep of the teacher, trained from a cache of few bytes?

Method: one teacher of 12 layers; text that it has not read, captured once with `threshold` at no more than 24 bytes per
position; students with 7 of the 12 layers, which differ in how they begin (copies of the teacher's layers, random weights)
and in their loss (the text's labels, KL from the cache, further terms). For each seed all read the same batches in the same
order for as many steps, by the public trainer. Which layers are kept is chosen on the text held back: the one that costs least
is taken away, again and again. On held-out text, which nothing was trained or chosen on:

- accuracy kept = top-1 accuracy of the student / of the teacher;
- nats over unigram kept = (loss_u - loss_s) / (loss_u - loss_t), u the token frequencies of the cache's text
  (kdcache/train/evaluation/unigram.py); 0 for a model that knows only these, 1 for the teacher;
- each as the mean over seeds, with the wider of two 95 % intervals to either side: Student's t over the seeds, and a bootstrap
  over the held-out texts, paired (each draw of texts is the teacher's and all students');
- against "KL, layers copied": the difference in nats kept, paired by seed.

    python benchmarks/retention.py [--teacher FOLDER] [--only NAME ...] [--budget-seconds S]
    python benchmarks/retention.py --quick --work FOLDER          a toy: shows that every part works

--teacher is a folder as tools/train_teacher makes it; without, one is trained. Each student has one thread. Run again, it
goes on with what is not in --work yet: a student at its last checkpoint.
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
from retention_report import collect, report, write
from retention_students import SETTINGS, calibrate, capture, choose_layers, result_path, train_and_score

from kdcache.half_precision import is_emulated

ROOT = Path(__file__).resolve().parents[1]
QUIET = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1",
         "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}  # fmt: skip
"""Of the processes that are started; the last two as in tools/train_teacher."""
TEACHER = ("--num-layers", "12", "--hidden-size", "128", "--steps", "3600", "--threads", "1")
TOY_TEACHER = ("--num-layers", "5", "--hidden-size", "64", "--steps", "60", "--vocab-size", "320", "--seq-len", "64")

SIZES = {"seeds": 3, "seq_len": 256, "steps": 400, "batch_rows": 4, "heldout_tokens": 30_000}
RATES = {"lr": 1e-3, "random_lr": 1e-3, "beta2": 0.999}
TOY = {"seeds": 2, "seq_len": 64, "steps": 30, "heldout_tokens": 3000, "max_texts": 6}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, metavar="FOLDER")
    parser.add_argument("--work", type=Path, default=ROOT / "demo-output" / "retention", metavar="FOLDER")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="of the results (default: benchmarks/results)")
    parser.add_argument("--only", action="append", choices=[*SETTINGS], metavar="NAME", help=f"of: {'; '.join(SETTINGS)}")
    parser.add_argument("--budget-seconds", type=float, default=math.inf, help="start no student after so long")
    parser.add_argument("--jobs", type=int, default=1, help="students at a time (default: %(default)s)")
    for name, value in {**SIZES, **RATES}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, help="(default: %(default)s)")
    parser.add_argument("--max-texts", type=int, help="of those held back that are captured (default: all)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = "float32" if is_emulated(torch.bfloat16, device) else "bfloat16"
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default=dtype, help="of students (here: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device)
    parser.add_argument("--quick", action="store_true", help="toy sizes: does it work?")
    parser.add_argument("--report-only", action="store_true", help="table, verdict and picture anew from the json in --out")
    options = parser.parse_args(argv)
    if options.quick:
        vars(options).update(TOY)
    return options


def make_teacher(options: argparse.Namespace) -> str:
    """The teacher's folder; trained into the work folder where none is named and none is there."""
    folder = options.teacher or options.work / "teacher"
    if not (folder / "text" / "heldback.jsonl").exists():
        if options.teacher:
            raise SystemExit(f"retention: {folder} has no text/heldback.jsonl; give a folder that tools/train_teacher made")
        how = TEACHER
        if options.quick:
            texts = [str(Path(sysconfig.get_paths()["stdlib"]) / name) for name in ("email", "unittest", "importlib")]
            how = (*TOY_TEACHER, "--threads", "1", "--text", *texts)
        subprocess.run([sys.executable, str(ROOT / "tools" / "train_teacher.py"), "--out", str(folder), *how], check=True)
    return str(folder.resolve())


def make_plan(options: argparse.Namespace) -> dict[str, Any]:
    """What the work folder's results depend on; kept there, and compared when the command is run again."""
    names = (*SIZES, *RATES, "max_texts", "dtype", "device")
    plan: dict[str, Any] = {name: getattr(options, name) for name in names if name != "seeds"}
    plan |= {"teacher": make_teacher(options), "work": str(options.work.resolve())}
    path = options.work / "plan.json"
    if path.exists():
        kept = json.loads(path.read_text())
        other = [name for name in plan if plan[name] != kept.get(name)]
        if other:
            raise SystemExit(f"retention: {options.work} was begun with {other[0]} = {kept.get(other[0])!r}, not "
                             f"{plan[other[0]]!r}; name another --work, or remove it")  # fmt: skip
        return kept
    plan["tau"] = calibrate(plan)
    plan["layers"] = choose_layers(plan)
    path.write_text(json.dumps(plan, indent=1) + "\n")
    return plan


def work(plan: dict[str, Any], settings: dict[str, Any], options: argparse.Namespace) -> None:
    """Captures, then students, --jobs at a time, each seed's together; what is there already is left as it is."""
    deadline = time.time() + options.budget_seconds
    os.environ.update(QUIET)
    todo = [(name, seed) for seed in range(options.seeds) for name in settings if not result_path(plan, name, seed).exists()]
    if not todo:
        return
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        for cache in dict.fromkeys(settings[name]["cache"] for name, _ in todo):
            costs = pool.submit(capture, plan, cache).result()
            (Path(plan["work"]) / f"{cache}.json").write_text(json.dumps(costs) + "\n")
            say(f"{cache}: {costs['bytes']:.1f} bytes per position, {costs['vectors']:.1f} of vectors")
        for said in pool.map(train_and_score, *zip(*((plan, *task, deadline) for task in todo), strict=True)):
            say(said)


def say(what: str | None) -> None:
    if what:
        print(what, file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    out = options.out or (options.work if options.quick else ROOT / "benchmarks" / "results")
    stem = out / f"retention{'-quick' if options.quick else ''}"
    if options.report_only:
        print(report(stem))
        return 0
    options.work.mkdir(parents=True, exist_ok=True)
    plan = make_plan(options)
    work(plan, {name: SETTINGS[name] for name in options.only or SETTINGS}, options)
    out.mkdir(parents=True, exist_ok=True)
    print(write(plan, collect(plan, options.seeds), stem, num_students=len(SETTINGS) * options.seeds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
