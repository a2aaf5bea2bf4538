"""Axolotl's distillation columns: `logprobs` and `target_token_ids` per position (v2), what its transform makes of them, or the
older lists of {"token": "token_id:5", "logprob": -0.1}. Published ones often hold chats in place of token ids.

Its transform puts the last position at the last token and fills up on the left, and its trainer (067b021) compares the
position at index t with the student's logits[t]: so the position at index t claims position t. Engines give the
distribution OF token t there, which is position t - 1; nothing shifts it since axolotl#2700.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.errors import InputError
from kdcache.foreign.base import NO_ENTRIES, Finding, ForeignCache, ForeignSequence, ReadConfig, ragged, to_ids
from kdcache.foreign.formats.chats import chat_ids, find_messages
from kdcache.foreign.formats.columns import no_tokens
from kdcache.foreign.formats.pairs import PairColumn, find_pairs, read_pairs
from kdcache.foreign.formats.tables import Cells, Table, flat, nested
from kdcache.foreign.padding import without_padding

IDS, PREPARED = "target_token_ids", "target_logprobs"
IGNORED_TARGET = -100


def open_axolotl(path: str, table: Table, reading: ReadConfig) -> ForeignCache | None:
    """Open the cache at a path; None unless its columns are Axolotl's."""
    layout = _layout(table, reading)
    if layout is None:
        return None
    findings: list[Finding] = []
    if layout.tokens is None and layout.messages is None:
        findings.append(no_tokens(reading.columns.get("tokens", "input_ids"), table))
    elif layout.tokens is None and reading.tokenizer is None:
        findings.append(_needs_tokenizer(layout))
    if layout.values == PREPARED:
        sentence = "the values went through Axolotl's transform, which renormalises each position over its support"
        findings.append(Finding("transformed", "note", sentence))
    return ForeignCache(
        format="axolotl",
        title=f"Axolotl {layout.title} ({table.kind})",
        path=path,
        values=reading.values or "logprobs",
        read=partial(_sequences, table, layout, reading),
        facts={"columns": ", ".join(layout.columns), **_template_fact(layout, reading)},
        findings=tuple(findings),
    )


@dataclass(frozen=True)
class _Layout:
    """Which column is which; `pairs` in place of ids and values in the older layout."""

    title: str
    tokens: str | None
    messages: str | None
    values: str
    pairs: PairColumn | None = None

    @property
    def columns(self) -> list[str]:
        found = [self.tokens, None if self.tokens else self.messages, self.values, None if self.pairs else IDS]
        return [name for name in found if isinstance(name, str)]


def _layout(table: Table, reading: ReadConfig) -> _Layout | None:
    tokens = reading.columns.get("tokens", "input_ids")
    text, messages = tokens if tokens in table.columns else None, find_messages(table)
    if IDS in table.columns and {"logprobs", PREPARED} & set(table.columns):
        is_prepared = PREPARED in table.columns
        return _Layout(
            "prepared targets" if is_prepared else "v2 logprob columns", text, messages, PREPARED if is_prepared else "logprobs"
        )
    pairs = find_pairs(table, [name for name in table.columns if name not in (text, messages)])
    if pairs is None or not pairs.has_text_ids or (pairs.id_field, pairs.value_field) != ("token", "logprob"):
        return None
    return _Layout("legacy logprob lists", text, messages, pairs.column, pairs)


def _needs_tokenizer(layout: _Layout) -> Finding:
    sentence = (
        f"the text is there as chats in the column {layout.messages!r}, without token ids: whether positions "
        "belong to their tokens cannot be checked, and nothing can be converted; name the tokenizer that made "
        "the positions, with its chat template, with --tokenizer NAME"
    )
    return Finding("no_tokens", "fatal", sentence)


def _template_fact(layout: _Layout, reading: ReadConfig) -> dict[str, str]:
    if layout.tokens is not None or reading.tokenizer is None:
        return {}
    return {"text": f"the chats in {layout.messages!r}, through the chat template of the tokenizer that you named"}


def _sequences(table: Table, layout: _Layout, reading: ReadConfig) -> Iterator[ForeignSequence]:
    first = reading.first_position
    for where, item in table.items([*layout.columns, "labels", "attention_mask"]):
        positions = _entries_of(where, item, layout) or NO_ENTRIES
        ids_N = _text(where, item, layout, reading)
        targets = flat(item.get("labels"), f"{where}: labels")
        if ids_N is not None and len(positions[0][1]) > len(ids_N):
            raise InputError(_too_many(where, len(positions[0][1]), len(ids_N), layout))
        counts_P, token_ids_E, values_E = ragged(where, *positions)
        before = 0 if ids_N is None else len(ids_N) - len(counts_P)
        learnt_N = None
        if targets is not None and ids_N is not None and len(targets) == len(ids_N):
            learnt_N = targets != IGNORED_TARGET
        sequence = ForeignSequence(
            source=where,
            input_ids_N=ids_N,
            positions_P=np.arange(len(counts_P)) + (before if first is None else first),
            counts_P=counts_P,
            token_ids_E=token_ids_E,
            values_E=values_E,
            learnt_N=learnt_N,
        )
        mask_N = flat(item.get("attention_mask"), f"{where}: attention_mask")
        yield without_padding(sequence, mask_N if layout.tokens else None, where)


def _entries_of(where: str, item: Cells, layout: _Layout) -> Any:
    """((ids, lengths), (values, lengths)); None where there are none."""
    if layout.pairs is not None:
        return read_pairs(item.get(layout.values), layout.pairs, f"{where}: {layout.values}")
    ids, values = nested(item.get(IDS), f"{where}: {IDS}"), nested(item.get(layout.values), f"{where}: {layout.values}")
    return None if ids is None or values is None else (ids, values)


def _text(where: str, item: Cells, layout: _Layout, reading: ReadConfig) -> NDArray[np.int64] | None:
    if layout.tokens is not None:
        text = flat(item.get(layout.tokens), f"{where}: {layout.tokens}")
        return None if text is None else to_ids(where, text)
    return (
        None
        if layout.messages is None
        else chat_ids(item.get(layout.messages), reading.tokenizer, f"{where}: {layout.messages}")
    )


def _too_many(where: str, num_positions: int, num_tokens: int, layout: _Layout) -> str:
    if layout.tokens is None:
        return (
            f"{where}: {num_positions} positions, but the tokenizer's chat template makes {num_tokens} tokens "
            "of the chat; the positions were made with another template or tokenizer: name that one with "
            "--tokenizer"
        )
    return (
        f"{where}: {num_positions} positions for {num_tokens} tokens; Axolotl would keep the wrong end of "
        "them. Give each token one position"
    )
