"""`kdcache capture CONFIG.yaml`: run a teacher over text and write a cache."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

from kdcache.cli.config_arguments import add_config_arguments, read_config
from kdcache.cli.feature_wording import positions_words, source_words, width_words
from kdcache.cli.wording import aligned, count, duration, size
from kdcache.config.capture import CaptureConfig
from kdcache.shown import say

if TYPE_CHECKING:
    from kdcache.capture.estimate import CaptureEstimate
    from kdcache.capture.executors.run import CaptureSummary


RUN_FLAGS = {
    "--rank": ("run.rank", "index of this process among --world-size, from 0"),
    "--world-size": ("run.world_size", "processes that share the units: unit u belongs to rank u mod N"),
    "--executor": ("run.executor", "local, or ray for actors of a cluster"),
    "--replicas": ("run.replicas", "with --executor ray: actors, each with its own teacher"),
    "--gpus-per-replica": ("run.gpus_per_replica", "with --executor ray: GPUs that each actor asks the cluster for"),
    "--max-failed": ("run.max_failed", "units that may fail and be set aside while the capture continues"),
}
"""flag -> (the field that it sets, help), for what differs between the processes or the runs of one capture."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = (
        "Run a teacher over text and cache its distributions.\n\n"
        "  kdcache capture configs/capture-text.yaml --dry-run        print the plan, the size and the time\n"
        "  kdcache capture configs/capture-text.yaml                  run it; after any stop, run it again to resume\n"
        "  kdcache capture c.yaml --set selection.tau=0.02 --set out=s3://bucket/cache\n"
        "  kdcache capture c.yaml --rank 3 --world-size 8             one of eight processes that share the work\n\n"
        "The work is cut into units; each finished unit is a shard of the cache. Ctrl-C or SIGTERM stops after the\n"
        "current unit, with exit status 0; a second one stops at once (130, 143). After any stop, even a kill, run the same\n"
        "command again: it resumes with the first unfinished unit, and reports when there is nothing left to do.\n"
        "Exit status 1: it finished, but some units failed and were set aside (see --max-failed)."
    )
    add_config_arguments(parser, CaptureConfig, example="capture-text.yaml")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the plan and the expected tokens, bytes and time; write nothing"
    )
    parser.add_argument("--probe", action="store_true", help="with --dry-run: load the teacher and time it on a few sequences")
    parser.add_argument(
        "--stop-status", type=int, default=0, metavar="N",
        help="exit status when a signal stops the capture with work left; e.g. 75, which many schedulers treat as 'retry'",
    )  # fmt: skip
    for flag, (field, help_text) in RUN_FLAGS.items():
        parser.add_argument(flag, metavar="N" if flag != "--executor" else "NAME", help=f"{help_text} (sets {field})")


def run(args: argparse.Namespace) -> int:
    """Capture, or print an estimate with --dry-run."""
    given = ((field, getattr(args, flag.lstrip("-").replace("-", "_"))) for flag, (field, _) in RUN_FLAGS.items())
    args.overrides = [*args.overrides, *(f"{field}={value}" for field, value in given if value is not None)]
    config = read_config(args, CaptureConfig)
    from kdcache.capture.watch.progress import BarProgress

    if args.dry_run:
        from kdcache.capture.estimate import estimate_capture

        say(_estimate_text(config, estimate_capture(config, BarProgress(), probe=args.probe)))
        return 0
    if args.probe:
        say("kdcache: --probe needs --dry-run", sys.stderr)
        return 2
    from kdcache.capture.executors.run import run_capture
    from kdcache.capture.watch.signals import Interrupted, StopRequest, stopping_on_signals

    stop = StopRequest()
    try:
        with stopping_on_signals(stop):
            summary = run_capture(config, BarProgress(), stop)
    except Interrupted as interrupt:
        say(f"\nkdcache: interrupted{': ' if interrupt.args else ''}{interrupt}", sys.stderr)
        return 128 + interrupt.signum
    say(_summary_text(config, summary))
    if summary.is_stopped:
        return args.stop_status
    return 1 if summary.set_aside else 0


def _summary_text(config: CaptureConfig, summary: CaptureSummary) -> str:
    manifest, run = summary.manifest, config.run
    if summary.num_units_captured == summary.num_units_left == 0:
        units = count(summary.num_units, "unit")
        what = (
            f"rank {run.rank}'s share of {units} is"
            if run.world_size > 1
            else f"{units} {'is' if units == '1 unit' else 'are'}"
        )
        done = f"{summary.path}: nothing to do; {what} published and of the right size"
        done += f" (`kdcache verify {summary.path}` reads everything)"
        return aligned({"cache": done, "not read": str(summary.left_out)}) if summary.left_out else done
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
        (counts.num_long_prompts, "prompt", "without room for an answer skipped"),
        (counts.num_dropped_answers, "chat", "answered by the teacher, its last answer left out"),
        (counts.num_skipped, "sequence", f"that made units fail ({_names(summary)})"),
        (counts.num_truncated_tokens, "token", f"cut off {count(counts.num_truncated_items, 'item')} by policy 'truncate'"),
    ]
    shown["left out"] = "; ".join(f"{count(num, noun)} {what}" for num, noun, what in left_out if num)
    shown["not read"] = str(summary.left_out)
    shown["noted"] = noted(counts.notes)
    shown["clock"] = clock(manifest.notes.get("template_time"))
    shown["workers"] = f"{count(summary.num_workers_lost, 'worker')} died; others did their units" * (
        summary.num_workers_lost > 0
    )
    shown["set aside"] = "; ".join(f"unit {failed.unit}: {failed.reason}" for failed in summary.set_aside)
    shown["next"] = _next_step(summary, run.world_size > 1)
    return aligned({name: text for name, text in shown.items() if text})


