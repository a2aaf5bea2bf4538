"""The losses called with loose arrays and flat keywords, for tests that vary one of them at a time.

Here the tail is one bucket and the entries exact unless a test says otherwise; the losses' own defaults are tested elsewhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdcache.format.soft_targets import SoftTargets
from kdcache.loss import fused, sparse_kd, vocab_parallel
from kdcache.loss.chunks import Head
from kdcache.loss.fused import Projection
from kdcache.loss.prepare import LossSettings, Prepared, position_scales

_SETTINGS = {"tail": "bucket", "entries": "exact", "reduction": "mean", "backend": "auto"}
_TEACHER = ("token_ids_PK", "logprobs_PK", "tail_mass_P", "num_exact_P", "log_z_P")


def soft_targets(
    token_ids_PK: Tensor,
    logprobs_PK: Tensor,
    tail_mass_P: Tensor,
    num_exact_P: Tensor | None = None,
    log_z_P: Tensor | None = None,
    *,
    entries: str = "exact",
    temperature: float = 1.0,
) -> SoftTargets[Tensor]:
    """Entries that are what the loss is to read; mixed where num_exact_P is given."""
    return SoftTargets.of(
        token_ids_PK,
        logprobs_PK,
        tail_mass_P,
        entries="mixed" if num_exact_P is not None else entries,
        num_exact_P=num_exact_P,
        log_z=None if log_z_P is None else (temperature, log_z_P),
    )


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
    return Prepared(teacher, target_ids_P, weights_P, scales_P, objective, backend)


def step(keywords: dict[str, Tensor]) -> dict[str, Any]:
    """What a module takes at every step."""
    return {name: value for name, value in arguments(dict(keywords)).items() if name != "settings"}


def vocab_parallel_sparse_kd_loss(logits_PW: Tensor, *, first_id: int, vocab_size: int, **keywords: Any) -> Tensor:
    """`kdcache.vocab_parallel_sparse_kd_loss`."""
    part = vocab_parallel.VocabPart(first_id, vocab_size)
    return vocab_parallel.vocab_parallel_sparse_kd_loss(logits_PW, part, **arguments(keywords))
