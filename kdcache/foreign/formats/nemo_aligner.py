"""NeMo-Aligner's JSON lines: `tokens`, `labels`, `loss_mask`, `topk_logits`, `topk_token_ids`, `log_sum_exp_logits`.

Position t is position t: `labels[t]` is the token after `tokens[t]`. The logits have their maximum taken off, and
log_sum_exp_logits is the normaliser that belongs to them, so logprob = logit - log_sum_exp. Items of a batch are padded to one
length, where loss_mask is 0. (af2b3bd: examples/nlp/synthetic_data_gen/compute_topk_logits.py,
nemo_aligner/utils/distributed.py)
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
from numpy.typing import NDArray

from kdcache.errors import InputError
from kdcache.foreign.base import ForeignCache, ForeignSequence, ReadConfig, ragged, to_ids, without_positions
from kdcache.foreign.formats.tables import Cells, Table, flat, nested

LOG_Z = "log_sum_exp_logits"
_COLUMNS = ["tokens", "labels", "loss_mask", "topk_logits", "topk_token_ids", LOG_Z]


def open_nemo_aligner(path: str, table: Table, reading: ReadConfig) -> ForeignCache | None:
    """Open the cache at a path; None unless its columns are NeMo-Aligner's."""
    if not {"tokens", "topk_logits", "topk_token_ids"} <= set(table.columns):
        return None
    return ForeignCache(
        format="nemo-aligner",
        title=f"NeMo-Aligner top-k logits ({table.kind})",
        path=path,
        values=reading.values or "logits",
        read=partial(_sequences, table),
        facts={"normaliser": f"{LOG_Z} (its own loss ignores it)" if LOG_Z in table.columns else "none"},
    )


def _sequences(table: Table) -> Iterator[ForeignSequence]:
    for where, item in table.items(_COLUMNS):
        nested_ids = nested(item.get("topk_token_ids"), f"{where}: topk_token_ids")
        nested_values = nested(item.get("topk_logits"), f"{where}: topk_logits")
        tokens = flat(item.get("tokens"), f"{where}: tokens")
        if nested_ids is None or nested_values is None or tokens is None:
            yield without_positions(where, None if tokens is None else to_ids(where, tokens))
            continue
        counts_P, token_ids_E, values_E = ragged(where, nested_ids, nested_values)
        ids_N, learnt_N = _text(where, item, to_ids(where, tokens))
        # The text's last token comes from a label, and the file's position at its index is that of a token of padding.
        kept_P = np.arange(len(counts_P)) < len(ids_N) - (learnt_N is not None)
        kept_E = np.repeat(kept_P, counts_P)
        log_z_P = flat(item.get(LOG_Z), f"{where}: {LOG_Z}")
        if log_z_P is not None and len(log_z_P) != len(counts_P):
            raise InputError(f"{where}: {len(log_z_P)} values of {LOG_Z} for {len(counts_P)} positions")
        yield ForeignSequence(
            source=where,
            input_ids_N=ids_N,
            positions_P=np.arange(int(kept_P.sum())),
            counts_P=counts_P[kept_P],
            token_ids_E=token_ids_E[kept_E],
            values_E=values_E[kept_E],
            log_z_P=None if log_z_P is None else log_z_P[kept_P].astype(np.float64),
            learnt_N=learnt_N,
        )


def _text(where: str, item: Cells, tokens_N: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_] | None]:
    """Return the text with the token that the last label adds, cut after the last learnt token; and which are learnt."""
    targets, mask = flat(item.get("labels"), f"{where}: labels"), flat(item.get("loss_mask"), f"{where}: loss_mask")
    if targets is None or mask is None or not len(tokens_N):
        return tokens_N, None
    targets_N = to_ids(where, targets)
    if not len(targets_N) == len(mask) == len(tokens_N):
        raise InputError(f"{where}: {len(tokens_N)} tokens, {len(targets_N)} labels and {len(mask)} values of loss_mask")
    is_learnt_N = mask != 0
    if not is_learnt_N.any():
        return tokens_N[:1], np.zeros(1, np.bool_)
    last = int(np.flatnonzero(is_learnt_N)[-1])
    # After the last learnt label comes padding, and the token that the label names is in no other column.
    wrong_N = is_learnt_N[:last] & (targets_N[:last] != tokens_N[1 : last + 1])
    if wrong_N.any():
        at = int(np.argmax(wrong_N))
        raise InputError(
            f"{where}: label {at} is {targets_N[at]}, but the token after token {at} is {tokens_N[at + 1]}; labels must be the "
            "tokens, each one index earlier"
        )
    return np.append(tokens_N[: last + 1], targets_N[last]), np.append(False, is_learnt_N[: last + 1])
