"""Servers' answers kept as they came, one a line: vLLM's `prompt_logprobs`, SGLang's `meta_info`, OpenAI's `choices`.

An engine's item i is about token i, so it is the position of position i - 1; the item about the very first token is null.
Position j of the tokens that the engine wrote is position len(prompt) - 1 + j. `answer_shapes.py` knows what the servers call
things; here each answer becomes a list of tokens and a list of {id: logprob}.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from kdcache.errors import InputError
from kdcache.foreign.base import Finding, ForeignCache, ForeignSequence, ReadConfig, without_positions
from kdcache.foreign.formats.answer_shapes import Answer, AnswerTokens, answers_of
from kdcache.foreign.formats.chats import prompt_ids
from kdcache.foreign.formats.pairs import to_id
from kdcache.foreign.formats.tables import Cells, Table, plain

_MARKS = ("prompt_logprobs", "choices", "meta_info", "outputs", "response", "details", "completion_probabilities")
_TEXTS = ("prompt_token_ids", "messages", "input_ids", "request")


def open_answers(path: str, table: Table, reading: ReadConfig) -> ForeignCache | None:
    """Open the cache at a path; None unless its lines are a server's answers with logprobs."""
    if not set(_MARKS) & set(table.columns):
        return None
    lines = table.first_items(_columns(table))
    first = next((answer for item in lines for answer in answers_of(_plain(item))), None)
    if first is None:
        return None
    return ForeignCache(
        format="answers",
        title=f"{first.server}, kept as they came ({table.kind})",
        path=path,
        values=reading.values or "logprobs",
        read=partial(_sequences, table, reading),
        facts={"positions": "of the prompt" if first.is_prompt else "of what the engine wrote"},
        findings=_findings(first, reading),
    )


def _columns(table: Table) -> list[str]:
    return [name for name in (*_MARKS, *_TEXTS) if name in table.columns]


def _findings(first: Answer, reading: ReadConfig) -> tuple[Finding, ...]:
    if first.prompt_ids is not None or first.has_prompt_ids or (first.messages is not None and reading.tokenizer is not None):
        return ()
    mended = "name its tokenizer with --tokenizer NAME" if first.messages is not None else "keep `prompt_token_ids` with it"
    if first.start:
        mended = f"the first {first.start} are missing (logprob_start_len): keep them with it as `input_ids`"
    sentence = (
        "the answers do not hold the token ids of the prompt: whether positions belong to their tokens cannot be checked, and "
        f"nothing can be converted; {mended} (vLLM: ask with return_token_ids)"
    )
    return (Finding("no_tokens", "fatal", sentence),)


def _sequences(table: Table, reading: ReadConfig) -> Iterator[ForeignSequence]:
    tokens = AnswerTokens(reading.tokenizer)
    for where, item in table.items(_columns(table)):
        found = list(answers_of(_plain(item)))
        if not found:  # an error of the server, in a batch of answers
            yield without_positions(where, None)
        for index, answer in enumerate(found):
            yield _sequence(answer, tokens, reading, where if len(found) == 1 else f"{where}.{index}")


def _sequence(answer: Answer, tokens: AnswerTokens, reading: ReadConfig, where: str) -> ForeignSequence:
    positions = [tokens.by_id(entries, where) for entries in answer.positions]
    before = _prompt_ids(answer.prompt_ids, where)
    if before is None and answer.messages is not None and reading.tokenizer is not None:
        before = prompt_ids(answer.messages, reading.tokenizer, where)
    written = [tokens.id_of(token, where) for token in answer.tokens] if answer.tokens is not None else None
    ids = _text(answer, before, written)
    # Item i is about token i: it is what was said at position i - 1.
    first = answer.start - 1 if answer.is_prompt else len(before or ()) - 1
    if ids is not None and first + len(positions) > len(ids) - 1:
        raise InputError(
            f"{where}: {len(positions)} items of logprobs for {len(ids) - first - 1} tokens; one for each was expected"
        )
    skipped = 1 if first < 0 else 0
    kept = positions[skipped:]
    return ForeignSequence(
        source=where,
        input_ids_N=None if ids is None else np.array(ids, np.int64),
        positions_P=np.arange(len(kept)) + first + skipped,
        counts_P=np.array([len(item) for item in kept], np.int64),
        token_ids_E=np.array([token for item in kept for token in item], np.int64),
        values_E=np.array([value for item in kept for value in item.values()], np.float64),
    )


def _prompt_ids(ids: Any, where: str) -> list[int] | None:
    if ids is None:
        return None
    if not isinstance(ids, list):
        raise InputError(f"{where}: the prompt's token ids are {ids!r:.60}, but a list of whole numbers was expected")
    return [to_id(token, where) for token in ids]


def _text(answer: Answer, before: list[int] | None, written: list[int] | None) -> list[int] | None:
    if answer.is_prompt:
        return before if before is not None else written if answer.has_prompt_ids else None
    return None if before is None or written is None else before + written


def _plain(item: Cells) -> dict[str, Any]:
    return {name: plain(cell) for name, cell in item.items()}
