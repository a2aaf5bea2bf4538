"""The two terms of the short form: a divergence from the teacher, and the cross entropy of the target ids.

Terms that are made of logits share one pass over them, see `one_pass`; alone, each makes its own.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from kdcache.config.terms import as_varying
from kdcache.errors import ConfigError
from kdcache.format.manifest import Manifest
from kdcache.format.selection import entries_of
from kdcache.kernels.divergences import find_kind, get_divergence
from kdcache.loader.torch_batches import TorchBatch
from kdcache.loss.divergence_sum import DivergenceSum, WeightedDivergence
from kdcache.loss.fused import fused_sparse_kd_loss
from kdcache.loss.prepare import LossSettings
from kdcache.loss.selection_rules import reading_for
from kdcache.train.terms.base import Needs, StudentStates, Term
from kdcache.train.terms.varying import check_cache, check_varying, needs_of, values_P


class LogitTerm(Term):
    """A term that is part of one pass over the logits."""

    @abstractmethod
    def parts(self, batch: TorchBatch) -> list[WeightedDivergence]:
        """The divergences that it is the sum of."""

    @property
    def cross_entropy(self) -> float:
        """The weight of the cross entropy of the target ids in it."""
        return 0.0

    watched: Mapping[str, Tensor] = MappingProxyType({})
    """Means over this rank's positions that its divergences say are worth watching, of the last pass."""

    def measures(self) -> dict[str, float]:
        return {name: float(value) for name, value in self.watched.items()}

    def forward(self, student: StudentStates, batch: TorchBatch, weights_P: Tensor) -> Tensor:
        return one_pass([InPass(self)], student, batch, weights_P, LossSettings(reduction="sum")).loss


