"""What a server's answers to a few short prompts prove. Pure functions."""

from __future__ import annotations

import re
from collections.abc import Sequence

from kdcache.errors import TeacherError
from kdcache.teacher.served.answers import Completion, Row, read_rows
from kdcache.teacher.tokenizer import Tokenizer

PROBE_TOKENS = 8

MAX_ERROR_NATS = 0.25
"""Most that the same row may differ between two answers: in half precision another batch rounds differently, by a unit in the
last place of a logit. A temperature of 0.5 moves rows by nats."""

SPREAD_IDS = 512
"""Ids from all over the vocabulary whose text the tokenizers are compared on."""

SPECIAL = re.compile(r"<[^<>]+>|\[[A-Z_/]+\]")

TEXT = "Hello world,  two  spaces\tand\n\nlines; naive cafe 12345.678 x = [1, 2]  # \u00e9\u4e2d\U0001f600 "


def probe_prompts(vocab_size: int) -> tuple[list[int], list[int]]:
    """A short prompt, and the same with one token more."""
    longer = [(1 + 7 * index) % vocab_size for index in range(PROBE_TOKENS + 1)]
    return longer[:-1], longer


def compare_rows(at_1: tuple[Completion, Sequence[int]], at_half: tuple[Completion, Sequence[int]], api: str) -> str | None:
    """What is wrong with the rows of `probe_prompts`, asked at temperature 1 and the longer at 0.5; None where nothing is.

    The shorter prompt's last row is the generated token's, the longer prompt's row there is the prompt's own.
    """
    try:
        short_rows, _ = read_rows(at_1[0], api, at_1[1])
        long_rows, _ = read_rows(at_half[0], api, at_half[1])
    except TeacherError as error:
        return str(error)
    last = len(short_rows) - 1
    errors = [_difference(short, long) for short, long in zip(short_rows, long_rows, strict=False)]
    if max(errors[:last], default=0.0) > MAX_ERROR_NATS:
        return (
            f"its logprobs of a prompt change by {max(errors[:last]):.2g} nats with the temperature; start vLLM with "
            "--logprobs-mode raw_logprobs, which is its default"
        )
    if errors[last] > MAX_ERROR_NATS:
        return (
            f"its logprobs of a generated token are {errors[last]:.2g} nats from those at the same place in a prompt, so that "
            "a sequence's last position would be wrong; start vLLM with --logprobs-mode raw_logprobs, which is its default"
        )
    return None


def tokenizer_texts(tokenizer: Tokenizer) -> tuple[str, str]:
    """Two texts that tokenizers which differ are unlikely to cut alike: prose, digits, spaces and pieces from all over the
    vocabulary; and those of the pieces that look like special tokens, which some tokenizers do not read from a text."""
    size = tokenizer.identity.vocab_size
    pieces = [tokenizer.decode([token]) for token in sorted({index * size // SPREAD_IDS for index in range(SPREAD_IDS)})]
    special = [piece for piece in pieces if SPECIAL.fullmatch(piece)]
    return TEXT + "".join(piece for piece in pieces if piece not in special), "".join(special)


def compare_ids(ours: Sequence[int], theirs: Sequence[int]) -> str | None:
    """Where two tokenizers' ids of the same text part; None where they do not."""
    for place, (mine, yours) in enumerate(zip(ours, theirs, strict=False)):
        if mine != yours:
            return f"of the same text token {place} is {yours!r:.40} there and {mine} here"
    if len(ours) != len(theirs):
        return f"of the same text it makes {len(theirs)} tokens, and ours {len(ours)}"
    return None


def _difference(first: Row, second: Row) -> float:
    """Largest, over the tokens that both rows have; two rows without one in common are infinitely far apart."""
    shared = first.keys() & second.keys()
    return max((abs(first[token] - second[token]) for token in shared), default=float("inf"))
