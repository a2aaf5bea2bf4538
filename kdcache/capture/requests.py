"""What a teacher is asked for a unit's items: texts to read, or prompts to answer."""

from __future__ import annotations

from collections.abc import Sequence

from kdcache.capture.generate import make_prompts
from kdcache.capture.sequences import CutCounts, make_sequences
from kdcache.config.capture import CaptureConfig
from kdcache.format.record import TokenSequence
from kdcache.inputs.content import Item
from kdcache.teacher.generation import Prompt
from kdcache.teacher.tokenizer import Tokenizer

Request = TokenSequence | Prompt
"""What the teacher is given: a text to read, or a prompt to answer."""


def make_requests(
    items: Sequence[Item], tokenizer: Tokenizer, config: CaptureConfig, vocab_size: int
) -> tuple[list[Request], CutCounts]:
    """Turn items into what the teacher is given; raises as `make_sequences` and `make_prompts`."""
    if config.generate is not None:
        prompts, counts = make_prompts(items, tokenizer=tokenizer, config=config, vocab_size=vocab_size)
        return list(prompts), counts
    sequences, counts = make_sequences(items, tokenizer=tokenizer, config=config.input, vocab_size=vocab_size)
    return list(sequences), counts


def most_tokens(requests: Sequence[Request], config: CaptureConfig) -> int:
    """Count the tokens of some requests; prompts count with the longest answers they may get."""
    answer = 0 if config.generate is None else config.generate.max_tokens
    return sum((asked.sequence if isinstance(asked, Prompt) else asked).num_tokens + answer for asked in requests)
