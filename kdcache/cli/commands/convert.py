"""`kdcache convert SOURCE --out OUT`: another tool's cache as one of ours."""

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
from kdcache.cli.wording import count, rows
from kdcache.errors import ConfigError
from kdcache.shown import say

if TYPE_CHECKING:
    from kdcache.foreign.convert import Conversion, ConvertConfig

REPAIRS = ("k+1", "duplicates", "tails")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = (
        "Write another tool's cache as one of ours. It is examined first, from end to end, as `kdcache doctor` does: what is "
        "sound is\n"
        "converted, what can be mended without a teacher is mended where you ask for it, and everything else is refused."
    )
    parser.add_argument("source", metavar="SOURCE", help="a file or folder; see `kdcache doctor`")
    parser.add_argument("--out", required=True, metavar="OUT", help="directory of the new cache; created if missing")
    parser.add_argument("--shift", type=int, choices=(-1, 0, 1), default=0, help="move every position by this much")
    parser.add_argument(
        "--repair", dest="repairs", action="append", default=[], choices=REPAIRS,
        help="k+1: the text's token beside the top k becomes the target's logprob; duplicates: keep an id's greater value; "
        "tails: leave out entries that are fitted; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--accept", action="append", default=[], metavar="FINDING",
        help="take on trust what the doctor calls unclear, as in --accept alignment_unclear; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--codec", choices=extensions.names("codecs"), default="packed", help="of the new cache (default: packed)"
    )
    parser.add_argument(
        "--model", metavar="NAME", help="the teacher's name, for the new cache's manifest (default: that of --teacher)"
    )
    add_reading_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Convert, and say what was written and what was not."""
    from kdcache.foreign.convert import convert

    options = _config(args)
    with loaded(teacher_config(args) if asks_teacher(args) else None) as teacher, progress_bar("examining") as progress:
        conversion = convert(args.source, args.out, options, teacher=teacher, progress=progress)
    say(_as_text(args, conversion))
    return 0


def _config(args: argparse.Namespace) -> ConvertConfig:
    from kdcache.foreign.convert import ConvertConfig

    tokenizer = named_tokenizer(args)
    if tokenizer is None:
        raise ConfigError("--tokenizer NAME is needed: without it nobody can tell later what the ids mean")
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
        "left out": ", ".join(f"{number:,} {reason}" for reason, number in account.left_out.items() if number),
        "mended": ", ".join(f"{number:,} by {what}" for what, number in account.repaired.items() if number),
    }
    if account.num_unknown_targets:
        shown["targets"] = (
            f"{account.num_unknown_targets:,} are outside their support and have no logprob in the source: they count as "
            "impossible "
            "and are in no NLL"
        )
    if conversion.examination.counts.vocab_size is None:
        width = manifest.identity.teacher.vocab_size
        shown["vocabulary"] = f"{width:,} ids, the tokenizer's; where the teacher's output is wider, say so with --vocab-size V"
    lines = finding_lines(conversion.examination)
    return "\n".join([rows({name: text for name, text in shown.items() if text}), *lines])