class DivergenceTerm(LogitTerm):
    """A divergence between teacher and student, times the square of the temperature.

    Args:
        divergence: its name, as `loss.divergence`.
        divergence_options: its own parameters; each may differ by position, as an option of a term may.
        tail: tail policy; None for the best one known, see `loss.tail`.
        temperature: of both sides.

    Raises:
        LossError: no such divergence, or not with these parameters.
    """

    needed = "entries that suit the divergence"

    def __init__(
        self,
        *,
        divergence: str = "forward_kl",
        divergence_options: Mapping[str, Any] | None = None,
        tail: str | None = None,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        options = dict(divergence_options or {})
        self._varying = {name: v for name, value in options.items() if (v := as_varying(name, value)) is not None}
        self._plain = {name: value for name, value in options.items() if name not in self._varying}
        kind = find_kind(divergence)
        for name, varying in self._varying.items():
            check_varying(varying, f"divergence_options.{name}")
            if name in kind.__match_args__ and name not in kind.per_position:
                raise ConfigError(f"divergence_options.{name} of {divergence} cannot differ by position")
            for value in varying.all_values:
                get_divergence(divergence, **self._plain, **{name: value})
        self.divergence = get_divergence(divergence, **self._plain, **{n: v.all_values[0] for n, v in self._varying.items()})
        self.tail, self.temperature = tail, temperature

    def needs(self) -> Needs:
        return needs_of(self._varying.values()) | Needs(target_logprobs=self.divergence.requirements.target)

    def check(self, manifest: Manifest) -> None:
        selection = manifest.identity.selection
        for name, varying in self._varying.items():
            check_cache(varying, f"divergence_options.{name}", manifest)
        reading_for(selection.kind, self.divergence, tail=self.tail, temperature=self.temperature)
        if self.temperature != 1 and self.temperature not in selection.temperatures:
            stored = ", ".join(map(str, sorted({1.0, *selection.temperatures})))
            raise ConfigError(
                f"loss.temperature is {self.temperature}, but the cache was captured for {stored}: another temperature cannot "
                "be added afterwards; use one of these, or capture again with it in selection.temperatures"
            )

    def left_out(self, manifest: Manifest) -> str | None:
        """A sentence where the loss does not read the random entries of a cache, with what it reads; else None."""
        kind, name = manifest.identity.selection.kind, self.divergence.name
        reading = reading_for(kind, self.divergence, tail=self.tail, temperature=self.temperature)
        if entries_of(kind) != "mixed" or reading.entries == "unbiased":
            return None
        num_entries = sum(shard.num_entries for shard in manifest.shards)
        exact = [shard.num_exact_entries for shard in manifest.shards]
        num_exact = sum(count for count in exact if isinstance(count, int))
        mass = 1 - sum(shard.tail_mass_sum for shard in manifest.shards) / max(sum(s.num_positions for s in manifest.shards), 1)
        share = num_exact / max(num_entries, 1)
        return (
            f"{name} reads the exact entries of this {kind!r} cache alone, {share:.0%} of all with {mass:.0%} of the mass, and "
            "one bucket for the rest; forward_kl at temperature 1 reads the random ones, too"
        )

    def parts(self, batch: TorchBatch) -> list[WeightedDivergence]:
        own = {name: values_P(varying, batch) for name, varying in self._varying.items()}
        # A program may give numbers by position, too: a skew for each answer, as DistiLLM-2 has it.
        own |= {name: value_P for name, value_P in self.varied.items() if name in self.divergence.per_position}
        divergence = replace(self.divergence, **own) if own else self.divergence
        return [WeightedDivergence(divergence, 1.0, tail=self.tail, temperature=self.temperature)]


class CrossEntropyTerm(LogitTerm):
    """The cross entropy of the target ids; a sequence's last position, which has none, adds nothing."""

    needed = "nothing"

    def parts(self, batch: TorchBatch) -> list[WeightedDivergence]:  # noqa: ARG002
        return []

    @property
    def cross_entropy(self) -> float:
        return 1.0


@dataclass(frozen=True, slots=True, eq=False)
class InPass:
    """A term in a pass over the logits: its weight, and perhaps a (P,) factor of it."""

    term: LogitTerm
    weight: float = 1.0
    factor_P: Tensor | None = None

    def times(self, weight: float | Tensor) -> float | Tensor:
        """The weight of one of its parts."""
        return weight * self.weight if self.factor_P is None else weight * self.weight * self.factor_P

    def without_weight(self, value: Tensor) -> Tensor:
        """A part's value, which is times the weight where that differs by position."""
        return value if self.factor_P is None else value / self.weight


@dataclass(frozen=True, slots=True, eq=False)
class OnePass:
    """What a pass gives: the weighted sum of its terms, and the value of each without its weight, float64."""

    loss: Tensor
    values: list[Tensor] = field(default_factory=list)


def one_pass(
    terms: Sequence[InPass], student: StudentStates, batch: TorchBatch, weights_P: Tensor, settings: LossSettings
) -> OnePass:
    """Terms that are made of logits, added up in one pass over them.

    Args:
        terms: at least one, with weights above 0.
        student, batch, weights_P: as for a term.
        settings: reduction and backend.
    """
    own = [term.term.parts(batch) for term in terms]
    summed = [
        WeightedDivergence(part.divergence, term.times(part.weight), part.tail, part.entries, part.temperature)
        for term, parts in zip(terms, own, strict=True)
        for part in parts
    ]
    of_targets = [term.times(term.term.cross_entropy) for term in terms if term.term.cross_entropy]
    if not summed and all(isinstance(weight, float) for weight in of_targets):
        loss = _loss(student, batch, weights_P, settings, alpha=0.0)
        weight = sum(float(weight) for weight in of_targets)
        return OnePass(loss if weight == 1 else weight * loss, [loss.detach().double() for _ in terms])
    total = DivergenceSum(summed or [WeightedDivergence("forward_kl", 0.0)], sum(of_targets, start=0.0))
    loss = _loss(student, batch, weights_P, settings, divergence=total)
    assert total.values is not None
    _watch(terms, own, total, 1.0 if settings.reduction == "mean" else weights_P.sum())
    values = iter(total.values)
    of_terms = [torch.stack([next(values) for _ in parts]).sum() if parts else total.values[-1] for parts in own]
    return OnePass(loss, [term.without_weight(value) for term, value in zip(terms, of_terms, strict=True)])


def _watch(
    terms: Sequence[InPass], own: Sequence[Sequence[WeightedDivergence]], total: DivergenceSum, count: float | Tensor
) -> None:
    """Give each term of one divergence what that watches."""
    first = 0
    for term, parts in zip(terms, own, strict=True):
        found = {name.partition("."): value for name, value in total.measures.items()} if len(parts) == 1 else {}
        term.term.watched = {name: value / count for (index, _, name), value in found.items() if index == str(first)}
        first += len(parts)


def _loss(student: StudentStates, batch: TorchBatch, weights_P: Tensor, settings: LossSettings, **asked: Any) -> Tensor:
    return fused_sparse_kd_loss(
        student.hidden_PH,
        student.projection,
        batch.teacher,
        target_ids=batch.target_ids_P,
        weights=weights_P,
        settings=settings,
        **asked,
    )
