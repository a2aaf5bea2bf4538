"""`kdcache verify CACHE`: read a whole cache again and check everything it claims; with --deep ask its teacher."""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from kdcache.cli.nll_wording import alignment, conversion, left_out
from kdcache.cli.teacher_arguments import (
    add_sample_arguments,
    add_teacher_arguments,
    asks_teacher,
    loaded,
    setting_differences,
    teacher_config,
    unnamed_teacher,
)
from kdcache.cli.wording import aligned, count, say_json, size
from kdcache.errors import ConfigError
from kdcache.shown import say, shown

if TYPE_CHECKING:
    from kdcache.foreign.judge.deep import DeepReport
    from kdcache.store.verify import VerifyReport


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = (
        "Read a whole cache again and check everything it claims.\n\n"
        "  kdcache verify cache\n"
        "  kdcache verify cache --deep --teacher my/teacher        ask the teacher again about a random sample\n\n"
        "Checks the chain of manifests, the SHA-256 of each shard, the digest of each sequence, each record, and that the\n"
        "teacher's NLL of the text, recomputed from the cache, is the one that the teacher reported. Exit status 1 if\n"
        "anything is wrong.\n\n"
        "--deep compares live and cached distributions (KL), and the live teacher with itself in a batch, because an answer\n"
        "that depends on its neighbours is wrong. It also tries positions shifted by -1, 0 and +1, compares the NLL, and\n"
        "computes what the missing tail can cost."
    )
    parser.add_argument("cache", metavar="CACHE", help="the cache's directory, or its URI in an object store")
    parser.add_argument("--deep", action="store_true", help="ask the teacher again about a random sample of the sequences")
    add_teacher_arguments(parser, what="--deep: hub id or folder of the teacher; never taken from the cache")
    add_sample_arguments(parser, prefix="--deep: ")
    parser.add_argument(
        "--tolerance",
        type=float,
        metavar="NATS",
        help="--deep: mean KL allowed (default: what codec, engine and the live teacher's own variation explain)",
    )
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Verify with a progress bar; damage goes to stderr, a sentence each."""
    _check_flags(args)
    if args.deep and not asks_teacher(args):
        raise _unnamed(args.cache)
    from tqdm import tqdm

    from kdcache.bars import bar_options
    from kdcache.store.verify import verify_cache

    with tqdm(**bar_options(desc="verifying", unit="B", unit_scale=True, delay=1.0)) as bar:

        def progress(num_done: int, num_all: int) -> None:
            bar.total = num_all
            bar.update(num_done - bar.n)

        report = verify_cache(args.cache, progress)
    for problem in report.problems:
        say(f"damaged: {shown(problem)}", sys.stderr)
    if report.problems:
        say(f"`kdcache repair {args.cache}` sets damaged units aside, so that they can be made again", sys.stderr)
    deep = _ask_teacher(args) if args.deep and report.is_sound else None
    for problem in deep.problems if deep is not None else ():
        say(f"wrong: {shown(problem)}", sys.stderr)
    if args.json:
        say_json(_fields(report, deep))
    else:
        say(_as_text(args.cache, report, deep))
    return 0 if report.is_sound and (deep is None or deep.is_sound) else 1


def _check_flags(args: argparse.Namespace) -> None:
    names = ("teacher", "teacher_config", "backend", "dtype", "tolerance")
    for_deep = [name.replace("_", "-") for name in names if getattr(args, name) is not None]
    if for_deep and not args.deep:
        raise ConfigError(f"--{for_deep[0]} needs --deep, which asks the teacher")
    if args.tolerance is not None and not args.tolerance >= 0:
        raise ConfigError(f"--tolerance is {args.tolerance}, expected nats, 0 or more")


def _unnamed(cache: str) -> ConfigError:
    from kdcache.store.reader import open_reader

    with open_reader(cache) as reader:
        return unnamed_teacher(cache, reader.manifest.config.get("teacher"))


def _ask_teacher(args: argparse.Namespace) -> DeepReport:
    from kdcache.foreign.judge.deep import DeepConfig, verify_deep
    from kdcache.store.reader import open_reader

    options = DeepConfig(num_sequences=args.num_sequences, seed=args.seed, tolerance_nats=args.tolerance)
    with open_reader(args.cache) as reader:
        config = teacher_config(args)
        for line in setting_differences(config, reader.manifest.config.get("teacher")):
            say(line, sys.stderr)
        with loaded(config) as teacher:
            assert teacher is not None
            return verify_deep(reader, teacher, options)


def _fields(report: VerifyReport, deep: DeepReport | None) -> dict[str, Any]:
    fields = {name: value for name, value in vars(report).items() if name != "manifest"} | {"sound": report.is_sound}
    manifest, notes = report.manifest, conversion(report.manifest)
    fields |= {name: manifest.total(name) for name in ("num_targets", "num_impossible_targets")}
    fields["states"] = None if report.states is None else asdict(report.states)
    fields |= {"alignment": None if notes is None else notes.get("alignment", {"proven_by": None})}
    return fields | {"snapshot": report.manifest.digest, "deep": None if deep is None else deep.to_builtins()}


def _as_text(path: str, report: VerifyReport, deep: DeepReport | None) -> str:
    text = _report_text(path, report)
    return text if deep is None else f"{text}\n{_deep_text(deep)}"


def _deep_text(deep: DeepReport) -> str:
    shifts = ", ".join(f"{shift:+d}: {kl:.3g}" for shift, kl in zip((-1, 0, 1), deep.shift_kl, strict=True))
    asked = f"{count(len(deep.sequences), 'sequence')}, {count(deep.num_positions, 'position')}"
    lines = {
        "teacher": f"{'agrees' if deep.is_sound else 'does not agree'}: asked again about {asked}",
        "  KL(live || cached)": f"{_spread(deep.kl_mean, deep.kl_p99, deep.kl_max)} (allowed: mean {deep.allowed:.3g})",
        "  KL(live || live)": f"{_spread(deep.control_mean, deep.control_p99, deep.control_max)}, alone and in a batch",
        "  positions shifted": f"{shifts} nats",
        "  logprobs": f"at most {deep.max_difference:.3g} nats apart; cached = {deep.slope:.4f} x live",
        "  NLL": f"cached {deep.cached_nll:.6f}, live {deep.live_nll:.6f} nats, at most {deep.nll_difference:.3g} apart",
        "  kept mass": f"{deep.kept_mass:.5f}; renormalising the support would cost {deep.renormalisation_cost:.4f} nats",
    }
    return aligned(lines)


def _spread(mean: float, high: float, most: float) -> str:
    return f"mean {mean:.3g}, 99% {high:.3g}, max {most:.3g} nats"


def _verdict(report: VerifyReport) -> str:
    if not report.is_sound:
        return f"{count(len(report.problems), 'problem')} found"
    notes = conversion(report.manifest)
    proof = None if notes is None else notes.get("alignment")
    if notes is None or (isinstance(proof, dict) and proof.get("proven_by")):
        return "sound"
    return "its bytes are sound, its alignment was not proven"


def _report_text(path: str, report: VerifyReport) -> str:
    manifest = report.manifest
    num_done, num_units = len(manifest.shards), manifest.plan.num_units
    command = "derive" if manifest.lineage else "capture"  # UNSET is false
    state = f" ({num_done:,} of {count(num_units, 'unit')}; `kdcache {command}` resumes)"
    if manifest.is_complete:
        state = " (complete)" if report.is_sound else ""  # damage is not called complete
    lines = {
        "cache": f"{path}: {_verdict(report)}{state}",
        "read": f"{count(report.num_sequences, 'sequence')}, {count(report.num_positions, 'position')}, "
        f"{size(report.num_bytes)}",
    }
    if not math.isnan(report.teacher_nll):
        lines["NLL"] = (
            f"teacher {report.teacher_nll:.6f} nats per target, recomputed from the cache {report.cached_nll:.6f} "
            f"(difference {abs(report.teacher_nll - report.cached_nll):.1e}, the codec's bound {report.nll_bound:.1e})"
        )
    if (states := report.states) is not None:
        lines["states"] = (
            f"{states.feature} through the output projection gives logprobs {states.difference:.2g} nats from the stored ones "
            f"(moved by a position: {states.moved:.2g}), at {count(states.num_positions, 'position')}"
        )
    if missing := left_out(manifest):
        lines["left out"] = missing
    return aligned(lines | alignment(manifest))
