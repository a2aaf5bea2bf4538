"""NeMo-Aligner's JSON lines: `tokens`, `labels`, `loss_mask`, `topk_logits`, `topk_token_ids`, `log_sum_exp_logits`.

Row t is position t: `labels[t]` is the token after `tokens[t]`. The logits have their maximum taken off, and
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
from kdcache.foreign.base import ForeignCache, ForeignSequence, ReadOptions, ragged, to_ids, without_rows
from kdcache.foreign.formats.tables import Row, Table, flat, nested

LOG_Z = "log_sum_exp_logits"
_COLUMNS = ["tokens", "labels", "loss_mask", "topk_logits", "topk_token_ids", LOG_Z]


def open_nemo_aligner(path: str, table: Table, options: ReadOptions) -> ForeignCache | None:
    """The cache behind a path, or None where its columns are not NeMo-Aligner's."""
    if not {"tokens", "topk_logits", "topk_token_ids"} <= set(table.columns):
        return None
    return ForeignCache(
        format="nemo-aligner",
        title=f"NeMo-Aligner top-k logits ({table.kind})",
        path=path,
        values=options.values or "logits",
        read=partial(_sequences, table),
        facts={"normaliser": f"{LOG_Z} (its own loss ignores it)" if LOG_Z in table.columns else "none"},
    )


def _sequences(table: Table) -> Iterator[ForeignSequence]:
    for where, row in table.rows(_COLUMNS):
        nested_ids = nested(row.get("topk_token_ids"), f"{where}: topk_token_ids")
        nested_values = nested(row.get("topk_logits"), f"{where}: topk_logits")
        tokens = flat(row.get("tokens"), f"{where}: tokens")
        if nested_ids is None or nested_values is None or tokens is None:
            yield without_rows(where, None if tokens is None else to_ids(where, tokens))
            continue
        counts_R, token_ids_E, values_E = ragged(where, nested_ids, nested_values)
        ids_N, learnt_N = _text(where, row, to_ids(where, tokens))
        # The text's last token comes from a label, and the file's row at its index is that of a token of padding.
        kept_R = np.arange(len(counts_R)) < len(ids_N) - (learnt_N is not None)
        kept_E = np.repeat(kept_R, counts_R)
        log_z_R = flat(row.get(LOG_Z), f"{where}: {LOG_Z}")
        if log_z_R is not None and len(log_z_R) != len(counts_R):
            raise InputError(f"{where}: {len(log_z_R)} values of {LOG_Z} for {len(counts_R)} rows")
        yield ForeignSequence(
            source=where,
            input_ids_N=ids_N,
            positions_R=np.arange(int(kept_R.sum())),
            counts_R=counts_R[kept_R],
            token_ids_E=token_ids_E[kept_E],
            values_E=values_E[kept_E],
            log_z_R=None if log_z_R is None else log_z_R[kept_R].astype(np.float64),
            learnt_N=learnt_N,
        )


def _text(where: str, row: Row, tokens_T: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_] | None]:
    """The text with the token that the last label adds, cut behind the last token that is learnt; and which are learnt."""
    labels, mask = flat(row.get("labels"), f"{where}: labels"), flat(row.get("loss_mask"), f"{where}: loss_mask")
    if labels is None or mask is None or not len(tokens_T):
        return tokens_T, None
    labels_T = to_ids(where, labels)
    if not len(labels_T) == len(mask) == len(tokens_T):
        raise InputError(f"{where}: {len(tokens_T)} tokens, {len(labels_T)} labels and {len(mask)} values of loss_mask")
    is_learnt_T = mask != 0
    if not is_learnt_T.any():
        return tokens_T[:1], np.zeros(1, np.bool_)
    last = int(np.flatnonzero(is_learnt_T)[-1])
    # Behind the last learnt label there is padding, and the token that it names stands in the labels alone.
    wrong_T = is_learnt_T[:last] & (labels_T[:last] != tokens_T[1 : last + 1])
    if wrong_T.any():
        at = int(np.argmax(wrong_T))
        raise InputError(
            f"{where}: label {at} is {labels_T[at]}, but the token after token {at} is {tokens_T[at + 1]}; labels must be the "
            "tokens, one place on"
        )
    return np.append(tokens_T[: last + 1], labels_T[last]), np.append(False, is_learnt_T[: last + 1])
