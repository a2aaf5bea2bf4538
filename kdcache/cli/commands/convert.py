"""`kdcache convert SOURCE --out OUT`: convert another tool's cache to a kdcache cache."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from kdcache import extensions
from kdcache.cli.foreign_arguments import (
    add_reading_arguments,
    examine_options,
    finding_lines,
    named_tokenizer,
    progress_bar,
)
from kdcache.cli.teacher_arguments import asks_teacher, loaded, teacher_config
from kdcache.cli.wording import aligned, count
from kdcache.errors import ConfigError
from kdcache.shown import say

if TYPE_CHECKING:
    from kdcache.foreign.convert import Conversion, ConvertConfig

REPAIRS = ("k+1", "duplicates", "tails")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = (
        "Convert another tool's cache to a kdcache cache.\n\n"
        "  kdcache convert logprobs.parquet --out cache --tokenizer my/teacher\n"
        "  kdcache convert logprobs.parquet --out cache --tokenizer my/teacher --shift -1 --repair tails\n\n"
        "The source is examined first, completely, as `kdcache doctor` does. What is sound is converted; what can be repaired\n"
        "without a teacher is repaired if you ask for it; everything else is refused."
    )
    parser.add_argument("source", metavar="SOURCE", help="a file or folder; see `kdcache doctor`")
    parser.add_argument("--out", required=True, metavar="OUT", help="directory of the new cache; created if missing")
    parser.add_argument("--shift", type=int, choices=(-1, 0, 1), default=0, help="move all positions by this many")
    parser.add_argument(
        "--repair", dest="repairs", action="append", default=[], choices=REPAIRS,
        help="k+1: the text's own token, stored after the top k, becomes the target's logprob; duplicates: keep the greater "
        "value of an id; tails: leave out entries whose values are fitted; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--accept", action="append", default=[], metavar="FINDING",
        help="trust what the doctor calls unclear, as in --accept alignment_unclear; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--codec", choices=extensions.names("codecs"), default="packed", help="of the new cache (default: packed)"
    )
    parser.add_argument(
        "--model", metavar="NAME", help="the teacher's name, for the new cache's manifest (default: that of --teacher)"
    )
    add_reading_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Convert, and print what was written and what was not."""
    from kdcache.foreign.convert import convert

    config = _config(args)
    with loaded(teacher_config(args) if asks_teacher(args) else None) as teacher, progress_bar("examining") as progress:
        conversion = convert(args.source, args.out, config, teacher=teacher, progress=progress)
    say(_as_text(args, conversion))
    return 0


def _config(args: argparse.Namespace) -> ConvertConfig:
    from kdcache.foreign.convert import ConvertConfig

    tokenizer = named_tokenizer(args)
    if tokenizer is None:
        raise ConfigError("--tokenizer NAME is needed, because the ids mean nothing without it")
    return ConvertConfig(
        tokenizer=tokenizer.identity,
        model=args.model or (teacher_config(args).model if asks_teacher(args) else "unknown"),
        codec=args.codec,
        shift=args.shift,
        repairs=frozenset(args.repairs),
        accept=frozenset(args.accept),
        examine=examine_options(args, tokenizer),
    )


def _as_text(args: argparse.Namespace, conversion: Conversion) -> str:
    account, manifest = conversion.account, conversion.manifest
    shown = {
        "converted": f"{args.source}: {conversion.examination.title}",
        "cache": f"{args.out}: {count(manifest.total('num_sequences'), 'sequence')}, "
        f"{count(manifest.total('num_positions'), 'position')}, snapshot {manifest.number}",
        "left out": ", ".join(f"{num:,} {reason}" for reason, num in account.left_out.items() if num),
        "repaired": ", ".join(f"{num:,} by {what}" for what, num in account.repaired.items() if num),
    }
    if account.num_unknown_targets:
        shown["targets"] = (
            f"{account.num_unknown_targets:,} are outside their support and have no logprob in the source: they count as "
            "impossible and are left out of the NLL"
        )
    if conversion.examination.counts.vocab_size is None:
        width = manifest.identity.teacher.vocab_size
        shown["vocabulary"] = f"{width:,} ids, as the tokenizer has; if the teacher's output is wider, pass --vocab-size V"
    lines = finding_lines(conversion.examination)
    return "\n".join([aligned({name: text for name, text in shown.items() if text}), *lines])
