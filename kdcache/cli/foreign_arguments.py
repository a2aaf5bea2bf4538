"""What `doctor` and `convert` share: flags for what a foreign cache's files do not tell."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from kdcache.cli.teacher_arguments import add_sample_arguments, add_teacher_arguments, at_least
from kdcache.errors import ConfigError
from kdcache.shown import shown

if TYPE_CHECKING:
    from kdcache.foreign.base import ReadConfig
    from kdcache.foreign.judge.doctor import Examination, ExamineConfig, Progress
    from kdcache.teacher.tokenizer import Tokenizer

FORMATS = """
formats: DistillKit (Parquet, or Arrow after its packing pass; needs its compression_config.yaml), Axolotl v2 logprob columns,
NeMo-Aligner top-k JSON lines, answers of vLLM, SGLang and OpenAI-like servers kept as JSON lines, plain columns of ids and
values or of {token_id, logprob} lists (Parquet, Arrow, `datasets` folders, JSON lines, compressed ones too), Megatron-LM tars
(examined, not converted: they hold no tokens). Pickles are not opened.
"""


def add_reading_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare how the files are read, and which teacher is asked."""
    parser.epilog = FORMATS.strip()
    parser.add_argument(
        "--column", dest="columns", action="append", default=[], metavar="OURS=NAME",
        help="which column is which, as in --column values=lps; OURS is tokens, ids, values, entries "
        "(lists of {token_id, logprob}), log_z, labels, loss_mask or attention_mask",
    )  # fmt: skip
    parser.add_argument(
        "--values",
        choices=("logprobs", "logits", "probs", "nll"),
        help="what the values are, whatever their column is called; nll: -log p",
    )
    parser.add_argument(
        "--config", metavar="FILE", help="DistillKit's compression_config.yaml, or a training config that repeats it"
    )
    parser.add_argument(
        "--first-position", type=at_least(0), metavar="P",
        help="position of the first stored distribution (plain and Axolotl columns; position t has read tokens 0..t)",
    )  # fmt: skip
    parser.add_argument("--vocab-size", type=at_least(1), metavar="V", help="width of the teacher's output, padding included")
    parser.add_argument("--tokenizer", metavar="NAME", help="hub id or folder of the tokenizer that made the token ids")
    add_teacher_arguments(parser, what="ask this model about a random sample: what the text can only suggest becomes exact")
    add_sample_arguments(parser)


def read_options(args: argparse.Namespace, tokenizer: Tokenizer | None) -> ReadConfig:
    """How the files are read, from the flags; raises ConfigError for a --column without OURS=NAME."""
    from kdcache.foreign.base import ReadConfig

    columns = {}
    for argument in args.columns:
        ours, equals, theirs = argument.partition("=")
        if not (ours and equals and theirs):
            raise ConfigError(f"--column {argument!r}: expected OURS=NAME, as in tokens=input_ids")
        columns[ours] = theirs
    return ReadConfig(
        columns=columns, values=args.values, config=args.config, first_position=args.first_position, tokenizer=tokenizer
    )


def examine_options(args: argparse.Namespace, tokenizer: Tokenizer | None) -> ExamineConfig:
    """How closely to look, from the flags."""
    from kdcache.foreign.judge.doctor import ExamineConfig

    return ExamineConfig(
        read=read_options(args, tokenizer),
        vocab_size=args.vocab_size,
        tokenizer_size=None if tokenizer is None else tokenizer.identity.vocab_size,
        num_sequences=args.num_sequences,
        seed=args.seed,
    )


def named_tokenizer(args: argparse.Namespace) -> Tokenizer | None:
    """The tokenizer that --tokenizer names; None for none."""
    if args.tokenizer is None:
        return None
    from kdcache.teacher import load_tokenizer

    return load_tokenizer(args.tokenizer)


@contextmanager
def progress_bar(text: str) -> Iterator[Progress]:
    """A progress bar on stderr that counts distributions."""
    from tqdm import tqdm

    from kdcache.bars import bar_options

    with tqdm(**bar_options(desc=text, unit=" positions", unit_scale=True, delay=1.0)) as bar:
        yield bar.update


def finding_lines(examination: Examination) -> list[str]:
    """A line for each finding, the worst first."""
    order = ("fatal", "repairable", "undecided", "note")
    words = {"fatal": "wrong", "repairable": "wrong", "undecided": "unclear", "note": "note"}
    lines = []
    for finding in sorted(examination.findings, key=lambda finding: order.index(finding.severity)):
        mended = f" [kdcache convert {finding.repair}]" if finding.repair else ""
        lines.append(shown(f"{words[finding.severity]}: {finding.name}: {finding.sentence}{mended}"))
    return lines
