"""`kdcache evaluate`: compare students with their teacher on held-out text."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from kdcache.errors import ConfigError
from kdcache.extras import require
from kdcache.shown import say

PLOT, TERMS = "evaluation.png", "terms.png"
TABLE = "evaluation.md"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = (
        "Compare students with their teacher on held-out text.\n\n"
        "  kdcache evaluate --teacher my/teacher --data heldout.jsonl --student kd=runs/kd --out eval\n\n"
        "Prints held-out loss, KL, agreement and what each student keeps of the teacher, with intervals, and writes\n"
        "results.json, a table and plots."
    )
    parser.add_argument("--teacher", required=True, metavar="DIR", help="the teacher: a folder or a hub id")
    parser.add_argument(
        "--data", required=True, metavar="FILE", help="held-out JSON lines, Parquet or Arrow, with `text` or `input_ids`"
    )
    parser.add_argument(
        "--student",
        dest="students",
        required=True,
        action="append",
        metavar="NAME=DIR",
        help="a training run's directory or a model's folder; may be repeated",
    )
    parser.add_argument("--baseline", metavar="NAME", help="the student that others are compared with (default: the first)")
    parser.add_argument(
        "--unigram",
        metavar="CACHE",
        help="cache or file of training text: a model that knows only its token frequencies keeps 0%% of the teacher's nats "
        "(default: the cache of a student's run)",
    )
    parser.add_argument("--out", required=True, metavar="OUT", help=f"directory for results.json, {TABLE} and {PLOT}")
    parser.add_argument(
        "--max-tokens", type=_at_least(2), metavar="N", help="most tokens to score, evenly spread over the file (default: all)"
    )
    parser.add_argument(
        "--window", type=_at_least(2), default=256, metavar="N", help="most tokens in a sequence (default: 256)"
    )
    parser.add_argument("--seed", type=_at_least(0), default=0, metavar="N", help="seed of the bootstrap (default: 0)")


def run(args: argparse.Namespace) -> int:
    """Evaluate; prints the table, the verdicts and the curves, and writes results.json, the table and the plot."""
    students = _students(args.students)
    # Before hours of scoring, not after.
    require("torch", "transformers", "matplotlib", purpose="kdcache evaluate", extra="train")
    from kdcache.report.evaluation import curve_lines, evaluation_sentences, evaluation_table, retention_sentences
    from kdcache.report.plot import plot_evaluation, plot_terms
    from kdcache.report.terms import term_curves
    from kdcache.train.evaluation.evaluate import EvaluateConfig, evaluate
    from kdcache.train.runs.run_folder import read_metrics

    options = EvaluateConfig(
        teacher=args.teacher,
        students=students,
        data=args.data,
        out=args.out,
        baseline=args.baseline,
        unigram=args.unigram,
        window=args.window,
        max_tokens=args.max_tokens,
        seed=args.seed,
    )
    evaluation = evaluate(options, on_start=_progress)
    table = evaluation_table(evaluation.results)
    say(table.to_text())
    sentences = [*retention_sentences(evaluation.results), *evaluation_sentences(evaluation.results)]
    lines = [*sentences, *curve_lines(evaluation.curves, encoding=sys.stdout.encoding)]
    if lines:
        say("\n".join(["", *lines]))
    out = Path(args.out)
    (out / TABLE).write_text(table.to_markdown() + "\n")
    plot_evaluation(evaluation.results, evaluation.curves, out / PLOT)
    curves = {name: term_curves(read_metrics(path)) for name, path in students.items()}
    terms = f", {TERMS}" if plot_terms(curves, out / TERMS) else ""
    say(f"\nwritten to {out}: results.json, {TABLE}, {PLOT}{terms}")
    return 0


def _students(arguments: list[str]) -> dict[str, str]:
    students: dict[str, str] = {}
    for argument in arguments:
        name, equals, path = argument.partition("=")
        if not (name and equals and path):
            raise ConfigError(f"--student {argument!r}: expected NAME=DIR, as in kd=runs/kd")
        if name in students:
            raise ConfigError(f"--student {argument!r}: the name {name!r} is given twice")
        students[name] = path
    return students


def _progress(num_tokens: int) -> Callable[[int], object]:
    from tqdm import tqdm

    from kdcache.bars import bar_options

    bar = tqdm(**bar_options(total=num_tokens, delay=2, unit="tok", unit_scale=True))

    def advance(done: int) -> None:
        bar.update(done)
        if bar.n >= num_tokens:
            bar.close()

    return advance


def _at_least(smallest: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text)
        if value < smallest:
            raise argparse.ArgumentTypeError(f"{value} is below {smallest}")
        return value

    parse.__name__ = "whole number"  # argparse shows it for text that is no number
    return parse
