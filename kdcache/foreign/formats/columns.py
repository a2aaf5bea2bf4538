"""Plain columns: token ids of the text, and for each position lists of ids and of values, under any of the usual names; or one
column of lists of {token_id, logprob}.

The position stored at index r is taken for position r. Positions may be null, as an engine's first one is; the probes then
find where the others belong.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from kdcache.errors import InputError
from kdcache.foreign.base import NO_ENTRIES, Finding, ForeignCache, ForeignSequence, ReadConfig, ValueKind, ragged, to_ids
from kdcache.foreign.formats.pairs import PairColumn, find_pairs, read_pairs
from kdcache.foreign.formats.tables import Cells, Table, flat, nested
from kdcache.foreign.padding import without_padding

KNOWN = {
    "tokens": ("input_ids", "tokens", "token_ids", "prompt_token_ids"),
    "ids": (
        "topk_ids", "top_k_ids", "topk_token_ids", "top_token_ids", "topk_indices", "top_k_indices", "top_indices",
        "teacher_topk_ids", "teacher_topk_indices", "teacher_token_ids", "teacher_ids", "target_token_ids", "logprob_token_ids",
        "logprobs_ids", "token_ids", "indices", "ids",
    ),
    "values": (
        "topk_logprobs", "top_k_logprobs", "top_logprobs", "teacher_topk_logprobs", "teacher_logprobs", "target_logprobs",
        "logprobs", "topk_logits", "top_k_logits", "top_logits", "teacher_logits", "logits", "topk_probs", "top_k_probs",
        "teacher_probs", "probs", "top_values", "topk_values", "values",
    ),
    "log_z": ("log_z", "logz", "logsumexp", "log_sum_exp", "log_sum_exp_logits", "lse"),
    "labels": ("labels",),
    "loss_mask": ("loss_mask", "assistant_mask", "assistant_masks"),
    "attention_mask": ("attention_mask", "padding_mask"),
    "entries": (),
}  # fmt: skip
"""Our name -> names in use, the likelier first. `labels`, `loss_mask` and `attention_mask` are about the token at their index.
`entries` holds ids and values in one, as lists of {token_id, logprob}: it is known by what is in it, whatever its name."""

_FLAT = ("tokens", "log_z", "attention_mask")
_ABOUT_TOKENS = ("tokens", "labels", "loss_mask", "attention_mask")


def open_columns(path: str, table: Table, reading: ReadConfig) -> ForeignCache | None:
    """Open the cache at a path; None if no column could be ids or values.

    Raises:
        InputError: a column that the user named is not there.
    """
    names = find_columns(table, dict(reading.columns))
    pairs = find_entries(table, names)
    if pairs is None and not {"ids", "values"} <= names.keys():
        return None
    if pairs is not None:
        names = {ours: theirs for ours, theirs in names.items() if ours in (*_ABOUT_TOKENS, "log_z")} | {
            "entries": pairs.column
        }
    values: ValueKind = reading.values or (_kind_by_name(names["values"]) if pairs is None else pairs.values)
    return ForeignCache(
        format="columns",
        title=f"plain columns ({table.kind})",
        path=path,
        values=values,
        read=partial(_sequences, table, names, pairs, reading.first_position or 0),
        facts={"columns": ", ".join(f"{ours}={theirs}" for ours, theirs in names.items())},
        findings=() if "tokens" in names else (no_tokens("input_ids", table),),
    )


def find_columns(table: Table, named: dict[str, str]) -> dict[str, str]:
    """Our name -> the column: the one that the user named, or the first of the usual ones that is there and not taken."""
    for ours, theirs in named.items():
        if ours not in KNOWN or theirs not in table.columns:
            known, there = ", ".join(KNOWN), ", ".join(map(repr, table.columns))
            raise InputError(f"--column {ours}={theirs}: expected one of {known}, and a column that is there: {there}")
    found = dict(named)
    for ours, usual in KNOWN.items():
        free = [name for name in usual if name in table.columns and name not in found.values()]
        if ours not in found and free:
            found[ours] = free[0]
    return found


def find_entries(table: Table, names: dict[str, str]) -> PairColumn | None:
    """The column of {token_id, logprob} lists: the one that the user named, else any, where no column holds the ids alone."""
    if "entries" in names:
        found = find_pairs(table, [names["entries"]])
        if found is None:
            raise InputError(f"--column entries={names['entries']}: holds no lists of {{token_id, logprob}}")
        return found
    if "ids" in names:
        return None
    taken = {names[ours] for ours in _ABOUT_TOKENS if ours in names}
    return find_pairs(table, [name for name in table.columns if name not in taken])


def no_tokens(name: str, table: Table) -> Finding:
    """What is to be said where the text is missing."""
    sentence = (
        f"a column {name!r} with the token ids of the text is missing ({', '.join(map(repr, table.columns))} "
        "are there): whether positions belong to their tokens cannot be checked, and nothing can be "
        "converted; name it with --column tokens=NAME"
    )
    return Finding("no_tokens", "fatal", sentence)


def _kind_by_name(column: str) -> ValueKind:
    if "logit" in column:
        return "logits"
    return "probs" if "prob" in column and "logprob" not in column else "logprobs"


def _sequences(table: Table, names: dict[str, str], pairs: PairColumn | None, first: int) -> Iterator[ForeignSequence]:
    for where, item in table.items(list(names.values())):
        positions = _entries_of(where, item, names, pairs)
        counts_P, token_ids_E, values_E = ragged(where, *(positions or NO_ENTRIES))
        cells = {ours: flat(item.get(theirs), f"{where}: {theirs}") for ours, theirs in names.items() if ours in _FLAT}
        log_z_P, mask_N = cells.get("log_z"), cells.get("attention_mask")
        if log_z_P is not None and positions is not None and len(log_z_P) != len(counts_P):
            raise InputError(f"{where}: {len(log_z_P)} values of {names['log_z']} for {len(counts_P)} positions")
        ids_N = None if cells.get("tokens") is None else to_ids(where, cells["tokens"])
        sequence = ForeignSequence(
            source=where,
            input_ids_N=ids_N,
            positions_P=np.arange(len(counts_P)) + first + _left_padding(mask_N, len(counts_P)),
            counts_P=counts_P,
            token_ids_E=token_ids_E,
            values_E=values_E,
            log_z_P=None if log_z_P is None or positions is None else log_z_P.astype(np.float64),
            learnt_N=None if ids_N is None else _learnt(where, item, names, len(ids_N)),
        )
        yield without_padding(sequence, mask_N, where)


def _entries_of(where: str, item: Cells, names: dict[str, str], pairs: PairColumn | None) -> Any:
    """((ids, lengths), (values, lengths)) of one sequence; None where it has none."""
    if pairs is not None:
        return read_pairs(item.get(pairs.column), pairs, f"{where}: {pairs.column}")
    ids, values = (nested(item.get(names[ours]), f"{where}: {names[ours]}") for ours in ("ids", "values"))
    return None if ids is None or values is None else (ids, values)


def _left_padding(mask_N: Any, num_positions: int) -> int:
    """Tokens of padding before position 0: none where the positions are one for each token, padding included.

    Positions of the text alone start where the text does, if its tokens were padded on the left.
    """
    if mask_N is None or not mask_N.any():
        return 0
    num_real, start = int(np.count_nonzero(mask_N)), int(np.argmax(mask_N != 0))
    is_of_all = num_positions in (len(mask_N) - 1, len(mask_N))
    return start if num_positions in (num_real - 1, num_real) and not is_of_all else 0


def _learnt(where: str, item: Cells, names: dict[str, str], num_tokens: int) -> np.ndarray | None:
    for ours, ignored in (("labels", -100), ("loss_mask", 0)):
        column = flat(item.get(names[ours]), f"{where}: {names[ours]}") if ours in names else None
        if column is not None:
            if len(column) != num_tokens:
                raise InputError(f"{where}: {len(column)} values of {names[ours]} for {num_tokens} tokens")
            return column != ignored
    return None
