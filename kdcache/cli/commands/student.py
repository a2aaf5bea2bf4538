"""`kdcache student TEACHER --out DIR`: a student cut from its teacher, as a folder that loads anywhere."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from kdcache.cli.teacher_arguments import at_least
from kdcache.errors import ConfigError
from kdcache.extras import require
from kdcache.shown import say

_LAYERS = ("every", "count", "keep", "pattern", "drop")
_WIDTH = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = (
        "Make a student of a teacher's layers and of part of their width, with copies of its weights.\n\n"
        "  kdcache student my/teacher --out student --every 2\n"
        "  kdcache student my/teacher --out student --drop 8 --data texts.jsonl --heldout heldout.jsonl\n"
        "  kdcache student my/teacher --out student --hidden-size 3072 --intermediate-size 9216 --cache my/cache\n\n"
        "The folder is in the Hugging Face layout, with tokenizer and report.json. `kdcache train` does the same with\n"
        "`student.init: from_teacher`. What is left out is what does least on the text of --data or --cache."
    )
    parser.add_argument("teacher", metavar="TEACHER", help="the teacher: a folder or a hub id")
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="folder for the student; must not be there yet, or be empty"
    )
    parser.add_argument("--revision", metavar="NAME", help="of the teacher: hub commit or tag")
    layers = parser.add_mutually_exclusive_group()
    layers.add_argument("--every", type=at_least(1), metavar="K", help="keep every K-th layer, the last among them")
    layers.add_argument("--count", type=at_least(1), metavar="N", help="keep N layers, spread evenly")
    layers.add_argument("--keep", type=_indices, metavar="I,J,...", help="keep these layers, counted from 0")
    layers.add_argument("--pattern", choices=["distilbert"], help="keep half of the layers with both ends: 0,2,4,7,9,11 of 12")
    layers.add_argument("--drop", type=at_least(1), metavar="N", help="leave out the N layers that do least")
    parser.add_argument(
        "--by", choices=["block_influence", "angular_distance"], default="block_influence",
        help="with --drop: single layers, or neighbours that do least together (default: block_influence)",
    )  # fmt: skip
    for name in _WIDTH:
        words = name.replace("num_", "").replace("_", " ")
        parser.add_argument(f"--{name.replace('_', '-')}", type=at_least(1), metavar="N", help=f"the student's {words}")
    parser.add_argument("--data", metavar="FILE", help="text to measure the teacher on: JSON lines, Parquet or Arrow")
    parser.add_argument(
        "--cache", metavar="CACHE", help="or a cache of this teacher: what its capture measured, or its sequences"
    )
    parser.add_argument("--num-sequences", type=at_least(1), default=256, metavar="N", help="how many to read (default: 256)")
    parser.add_argument("--window", type=at_least(2), default=512, metavar="N", help="most tokens of one (default: 512)")
    parser.add_argument("--heldout", metavar="FILE", help="text on which teacher and student are scored, before any training")
    parser.add_argument("--max-tokens", type=at_least(2), default=20_000, metavar="N", help="of it (default: 20000)")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto", help="of the weights")


def run(args: argparse.Namespace) -> int:
    """Cut; print the report's tables, and write the folder."""
    config = _config(args)
    require("torch", "transformers", purpose="kdcache student", extra="train")
    from kdcache.report.student import layer_table, size_table, student_sentences
    from kdcache.train.init.standalone import StandaloneConfig, make_student

    report = make_student(
        StandaloneConfig(
            student=config, out=args.out, cache=args.cache, heldout=args.heldout, max_tokens=args.max_tokens, dtype=args.dtype
        )
    )
    layers = layer_table(report)
    if layers is not None:
        say(f"{layers.to_text()}\n")
    say(size_table(report).to_text())
    say("\n".join(["", *student_sentences(report), f"model: {Path(args.out)}"]))
    return 0


def _config(args: argparse.Namespace) -> Any:
    from kdcache.config.load import convert_config
    from kdcache.config.train import StudentConfig

    if args.data is not None and args.cache is not None:
        raise ConfigError("--data and --cache are both given; the teacher is measured on one of them")
    layers = {name: value for name in _LAYERS if (value := getattr(args, name)) is not None}
    width = {name: value for name in _WIDTH if (value := getattr(args, name)) is not None}
    if not layers and not width:
        raise ConfigError(
            "nothing is cut: say which layers are kept (--every, --count, --keep, --pattern or --drop), or a width "
            "(--hidden-size, --intermediate-size, --num-attention-heads)"
        )
    fields: dict[str, Any] = {
        "model": args.teacher, "revision": args.revision, "init": "from_teacher", "width": width or None,
        "layers": {**layers, "by": args.by} if layers else None,
        "statistics": {"data": args.data, "num_sequences": args.num_sequences, "window": args.window},
    }  # fmt: skip
    return convert_config(fields, StudentConfig)


def _indices(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


_indices.__name__ = "list of whole numbers"  # argparse shows it
