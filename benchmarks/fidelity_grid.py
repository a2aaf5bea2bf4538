"""Is what fidelity.py finds true of other teachers and other lengths of training?

Method: fidelity.py, once for each teacher and number of steps, the students of each seed paired as there: same first weights,
same batches. A teacher's caches are captured once for all lengths. The target is asked of each cell by the lower bound of its
interval, and of a record as a whole by the lowest of its cells.

    python benchmarks/fidelity_grid.py --teacher A --teacher B --steps 300 --steps 600 --steps 1200 --seeds 5

Run again, it goes on with what is not in --work yet, and reports what is there. Five seeds of three students at three lengths
with two teachers are 90 students: some two CPU hours, a third of it in the live teacher.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import fidelity
from device import processor_features, processor_name
from fidelity_report import GOAL_BYTES, GOAL_SHARE, collect, percent
from fidelity_students import SETTINGS

NEEDED = ("labels", "live")
DEFAULT = ("threshold 24 B archive", "threshold 24 B archive, tail rising")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, action="append", required=True, metavar="FOLDER", help="may be repeated")
    parser.add_argument("--steps", type=int, action="append", required=True, help="may be repeated")
    parser.add_argument("--seeds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--only", action="append", choices=[*SETTINGS], metavar="NAME", help=f"(default: {'; '.join(DEFAULT)})")
    parser.add_argument("--work", type=Path, default=fidelity.ROOT / "demo-output" / "fidelity-grid", metavar="FOLDER")
    parser.add_argument("--out", type=Path, default=fidelity.ROOT / "benchmarks" / "results", metavar="FOLDER")
    parser.add_argument("--budget-seconds", type=float, default=math.inf, help="start no student after so long")
    parser.add_argument("--lr", type=float, default=3e-3, help="(default: %(default)s)")
    parser.add_argument("--hidden-size", type=int, default=64, help="of students (default: %(default)s)")
    parser.add_argument("--num-layers", type=int, default=1, help="of students (default: %(default)s)")
    parser.add_argument("--heldout-tokens", type=int, default=20_000, help="(default: %(default)s)")
    return parser.parse_args(argv)


def cells(options: argparse.Namespace) -> list[tuple[str, int, argparse.Namespace]]:
    """The options of fidelity.py for each teacher and length, each in a folder of its own."""
    found = []
    for number, teacher in enumerate(options.teacher):
        for steps in options.steps:
            folder = options.work / f"teacher-{number}"
            cell = fidelity.parse(["--teacher", str(teacher), "--work", str(folder / f"steps-{steps}"), "--steps", str(steps)])
            for name in ("lr", "hidden_size", "num_layers", "heldout_tokens", "seeds"):
                setattr(cell, name, getattr(options, name))
            cell.jobs = 1
            found.append((folder.name, steps, cell))
    return found


def run(cell: argparse.Namespace, names: list[str], budget_seconds: float) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A cell's plan and rows, after training what is missing of it in the time."""
    cell.work.mkdir(parents=True, exist_ok=True)
    cell.budget_seconds = budget_seconds
    settings = {name: SETTINGS[name] for name in names}
    plan = fidelity.make_plan(cell, settings, caches=cell.work.parent / "caches")
    fidelity.work(plan, settings, cell)
    return plan, collect(plan, settings, cell.seeds)


def table(found: list[dict[str, Any]]) -> str:
    heads = ("teacher", "held-out loss", "steps", "record", "bytes", "seeds", "share of gain, loss", "share of gain, KL")
    lines = [f"| {' | '.join(heads)} |", "|---|---:|---:|---|" + "---:|" * 4]
    for cell in found:
        for row in (row for row in cell["rows"] if row["setting"] not in NEEDED and "share_kl" in row):
            shares = (percent(row[f"share_{metric}"]) for metric in ("loss", "kl"))
            cells_ = (cell["teacher"], f"{cell['teacher_loss']:.3f}", cell["steps"], row["setting"], f"{row['bytes']:.1f}",
                      len(row["seeds"]), *shares)  # fmt: skip
            lines.append(f"| {' | '.join(map(str, cells_))} |")
    return "\n".join(lines)


def verdicts(found: list[dict[str, Any]]) -> list[str]:
    """Of each record within the bytes: the lowest of its lower bounds, in loss and in KL."""
    said = []
    for name in dict.fromkeys(row["setting"] for cell in found for row in cell["rows"] if row["setting"] not in NEEDED):
        rows = [row for cell in found for row in cell["rows"] if row["setting"] == name and "share_kl" in row]
        if not rows or max(row["bytes"] for row in rows) > GOAL_BYTES:
            continue
        for metric in ("loss", "kl"):
            lows = [row[f"share_{metric}"]["low"] for row in rows]
            lowest = math.nan if any(map(math.isnan, lows)) else min(lows)
            what = "not decided" if math.isnan(lowest) else "met" if lowest >= GOAL_SHARE else "NOT shown"
            said.append(
                f"- {name}: at least {GOAL_SHARE:.0%} of the live gain in {metric} in each of {len(found)} cells, by the lower "
                f"bounds: {what}" + ("." if math.isnan(lowest) else f"; the lowest is {lowest:.1%}.")
            )
    return said


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    deadline = time.time() + options.budget_seconds
    names = [*NEEDED, *(options.only or DEFAULT)]
    found = []
    for teacher, steps, cell in cells(options):
        plan, rows = run(copy.copy(cell), names, deadline - time.time())
        about = json.loads((Path(plan["teacher"]) / "training.json").read_text())
        kept = {name: value for name, value in plan.items() if name not in ("work", "teacher", "caches")}
        found.append(
            {"teacher": teacher, "teacher_loss": about["heldout_nats_per_token"], "steps": steps, "plan": kept, "rows": rows}
        )
    options.out.mkdir(parents=True, exist_ok=True)
    results = {"processor": processor_name(), "features": processor_features(), "cells": found}
    (options.out / "fidelity_grid.json").write_text(json.dumps(results, indent=1) + "\n")
    about = f"{results['processor']}, {results['features']}, one thread each; methods and columns as in fidelity.py."
    text = "\n".join(["# benchmarks/fidelity_grid.py", "", about, "", *verdicts(found), "", table(found), ""])
    (options.out / "fidelity_grid.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
