"""`kdcache doctor PATH`: what a cache is, ours or another tool's, and what is wrong with it."""

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
from kdcache.cli.wording import rows, say_json
from kdcache.shown import say

if TYPE_CHECKING:
    from kdcache.foreign.judge.doctor import Examination


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = (
        "Read a cache of teacher outputs, ours or another tool's, from end to end; say what it is and what is wrong with it:\n"
        "positions shifted against their text, renormalised or unnormalised values, logits or probabilities instead of\n"
        "logprobs, broken polynomial tails, ids of a padded vocabulary, k+1 entries, duplicate ids, a temperature that was\n"
        "applied. Exit status 1 when there is anything but notes."
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
    cache = None if is_own else open_foreign(args.path, options.read)  # before a model is loaded for nothing
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
    """One command that mends everything that was found; None where there is nothing to mend, or where something cannot be."""
    repairs = [finding.repair for finding in examination.findings if finding.severity == "repairable"]
    if not repairs or any(finding.severity in ("fatal", "undecided") for finding in examination.findings):
        return None
    return " ".join(["kdcache convert", examination.path, "--out OUT --tokenizer NAME", *dict.fromkeys(filter(None, repairs))])


def _as_text(examination: Examination) -> str:
    number = sum(finding.severity != "note" for finding in examination.findings)
    verdict = "nothing wrong" if examination.is_sound else f"{number} thing{'s' * (number > 1)} wrong or unclear"
    shown = {"cache": f"{examination.path}: {examination.title}: {verdict}", **examination.facts}
    command = mending_command(examination)
    return "\n".join([rows(shown), *finding_lines(examination), *([f"mended by: {command}"] if command else [])])
