"""Held-out text: read by the reader of training texts, tokenised, cut into windows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kdcache.errors import InputError
from kdcache.inputs.formats.any_file import read_text_or_ids
from kdcache.teacher.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, eq=False)
class HeldoutSequence:
    """One window of a held-out text.

    Attributes:
        input_ids_N: (N,) int64, N >= 2; tokens 1..N-1 are predicted.
        num_bytes: UTF-8 bytes of the predicted tokens' text.
        text: which text of the file it is part of, from 0.
    """

    input_ids_N: NDArray[np.int64]
    num_bytes: int
    text: int

    @property
    def num_targets(self) -> int:
        """Predicted tokens, N - 1."""
        return len(self.input_ids_N) - 1


def read_heldout(
    path: str | Path, tokenizer: Tokenizer, *, window: int, max_tokens: int | None = None
) -> list[HeldoutSequence]:
    """The file's texts as windows, in order.

    Args:
        path: JSON lines or an array, also compressed, or a Parquet or Arrow file; each row has a string `text` or a list of
            token ids `input_ids`.
        tokenizer: makes ids of text, special tokens included, and text of ids, to count its bytes.
        window: most tokens in a sequence; a leftover of one token predicts nothing and is left out.
        max_tokens: keep no more than these, windows evenly spread over the whole file; None for all. At least 2.

    Raises:
        InputError: an unreadable file or line (named), or a file without two tokens to predict.
    """
    if not Path(path).is_file():
        there = "it is a folder; name one of its files" if Path(path).is_dir() else "it does not exist"
        raise InputError(
            f"{path}: held-out data cannot be read: {there} (in `kdcache train` heldout.data; null measures nothing)"
        )
    size = min(window, max_tokens) if max_tokens is not None else window
    pieces = [
        (index, ids[start : start + size])
        for index, ids in enumerate(_texts(Path(path), tokenizer))
        for start in range(0, len(ids) - 1, size)
    ]
    if not pieces:
        raise InputError(f"{path}: no row has the two tokens that a prediction needs")
    kept = _spread([len(ids) for _, ids in pieces], max_tokens)
    return [_sequence(index, ids, tokenizer) for (index, ids), keep in zip(pieces, kept, strict=True) if keep]


def _spread(lengths: list[int], max_tokens: int | None) -> list[bool]:
    """Which pieces to keep: each one that still fits into the share of max_tokens that is due when it comes."""
    total = sum(lengths)
    if max_tokens is None or total <= max_tokens:
        return [True] * len(lengths)
    seen = kept = 0
    chosen = []
    for length in lengths:
        seen += length
        chosen.append((kept + length) * total <= max_tokens * seen)
        kept += length * chosen[-1]
    return chosen


def _sequence(index: int, ids: list[int], tokenizer: Tokenizer) -> HeldoutSequence:
    num_bytes = len(tokenizer.decode(ids[1:]).encode())
    return HeldoutSequence(np.asarray(ids, np.int64), num_bytes, index)


def _texts(path: Path, tokenizer: Tokenizer) -> Iterator[list[int]]:
    vocab_size = tokenizer.identity.vocab_size
    for item in read_text_or_ids(path.as_posix()):
        if isinstance(item.content, str):
            yield list(tokenizer.encode(item.content, True)) if item.content else []
            continue
        ids = np.asarray(item.content)
        outside = ids[(ids < 0) | (ids >= vocab_size)]
        if outside.size:
            raise InputError(f"{item.source}: token id {outside[0]} is not one of the vocabulary's {vocab_size:,}")
        yield ids.tolist()
