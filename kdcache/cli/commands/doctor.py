"""`kdcache doctor PATH`: examine any cache, ours or another tool's."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from kdcache.cli.foreign_arguments import (
    add_reading_arguments,
    examine_options,
    finding_lines,
    named_tokenizer,
    progress_bar,
)
from kdcache.cli.teacher_arguments import asks_teacher, loaded, teacher_config
from kdcache.cli.wording import aligned, say_json
from kdcache.shown import say

if TYPE_CHECKING:
    from kdcache.foreign.judge.doctor import Examination


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = (
        "Examine any cache of teacher outputs, ours or another tool's, and report what is wrong with it.\n\n"
        "  kdcache doctor logprobs.parquet\n"
        "  kdcache doctor logprobs.parquet --tokenizer my/teacher --teacher my/teacher    compare with the teacher itself\n\n"
        "It finds positions shifted against their text, renormalised or unnormalised values, logits or probabilities instead\n"
        "of logprobs, broken polynomial tails, ids of a padded vocabulary, k+1 entries, duplicate ids, and an applied\n"
        "temperature. Exit status 1 if it finds anything but notes."
    )
    parser.add_argument("path", metavar="PATH", help="a file or folder")
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object")
    add_reading_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Examine and print."""
    from kdcache.foreign.formats.detect import is_own_cache, open_foreign
    from kdcache.foreign.judge.doctor import examine_opened
    from kdcache.foreign.judge.own import examine_own

    options = examine_options(args, named_tokenizer(args))
    is_own = is_own_cache(args.path)
    cache = None if is_own else open_foreign(args.path, options.read)  # before a model is loaded in vain
    with loaded(teacher_config(args) if asks_teacher(args) else None) as teacher, progress_bar("examining") as progress:
        if cache is None:
            examination = examine_own(args.path, options, teacher=teacher, progress=progress)
        else:
            examination = examine_opened(cache, options, teacher=teacher, progress=progress)
    if args.json:
        say_json(examination.to_builtins())
    else:
        say(_as_text(examination))
    return 0 if examination.is_sound else 1


def mending_command(examination: Examination) -> str | None:
    """One command that repairs everything that was found; None if nothing needs it, or something cannot be repaired."""
    repairs = [finding.repair for finding in examination.findings if finding.severity == "repairable"]
    if not repairs or any(finding.severity in ("fatal", "undecided") for finding in examination.findings):
        return None
    return " ".join(["kdcache convert", examination.path, "--out OUT --tokenizer NAME", *dict.fromkeys(filter(None, repairs))])


def _as_text(examination: Examination) -> str:
    num_wrong = sum(finding.severity != "note" for finding in examination.findings)
    verdict = "nothing wrong" if examination.is_sound else f"{num_wrong} thing{'s' * (num_wrong > 1)} wrong or unclear"
    shown = {"cache": f"{examination.path}: {examination.title}: {verdict}", **examination.facts}
    command = mending_command(examination)
    return "\n".join([aligned(shown), *finding_lines(examination), *([f"to repair it: {command}"] if command else [])])
