"""Trains a small Llama-shaped teacher with its own tokenizer from scratch, on text that every machine has.

Run it as `tools/train_teacher` (which sets the environment). What is made, in --out:

  config.json, model.safetensors, tokenizer.json, ...   the teacher, in the Hugging Face layout
  text/train.jsonl, heldback.jsonl, heldout.jsonl       the text: read by the teacher; not, for its cache; for evaluation
  training.json                                         how it was trained and how good it is
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from teacher_text import SPLITS, Document, Split, TextError, split_documents, standard_library, user_text, write_jsonl

MAX_EVALUATED_TOKENS = 50_000


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="train_teacher",
        description="Train a small Llama-shaped teacher and its tokenizer from scratch.",
        epilog="Documents are divided by a hash of their names: 80%% train the teacher, 15%% are held back for a cache, "
        "5%% are held out for evaluation.",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder for the teacher and its text")
    parser.add_argument(
        "--text",
        type=Path,
        nargs="+",
        metavar="PATH",
        help="files and folders to read: UTF-8 text, or .jsonl with `text` (default: the running Python's standard library)",
    )
    parser.add_argument("--seconds", type=float, default=120, help="of training (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="of training, in place of --seconds: the same result on every run")
    parser.add_argument(
        "--min-steps", type=int, default=0, help="with --seconds: train on until so many are done (default: %(default)s)"
    )
    parser.add_argument("--hidden-size", type=int, default=256, help="a multiple of 64 (default: %(default)s)")
    parser.add_argument("--num-layers", type=int, default=4, help="(default: %(default)s)")
    parser.add_argument("--vocab-size", type=int, default=4096, help="tokens of the tokenizer (default: %(default)s)")
    parser.add_argument("--seq-len", type=int, default=256, help="tokens per sequence (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences per step (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and order (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="of the matrix products; auto: whichever is faster here, by measuring (default: auto)",
    )
    arguments = parser.parse_args(argv)
    check_arguments(parser, arguments)
    return arguments


def check_arguments(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Ends the program with status 2 and a sentence where an argument is impossible."""
    for name in ("hidden_size", "num_layers", "seq_len", "batch_size", "seconds", "steps", "threads"):
        value = getattr(arguments, name)
        if value is not None and value <= 0:
            parser.error(f"--{name.replace('_', '-')} is {value}, but must be above 0")
    if arguments.hidden_size % 64:
        parser.error(f"--hidden-size is {arguments.hidden_size}, but must be a multiple of 64, the size of an attention head")
    if arguments.vocab_size < 300:
        parser.error(f"--vocab-size is {arguments.vocab_size}, but must be at least 300: bytes, special tokens, merges")
    if arguments.out.exists() and (not arguments.out.is_dir() or any(arguments.out.iterdir())):
        parser.error(f"--out {arguments.out} is there already and is not an empty folder; remove it, or name another")


def choose_dtype(name: str) -> Any:
    """float32 or bfloat16: for `auto`, whichever is faster on this processor by a small product."""
    import torch

    from kdcache.half_precision import is_emulated

    return torch.float32 if name == "float32" or (name == "auto" and is_emulated(torch.bfloat16)) else torch.bfloat16


def report(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    try:
        summary = make_teacher(arguments)
    except TextError as error:
        report(f"train_teacher: {error}")
        return 2
    print(describe(summary))
    print(f"teacher: {arguments.out}")
    return 0


def make_teacher(arguments: argparse.Namespace) -> dict[str, Any]:
    """The whole job; a folder under its final name is a teacher that is done."""
    splits = split_documents(user_text(arguments.text) if arguments.text else standard_library())
    report(", ".join(f"{name} {len(splits[name]):,} documents" for name in SPLITS))
    partial = arguments.out.with_name(arguments.out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "text").mkdir(parents=True)
    for name in SPLITS:
        write_jsonl(splits[name], partial / "text" / f"{name}.jsonl")
    summary = train_and_save(arguments, splits, partial)
    (partial / "training.json").write_text(json.dumps(summary, indent=2) + "\n")
    partial.replace(arguments.out)
    return summary


def train_and_save(arguments: argparse.Namespace, splits: dict[Split, list[Document]], folder: Path) -> dict[str, Any]:
    """Train tokenizer and model, save them in the folder, and measure the model on the held-out text."""
    import torch
    from teacher_model import Recipe, build_model, mean_nll, train
    from teacher_tokenizer import num_bytes, train_tokenizer

    num_threads = arguments.threads or torch.get_num_threads()
    started = time.monotonic()
    tokenizer = train_tokenizer([document.text for document in splits["train"]], arguments.vocab_size, arguments.seed)
    ids_N, heldout_N = encode(tokenizer, splits["train"]), encode(tokenizer, splits["heldout"])[:MAX_EVALUATED_TOKENS]
    report(f"tokenizer: {len(tokenizer):,} tokens, {len(ids_N):,} to train on, in {time.monotonic() - started:.1f} s")
    recipe = Recipe(
        vocab_size=len(tokenizer),
        hidden_size=arguments.hidden_size,
        num_layers=arguments.num_layers,
        seq_len=arguments.seq_len,
        batch_size=arguments.batch_size,
        seconds=arguments.seconds,
        steps=arguments.steps,
        min_steps=arguments.min_steps,
        dtype=choose_dtype(arguments.dtype),
        matrix_dtype=choose_dtype("auto"),
        seed=arguments.seed,
    )
    model = build_model(recipe, tokenizer.bos_token_id)
    num_parameters = sum(weight.numel() for weight in model.parameters())
    report(f"model: {num_parameters:,} parameters, {num_threads} threads, {recipe.dtype}")
    trained = train(model, ids_N, recipe, num_threads)
    loss = mean_nll(model.eval(), heldout_N, arguments.seq_len, num_threads)
    model.config.use_cache = True
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {
        "heldout_nats_per_token": loss,
        "heldout_nats_per_byte": loss * len(heldout_N) / num_bytes(tokenizer, heldout_N),
        "num_parameters": num_parameters,
        "tokens_in_text": len(ids_N),
        **{f"trained_{name}": value for name, value in asdict(trained).items()},
        "recipe": {
            name: str(value).removeprefix("torch.") if "dtype" in name else value for name, value in asdict(recipe).items()
        },
    }


def encode(tokenizer: Any, documents: list[Document]) -> NDArray[np.int32]:
    from teacher_tokenizer import encode_all

    return encode_all(tokenizer, (document.text for document in documents))


def describe(summary: dict[str, Any]) -> str:
    """One line for people."""
    tokens, seconds = summary["trained_num_tokens"], summary["trained_seconds"]
    per_token, per_byte = summary["heldout_nats_per_token"], summary["heldout_nats_per_byte"]
    loss = "no held-out window" if math.isnan(per_token) else f"{per_token:.3f} nats per token, {per_byte:.3f} per byte"
    return (
        f"held-out loss {loss}; {tokens:,} tokens seen ({tokens / summary['tokens_in_text']:.1f} passes) in {seconds:.0f} s, "
        f"{tokens / seconds:,.0f} tokens/s"
    )


if __name__ == "__main__":
    sys.exit(main())
