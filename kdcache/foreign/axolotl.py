"""Axolotl's distillation columns: `logprobs` and `target_token_ids` per row (v2), or what its transform makes of them.

Its transform puts the last row at the last token and fills up on the left, and its trainer (067b021) compares the row at index
t with the student's logits[t]: so the row at index t claims position t. Engines give the distribution OF token t there, which
is position t - 1; nothing shifts it since axolotl#2700.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np

from kdcache.errors import InputError
from kdcache.foreign.base import Finding, ForeignCache, ForeignSequence, ReadOptions, ragged, to_ids
from kdcache.foreign.columns import no_tokens
from kdcache.foreign.tables import Table, flat, nested

IDS = "target_token_ids"
IGNORED_LABEL = -100


def open_axolotl(path: str, table: Table, options: ReadOptions) -> ForeignCache | None:
    """The cache behind a path, or None where its columns are not Axolotl's."""
    if IDS not in table.columns or not {"logprobs", "target_logprobs"} & set(table.columns):
        return None
    is_prepared = "target_logprobs" in table.columns
    tokens = options.columns.get("tokens", "input_ids")
    findings: list[Finding] = [] if tokens in table.columns else [no_tokens(tokens, table)]
    if is_prepared:
        sentence = "the values went through Axolotl's transform, which renormalises each row over its support"
        findings.append(Finding("transformed", "note", sentence))
    return ForeignCache(
        format="axolotl",
        title=f"Axolotl {'prepared targets' if is_prepared else 'v2 logprob columns'} ({table.kind})",
        path=path,
        values=options.values or "logprobs",
        read=partial(_sequences, table, tokens, "target_logprobs" if is_prepared else "logprobs", options.first_position),
        facts={"columns": f"{tokens}, {'target_logprobs' if is_prepared else 'logprobs'}, {IDS}"},
        findings=tuple(findings),
    )


def _sequences(table: Table, tokens: str, values: str, first: int | None) -> Iterator[ForeignSequence]:
    for where, row in table.rows([tokens, values, IDS, "labels"]):
        nested_ids, nested_values = nested(row.get(IDS), f"{where}: {IDS}"), nested(row.get(values), f"{where}: {values}")
        if nested_ids is None or nested_values is None:
            continue
        text = flat(row.get(tokens), f"{where}: {tokens}")
        labels = flat(row.get("labels"), f"{where}: labels")
        ids_N = None if text is None else to_ids(where, text)
        if ids_N is not None and len(nested_ids[1]) > len(ids_N):
            raise InputError(
                f"{where}: {len(nested_ids[1])} rows for {len(ids_N)} tokens; Axolotl would keep the wrong end of them. "
                "Give each token one row"
            )
        counts_R, token_ids_E, values_E = ragged(where, nested_ids, nested_values)
        before = 0 if ids_N is None else len(ids_N) - len(counts_R)
        learnt_N = None
        if labels is not None and ids_N is not None and len(labels) == len(ids_N):
            learnt_N = labels != IGNORED_LABEL
        yield ForeignSequence(
            source=where,
            input_ids_N=ids_N,
            positions_R=np.arange(len(counts_R)) + (before if first is None else first),
            counts_R=counts_R,
            token_ids_E=token_ids_E,
            values_E=values_E,
            learnt_N=learnt_N,
        )