def clock(moment: str | None) -> str:
    """The time that the chat template writes; empty where it writes none."""
    return f"the chat template writes the time as if it were {moment} (input.template_time)" if moment else ""


def noted(notes: Mapping[str, int]) -> str:
    """What was noticed about the items, and about how many of them."""
    return "; ".join(f"{count(num, 'item')}: {sentence}" for sentence, num in sorted(notes.items()))


def _names(summary: CaptureSummary, most: int = 5) -> str:
    """The first sequences that were left out, and the command that lists the others."""
    names = ", ".join(sequence.source for sequence in summary.skipped[:most])
    return names + ("" if len(summary.skipped) <= most else f", ...: kdcache info {summary.path} --skipped")


def _next_step(summary: CaptureSummary, has_ranks: bool) -> str:
    left = f"{count(summary.num_units_left, 'unit')} left"
    if summary.is_stopped:
        return f"stopped with {left}; run the same command again to resume"
    if summary.num_units_left:
        return f"{left}; run the same command again to retry"
    missing = summary.manifest.plan.num_units - len(summary.manifest.shards)
    if has_ranks and missing:
        return f"this rank is done; {missing:,} units of the others are not visible yet (the last rank to finish folds them)"
    return f"kdcache verify {summary.path}"


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
        when = "unknown until the teacher runs; --probe loads it and measures"
    else:
        when = f"about {duration(seconds)} at {estimate.tokens_per_second:,.0f} tokens/s, as measured"
    # Bytes that follow from the teacher's answers are a bound until --probe measures them.
    most = {"most": "at most ", "expected": "", "measured": "measured: "}[estimate.bytes_are]
    params = ", ".join(f"{name} {value}" for name, value in config.selection.params.items())
    at_most = "about" if config.generate is None else "at most"
    return aligned(
        {
            "input": read,
            **({"not read": str(estimate.left_out)} if estimate.left_out else {}),
            "plan": f"{count(len(plan.units), 'unit')}, {estimate.num_units_before:,} of them already published",
            **_tokens_lines(config, estimate),
            **({"clock": clock(estimate.template_time)} if estimate.template_time else {}),
            **({"noted": f"of the sampled items {noted(estimate.notes)}"} if estimate.notes else {}),
            "positions": f"{at_most} {estimate.num_positions:,}, {most}{estimate.bytes_per_position:.1f} bytes each "
            f"({config.codec_id}, {config.selection.kind}: {params})"
            + ("; fewer where the teacher is sure, which --probe measures" if estimate.bytes_are == "most" else ""),
            **_feature_lines(estimate),
            **_sidecar_lines(config, estimate),
            "cache": f"{'at most' if most.startswith('at') else at_most} {size(estimate.num_bytes)} at {config.out}",
            "time": when,
        }
    )


def _feature_lines(estimate: CaptureEstimate) -> dict[str, str]:
    shown = {}
    for found in estimate.features:
        feature, is_everywhere = found.feature, found.num_vectors == estimate.num_positions
        what = f"{source_words(feature)}, {width_words(feature)}"
        what += "" if is_everywhere and feature.pooling == "none" else f", {positions_words(feature)}"
        each = found.per if is_everywhere or feature.pooling != "none" else "vector"
        spread = f", {found.num_bytes / max(estimate.num_positions, 1):,.1f} per position" if each == "vector" else ""
        once = f" and {size(found.sidecar_bytes)} once" if found.sidecar_bytes else ""
        shown[feature.name] = f"{found.bytes_per_vector:,} bytes per {each}{spread}, {size(found.num_bytes)}{once}: {what}"
    return shown


def _sidecar_lines(config: CaptureConfig, estimate: CaptureEstimate) -> dict[str, str]:
    projection = estimate.output_projection_bytes
    known = {} if projection is None else {"output_projection": f"about {size(projection)}"}
    return {name: f"{known.get(name, 'a few MB at most')}, once, next to the shards" for name in config.sidecars}


def _tokens_lines(config: CaptureConfig, estimate: CaptureEstimate) -> dict[str, str]:
    sampled = f"(from {count(estimate.num_sampled_items, 'sampled item')})"
    if config.generate is None:
        return {"tokens": f"about {estimate.num_tokens:,} in {count(estimate.num_sequences, 'sequence')} {sampled}"}
    prompts = estimate.num_tokens - estimate.num_positions
    return {
        "tokens": f"about {prompts:,} in prompts {sampled}, at most {estimate.num_positions:,} in answers, "
        f"{count(estimate.num_sequences, 'answer')} ({config.generate.n} per prompt)"
    }
