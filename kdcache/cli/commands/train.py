"""`kdcache train CONFIG.yaml`: train a student from a cache; run again, it resumes where it stopped."""

from __future__ import annotations

import argparse
import sys

from kdcache.cli.config_arguments import add_config_arguments, read_config
from kdcache.config.train import TrainConfig
from kdcache.shown import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = (
        "Train a student from a cache.\n\n"
        "  kdcache train configs/train-text.yaml --set cache=cache --set student.model=my/student --set out=runs/kd\n"
        "  kdcache train configs/train-kd.yaml --set loss.divergence=reverse_kl --set out=runs/reverse\n\n"
        "After any stop, run the same command again: it resumes at its last checkpoint."
    )
    add_config_arguments(parser, TrainConfig, example="train-kd.yaml")


def run(args: argparse.Namespace) -> int:
    """Train with a progress bar; print what was done, the held-out curve and where the model is."""
    config = read_config(args, TrainConfig)
    from kdcache.report.evaluation import curve_lines
    from kdcache.report.terms import term_curves, term_lines
    from kdcache.train.evaluation.evaluate import heldout_curve
    from kdcache.train.runs.run_folder import METRICS, read_metrics
    from kdcache.train.trainer import train

    result = train(config)
    new_steps = result.num_steps - result.num_resumed
    took = f"; {new_steps:,} of them now," if result.num_resumed else ""
    say(f"{result.num_steps:,} steps, {result.num_tokens:,} tokens{took} in {result.seconds:.1f} s")
    if result.num_skipped:
        say(f"{result.num_skipped:,} of the steps were skipped because a loss or gradient was not finite; see metrics.jsonl")
    metrics = read_metrics(result.out)
    masses = [mass for line in metrics if isinstance(mass := line.get("padding_mass"), float)]
    if masses:
        say(f"teacher's mass on ids that the student lacks: {sum(masses) / len(masses):.3g} on average, left out")
    for line in curve_lines({"held-out nats per token": heldout_curve(result.out)}, encoding=sys.stdout.encoding):
        say(line)
    for line in term_lines(term_curves(metrics), encoding=sys.stdout.encoding):
        say(line)
    say(f"losses: {result.out / METRICS}")
    say(f"model: {result.model}")
    return 0
