"""Numbers that differ from position to position: by role, by domain, or by what the teacher said."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from kdcache.config.terms import Varying
from kdcache.errors import ConfigError
from kdcache.format.manifest import Manifest
from kdcache.format.record import ROLES
from kdcache.format.soft_targets import SoftTargets
from kdcache.loader.batches.batch import NO_TARGET
from kdcache.loader.torch_batches import TorchBatch
from kdcache.train.terms.base import Needs


def values_P(varying: Varying, batch: TorchBatch) -> Tensor:
    """(P,) float32, the number of each position.

    Raises:
        ConfigError: the batch lacks what the numbers go by.
    """
    if varying.is_named:
        given_P = torch.full((len(batch.flat_positions_P),), float(varying.otherwise or 0.0), device=batch.weights_P.device)
        for value, is_of_P in masks_P(varying, batch):
            given_P = torch.where(is_of_P, value, given_P)
        return given_P
    (a, at_a), (b, at_b) = varying.low or (0.0, 0.0), varying.high or (1.0, 1.0)
    share_P = ((_measure_P(varying.by, batch) - a) / (b - a)).clamp(0.0, 1.0)
    given_P = at_a + (at_b - at_a) * share_P
    if varying.by == "nll":
        given_P = torch.where(batch.target_ids_P == NO_TARGET, float(varying.otherwise or 0.0), given_P)
    return given_P


def masks_P(varying: Varying, batch: TorchBatch) -> list[tuple[float, Tensor]]:
    """Of a role or domain: each number and the (P,) positions that have it; together they are all positions, each once."""
    found = [(value, _has_name_P(varying.by, name, batch)) for name, value in varying.values.items()]
    rest_P = torch.ones(len(batch.flat_positions_P), dtype=torch.bool, device=batch.weights_P.device)
    for _, is_of_P in found:
        rest_P = rest_P & ~is_of_P
    return [*found, (float(varying.otherwise or 0.0), rest_P)]


def needs_of(varying: Iterable[Varying | None]) -> Needs:
    """What of a batch the numbers go by."""
    by = {of_one.by for of_one in varying if of_one is not None}
    return Needs(roles="role" in by, domains="domain" in by)


def check_cache(varying: Varying, where: str, manifest: Manifest) -> None:
    """Raise ConfigError where the cache does not say what the numbers go by."""
    if varying.by == "domain" and not manifest.identity.domains:
        raise ConfigError(f"{where} goes by domain, but the cache's sequences do not say theirs")
    if varying.by == "entropy" and not manifest.identity.selection.entropy:
        raise ConfigError(f"{where} goes by the teacher's entropy, which the cache lacks; capture with selection.entropy")


def check_varying(varying: Varying, where: str) -> None:
    """Raise ConfigError for a role that there is not."""
    unknown = [name for name in varying.values if varying.by == "role" and name not in ROLES]
    if unknown:
        raise ConfigError(f"{where}: no role is called {unknown[0]!r}; expected {', '.join(ROLES)}")


def _has_name_P(by: str, name: str, batch: TorchBatch) -> Tensor:
    if by == "role":
        if batch.roles_P is None:
            raise ConfigError("a loss term goes by role, but the batch has no roles; set loader.with_roles")
        return batch.roles_P == ROLES.index(name)
    raise ConfigError("a loss term goes by domain, but the batch has no domains")


def _measure_P(by: str, batch: TorchBatch) -> Tensor:
    teacher = batch.teacher
    if by == "kept_mass":
        return 1 - teacher.tail_mass_P.float()
    if by == "nll":
        return _nll_P(teacher, batch.target_ids_P)
    if teacher.entropy_P is None:
        raise ConfigError("a loss term goes by the teacher's entropy, which the cache was captured without (selection.entropy)")
    return teacher.entropy_P.float()


def _nll_P(teacher: SoftTargets[Tensor], target_ids_P: Tensor) -> Tensor:
    """Of the target id among the exact entries; -log of the tail mass, the least it can be, outside them."""
    is_target_PK = teacher.token_ids_PK == target_ids_P[:, None]
    if teacher.num_exact_P is not None:
        columns_K = torch.arange(is_target_PK.shape[1], device=is_target_PK.device)
        is_target_PK = is_target_PK & (columns_K < teacher.num_exact_P[:, None])
    within_P = torch.where(is_target_PK, -teacher.logprobs_PK.float(), 0.0).sum(dim=1)
    outside_P = -teacher.tail_mass_P.float().clamp_min(torch.finfo(torch.float32).tiny).log()
    return torch.where(is_target_PK.any(dim=1), within_P, outside_P)
