"""What a server's answers to a few short prompts prove. Pure functions."""

from __future__ import annotations

import re
from collections.abc import Sequence

from kdcache.errors import TeacherError
from kdcache.teacher.served.answers import Completion, Logprobs, read_positions
from kdcache.teacher.tokenizer import Tokenizer

PROBE_TOKENS = 8

MAX_ERROR_NATS = 0.25
"""How far logprobs of a position may differ between two answers: in half precision another batch
rounds differently, by a unit in a logit's last digit. A temperature of 0.5 moves them by nats."""

SPREAD_IDS = 512
"""How many ids from all over the vocabulary give the text that tokenizers are compared on."""

SPECIAL = re.compile(r"<[^<>]+>|\[[A-Z_/]+\]")

TEXT = "Hello world,  two  spaces\tand\n\nlines; naive cafe 12345.678 x = [1, 2]  # \u00e9\u4e2d\U0001f600 "


def probe_prompts(vocab_size: int) -> tuple[list[int], list[int]]:
    """A short prompt, and the same with one more token."""
    longer = [(1 + 7 * index) % vocab_size for index in range(PROBE_TOKENS + 1)]
    return longer[:-1], longer


def compare_answers(at_1: tuple[Completion, Sequence[int]], at_half: tuple[Completion, Sequence[int]], api: str) -> str | None:
    """What is wrong with the answers to `probe_prompts`, the shorter at temperature 1 and the
    longer at 0.5; None if nothing is.

    The last position of the shorter prompt is that of the generated token; in the longer prompt it is one of the prompt's own.
    """
    try:
        short, _ = read_positions(at_1[0], api, at_1[1])
        long, _ = read_positions(at_half[0], api, at_half[1])
    except TeacherError as error:
        return str(error)
    last = len(short) - 1
    errors = [_difference(*pair) for pair in zip(short, long, strict=False)]
    if max(errors[:last], default=0.0) > MAX_ERROR_NATS:
        return (
            f"its logprobs of a prompt change by {max(errors[:last]):.2g} nats with the temperature; start vLLM with "
            "--logprobs-mode raw_logprobs, which is its default"
        )
    if errors[last] > MAX_ERROR_NATS:
        return (
            f"its logprobs of a generated token are {errors[last]:.2g} nats away from those at the same position of a prompt, "
            "so a sequence's last position would be wrong; start vLLM with --logprobs-mode raw_logprobs, which is its default"
        )
    return None


def tokenizer_texts(tokenizer: Tokenizer) -> tuple[str, str]:
    """Two texts that different tokenizers are unlikely to cut alike.

    The first is prose, digits, spaces and pieces from all over the vocabulary. The second is the pieces that look like special
    tokens, which some tokenizers do not read from a text.
    """
    size = tokenizer.identity.vocab_size
    pieces = [tokenizer.decode([token]) for token in sorted({index * size // SPREAD_IDS for index in range(SPREAD_IDS)})]
    special = [piece for piece in pieces if SPECIAL.fullmatch(piece)]
    return TEXT + "".join(piece for piece in pieces if piece not in special), "".join(special)


def compare_ids(ours: Sequence[int], theirs: Sequence[int]) -> str | None:
    """Where two tokenizers' ids of the same text differ; None if they do not."""
    for index, (mine, yours) in enumerate(zip(ours, theirs, strict=False)):
        if mine != yours:
            return f"token {index} of the same text is {yours!r:.40} there and {mine} here"
    if len(ours) != len(theirs):
        return f"it makes {len(theirs)} tokens of the same text, and ours {len(ours)}"
    return None


def _difference(first: Logprobs, second: Logprobs) -> float:
    """The largest difference over the tokens that both have; infinite if they have none in common."""
    shared = first.keys() & second.keys()
    return max((abs(first[token] - second[token]) for token in shared), default=float("inf"))
