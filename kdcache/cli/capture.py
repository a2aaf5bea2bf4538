"""`kdcache capture CONFIG.yaml`: run a teacher over text and write a cache."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from kdcache.cli.config_arguments import add_config_arguments, read_config
from kdcache.cli.wording import count, duration, rows, size
from kdcache.config.capture import CaptureConfig

if TYPE_CHECKING:
    from kdcache.capture.estimate import CaptureEstimate
    from kdcache.capture.run import CaptureSummary


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = (
        "Run a teacher over text and write what it says into a cache.\n\n"
        "The work is cut into units, and each finished unit is a shard on disk. Stop it, kill it, run the same command\n"
        "again: it goes on with the first unit that is not finished, and says so when there is nothing left to do."
    )
    add_config_arguments(parser, CaptureConfig, example="capture-text.yaml")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the plan, the expected tokens, bytes and time; write nothing"
    )
    parser.add_argument("--probe", action="store_true", help="with --dry-run: load the teacher and time it on a few sequences")


def run(args: argparse.Namespace) -> int:
    """Capture, or with --dry-run say what it would come to."""
    config = read_config(args, CaptureConfig)
    from kdcache.capture.progress import BarProgress

    if args.dry_run:
        from kdcache.capture.estimate import estimate_capture

        print(_estimate_text(config, estimate_capture(config, BarProgress(), probe=args.probe)))
        return 0
    if args.probe:
        print("kdcache: --probe does something with --dry-run only", file=sys.stderr)
        return 2
    from kdcache.capture.run import run_capture

    print(_summary_text(run_capture(config, BarProgress())))
    return 0


def _summary_text(summary: CaptureSummary) -> str:
    manifest = summary.manifest
    if summary.num_units_captured == 0:
        return f"{summary.path}: nothing to do; all {count(summary.num_units, 'unit')} are published"
    counts = summary.counts
    shown = {
        "cache": f"{summary.path}: {count(manifest.total('num_sequences'), 'sequence')}, "
        f"{count(manifest.total('num_positions'), 'position')}, {size(manifest.total('num_bytes'))}",
        "this run": f"{count(summary.num_units_captured, 'unit')}, {count(summary.num_tokens, 'token')} in "
        f"{duration(summary.seconds)} ({summary.num_tokens / max(summary.seconds, 1e-9):,.0f} tokens/s)",
    }
    if summary.num_units_before:
        shown["before"] = f"{count(summary.num_units_before, 'unit')} had been published by earlier runs"
    left_out = [
        (counts.num_empty_items, "empty item", "skipped"),
        (counts.num_unsupervised, "sequence", "without a supervised position skipped"),
        (counts.num_truncated_tokens, "token", f"cut off {count(counts.num_truncated_items, 'item')} by policy 'truncate'"),
    ]
    shown["left out"] = "; ".join(f"{count(number, noun)} {what}" for number, noun, what in left_out if number)
    shown["next"] = f"kdcache verify {summary.path}"
    return rows({name: text for name, text in shown.items() if text})


def _estimate_text(config: CaptureConfig, estimate: CaptureEstimate) -> str:
    plan = estimate.plan
    if plan.is_stream:
        read = f"a stream of at most {count(plan.num_items, 'item')}"
    else:
        measure = "token" if config.input.content == "ids" else "character"
        files = f"{count(estimate.num_files, 'file')}, " if estimate.num_files else ""
        read = f"{files}{count(plan.num_items, 'item')} ({plan.num_empty_items:,} empty), {count(plan.num_chars, measure)}"
    seconds = estimate.seconds_left
    if seconds is None:
        when = "unknown before the teacher runs; --probe loads it and measures"
    else:
        when = f"about {duration(seconds)} at {estimate.tokens_per_second:,.0f} tokens/s, as measured"
    return rows(
        {
            "input": read,
            "plan": f"{count(len(plan.units), 'unit')}, {estimate.num_units_before:,} of them published already",
            "tokens": f"about {estimate.num_tokens:,} in {count(estimate.num_sequences, 'sequence')} "
            f"(from {count(estimate.num_sampled_items, 'sampled item')})",
            "positions": f"about {estimate.num_positions:,}, at {estimate.bytes_per_position:.1f} bytes each "
            f"({config.codec.id}, {config.selection.kind} {config.selection.k})",
            "cache": f"about {size(estimate.num_bytes)} at {config.output.path}",
            "time": when,
        }
    )
