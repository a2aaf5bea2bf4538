"""The losses called with loose arrays and flat keywords, for tests that vary one of them at a time.

Here the tail is one bucket and the entries exact unless a test says otherwise; the losses' own defaults are tested elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kdcache.format.soft_targets import SoftTargets
from kdcache.kernels.base import Summand
from kdcache.loss import fused, sparse_kd, vocab_parallel
from kdcache.loss.chunks import Head
from kdcache.loss.fused import Projection
from kdcache.loss.prepare import LossSettings, position_scales
from kdcache.loss.prepared import Prepared, ReadPart, alone, with_common_columns

_SETTINGS = {"tail": "bucket", "entries": "exact", "reduction": "mean", "backend": "auto"}
_TEACHER = ("token_ids_PK", "logprobs_PK", "tail_mass_P", "num_exact_P", "log_z_P", "target_logprobs_P")


def soft_targets(
    token_ids_PK: Tensor,
    logprobs_PK: Tensor,
    tail_mass_P: Tensor,
    num_exact_P: Tensor | None = None,
    log_z_P: Tensor | None = None,
    target_logprobs_P: Tensor | None = None,
    *,
    entries: str = "exact",
    temperature: float = 1.0,
) -> SoftTargets[Tensor]:
    """Entries that are what the loss is to read; mixed where num_exact_P is given."""
    made = SoftTargets.of(
        token_ids_PK,
        logprobs_PK,
        tail_mass_P,
        entries="mixed" if num_exact_P is not None else entries,
        num_exact_P=num_exact_P,
        log_z=None if log_z_P is None else (temperature, log_z_P),
    )
    return replace(made, target_logprobs_P=target_logprobs_P)


def arguments(keywords: dict[str, Any]) -> dict[str, Any]:
    """What a public loss takes, of flat keywords."""
    settings = {name: keywords.pop(name, default) for name, default in _SETTINGS.items()}
    entries = {name: keywords.pop(name) for name in _TEACHER if name in keywords}
    meaning = {"entries": settings["entries"], "temperature": keywords.get("temperature", 1.0)}
    per_position = {name: keywords.pop(f"{name}_P") for name in ("target_ids", "weights") if f"{name}_P" in keywords}
    teacher = soft_targets(**entries, **meaning) if entries else None
    return {"teacher": teacher, "settings": LossSettings(**settings), **per_position, **keywords}


def sparse_kd_loss(logits_PV: Tensor, *entries: Tensor, **keywords: Any) -> Tensor:
    """`kdcache.sparse_kd_loss`; `entries` are ids, logprobs and tail masses."""
    keywords |= dict(zip(_TEACHER, entries, strict=False))
    return sparse_kd.sparse_kd_loss(logits_PV, **arguments(keywords))


def fused_sparse_kd_loss(hidden_PH: Tensor, weight_VH: Tensor, *entries: Tensor, **keywords: Any) -> Tensor:
    """`kdcache.fused_sparse_kd_loss`, with bias, head and chunk_positions among the keywords."""
    keywords |= dict(zip(_TEACHER, entries, strict=False))
    bias_V, head = keywords.pop("bias", None), keywords.pop("head", Head())
    projection = Projection(weight_VH, bias_V, head, keywords.pop("chunk_positions", None))
    return fused.fused_sparse_kd_loss(hidden_PH, projection, **arguments(keywords))


def prepared(objective: Any, backend: str, reduction: str = "sum", **keywords: Any) -> Prepared:
    """What the steps are given, with the teacher's masses at the objective's temperature as they are."""
    target_ids_P, weights_P = keywords.pop("target_ids_P", None), keywords.pop("weights_P", None)
    teacher = soft_targets(**keywords)
    scales_P = position_scales(torch.empty(teacher.num_positions), weights_P, reduction)
    return alone(teacher, objective, (target_ids_P, weights_P, scales_P), backend)


def prepared_sum(summands: Sequence[Summand], backend: str) -> Prepared:
    """What the steps are given for the kernels' sums; the values have a column for each summand, and one more."""
    inputs, zeros_P = summands[0].inputs, torch.zeros(len(summands[0].inputs.weights_P), dtype=torch.float64)
    parts, share_P, columns = [], zeros_P, []
    for column, summand in enumerate(summands):
        own, objective = summand.inputs, summand.objective
        factor_P = zeros_P + 1.0 if summand.factor_P is None else torch.tensor(summand.factor_P)
        keeps = objective.divergence.requirements.tail_sample
        arrays = (own.token_ids_PK, own.logprobs_PK, own.tail_mass_P)
        teacher = soft_targets(*map(torch.tensor, arrays), torch.tensor(own.num_exact_P) if keeps else None)
        made = replace(objective, alpha=1.0, divergence=objective.divergence.map(torch.tensor))
        share_P = share_P + factor_P * (1 - objective.alpha)
        if objective.alpha > 0:
            parts.append(ReadPart(teacher, made, factor_P * objective.alpha))
            columns.append(column)
    common, ids_PK = with_common_columns(parts) if parts else ((), torch.tensor(inputs.token_ids_PK))
    weights_P, target_ids_P = torch.tensor(inputs.weights_P), torch.tensor(inputs.target_ids_P)
    temperature = summands[0].objective.temperature
    positions = (share_P, target_ids_P, weights_P, position_scales(zeros_P, weights_P, "sum"))
    return Prepared(common, ids_PK, temperature, *positions, backend, tuple(columns), len(summands))


def step(keywords: dict[str, Tensor]) -> dict[str, Any]:
    """What a module takes at every step."""
    return {name: value for name, value in arguments(dict(keywords)).items() if name != "settings"}


def vocab_parallel_sparse_kd_loss(logits_PW: Tensor, *, first_id: int, vocab_size: int, **keywords: Any) -> Tensor:
    """`kdcache.vocab_parallel_sparse_kd_loss`."""
    part = vocab_parallel.VocabPart(first_id, vocab_size)
    return vocab_parallel.vocab_parallel_sparse_kd_loss(logits_PW, part, **arguments(keywords))
