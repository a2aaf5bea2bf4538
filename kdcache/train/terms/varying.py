"""Numbers that differ from position to position: by role, by domain, or by what the teacher said."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from kdcache.config.terms import Varying
from kdcache.errors import ConfigError
from kdcache.format.manifest import Manifest
from kdcache.format.record import ROLES
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
    return Needs(roles="role" in by, domains="domain" in by, target_logprobs="nll" in by)


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
    if batch.domains is None:
        raise ConfigError("a loss term goes by domain, but the batch has no domains; set loader.with_domains")
    has_name_S = torch.tensor([domain == name for domain in batch.domains], dtype=torch.bool, device=batch.weights_P.device)
    return has_name_S[_sequences_P(batch)]


def _sequences_P(batch: TorchBatch) -> Tensor:
    """(P,) which of the batch's sequences each position is of."""
    starts_G = batch.cu_seqlens_G1[:-1].long()
    # What is after a row's last sequence is a segment, too, of padding.
    is_sequence_G = batch.segment_ids_BT.flatten()[starts_G] > 0
    segments_P = torch.searchsorted(batch.cu_seqlens_G1[1:].long(), batch.flat_positions_P, right=True)
    return (is_sequence_G.cumsum(0) - 1)[segments_P]


def _measure_P(by: str, batch: TorchBatch) -> Tensor:
    teacher = batch.teacher
    if by == "kept_mass":
        return 1 - teacher.tail_mass_P.float()
    if by == "nll":
        if teacher.target_logprobs_P is None:
            raise ConfigError(
                "a loss term goes by the NLL of target ids, which the batch lacks; set loader.with_target_logprobs"
            )
        return -teacher.target_logprobs_P.float()
    if teacher.entropy_P is None:
        raise ConfigError("a loss term goes by the teacher's entropy, which the cache was captured without (selection.entropy)")
    return teacher.entropy_P.float()
