"""The terms of a loss: made from a config, checked against caches, and added up for a batch.

The loss of a step is a sum over terms of weight * (sum over a batch / count): see `LossTerms.forward`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor, nn

from kdcache import extensions
from kdcache.config.loader import LoaderConfig
from kdcache.config.terms import TermConfig, WeightSchedule
from kdcache.config.train import LossConfig
from kdcache.errors import ConfigError, LossError
from kdcache.format.manifest import Manifest
from kdcache.loader.batches.batch import NO_TARGET
from kdcache.loader.torch_batches import TorchBatch
from kdcache.loss.prepare import LossSettings
from kdcache.loss.states.vectors import zero_of
from kdcache.train.terms.base import Needs, Setting, StudentStates, Term
from kdcache.train.terms.divergence import CrossEntropyTerm, DivergenceTerm, InPass, LogitTerm, one_pass
from kdcache.train.terms.options import wrong_options
from kdcache.train.terms.schedule import weight_at
from kdcache.train.terms.varying import check_cache, check_varying, needs_of, values_P

Varied = Mapping[str, Mapping[str, Tensor]]
"""Name of a term -> name of an option, or `weight` -> (P,): numbers that a program gives with a batch."""


def make_term(config: TermConfig) -> Term:
    """The term of a config.

    Raises:
        ConfigError: no installed package brings it, or it does not take its options.
        LossError: an unknown divergence or parameter.
    """
    kind = extensions.find("losses", config.term)
    if not (isinstance(kind, type) and issubclass(kind, Term)):
        raise ConfigError(f"loss term {config.term!r} is not a Term, but {kind!r}; mend the package that brings it")
    for name, varying in config.varying_options().items():
        check_varying(varying, f"loss term {config.term!r}, option {name}")
        if name not in kind.per_position:
            may = ", ".join(kind.per_position) or "none of its options may"
            raise ConfigError(f"loss term {config.term!r}: option {name!r} cannot differ by position; {may}")
    try:
        term = kind(**config.plain_options())
    except ConfigError as error:
        raise ConfigError(f"loss term {config.term!r}: {error}") from error
    except LossError:  # names what is wrong; it is a ValueError, too
        raise
    except (TypeError, ValueError) as error:
        wrong = wrong_options(kind, config.plain_options())
        said = wrong or f"does not take the options {config.options!r}: {error}"
        raise ConfigError(f"loss term {config.term!r} {said}") from error
    return term


def term_configs(config: LossConfig) -> list[TermConfig]:
    """The terms of a loss, those of the short form first; without terms of weight 0."""
    short: list[TermConfig] = []
    if config.is_short_form:
        options = {name: getattr(config, name) for name in ("divergence", "divergence_options", "tail", "temperature")}
        short = [
            TermConfig(term="divergence", weight=config.alpha, options=options),
            TermConfig(term="cross_entropy", weight=1 - config.alpha),
        ]
    return [term for term in (*short, *config.terms) if term.weight != 0]


def with_needs(config: LoaderConfig, needs: Needs) -> LoaderConfig:
    """The config of a loader whose batches hold what terms need, too."""
    features = tuple(dict.fromkeys((*config.features, *needs.features)))
    return msgspec.structs.replace(
        config,
        features=features,
        with_roles=config.with_roles or needs.roles,
        with_domains=config.with_domains or needs.domains,
        pairs=config.pairs or needs.pairs,
        with_target_logprobs=config.with_target_logprobs or needs.target_logprobs,
    )


@dataclass(frozen=True, slots=True, eq=False)
class TermValues:
    """Of one forward and this rank: of each term the sum, what it is divided by, and the weight at that; float64, (terms,).

    A term whose weight was 0 has the sum NaN: it was not computed.
    """

    sums: Tensor
    counts: Tensor
    weights: Tensor


class LossTerms(nn.Module):
    """The terms of a loss, as modules: their parameters are what is learned besides the student.

    Args:
        config: the loss.

    Raises:
        ConfigError: as `make_term`; no term is left.
    """

    def __init__(self, config: LossConfig) -> None:
        super().__init__()
        self.config = config
        self.configs = term_configs(config)
        if not self.configs:
            raise ConfigError("loss.terms has no term with a weight above 0; give one")
        self.names = _unique([of_one.term for of_one in self.configs])
        # No ModuleList: within a model, its decoder layers are looked for among those.
        self.terms = nn.ModuleDict(dict(zip(self.names, map(make_term, self.configs), strict=True)))
        self.reads = self.needs().reads
        self.last: TermValues | None = None

    def members(self) -> list[Term]:
        """The terms, in their order."""
        return [term for term in self.terms.values() if isinstance(term, Term)]

    def needs(self) -> Needs:
        """What all terms together need."""
        own = [term.needs() | needs_of([c.per_position]) for term, c in zip(self.members(), self.configs, strict=True)]
        return reduce(or_, [*own, *(needs_of(c.varying_options().values()) for c in self.configs)])

    def check(self, manifest: Manifest) -> None:
        """Refuse, before anything is trained, a cache that is not enough for a term.

        Raises:
            ConfigError: it lacks something, in one sentence. LossError: a loss that would be wrong for its selection.
        """
        for name, term, config in zip(self.names, self.members(), self.configs, strict=True):
            check_term(name, term, manifest)
            if config.per_position is not None:
                _check_reads_weights(name, term, "per_position")
                check_varying(config.per_position, f"loss term {name!r}, per_position")
            for varying in (config.per_position, *config.varying_options().values()):
                if varying is not None:
                    check_cache(varying, f"loss term {name!r}", manifest)

    def notes(self, manifest: Manifest) -> list[str]:
        """What to say once when a training starts: what of a cache the loss does not read."""
        said = [term.left_out(manifest) for term in self.members() if isinstance(term, DivergenceTerm)]
        return [one for one in dict.fromkeys(said) if one is not None]

    def set_up(self, setting: Setting) -> None:
        """Make the terms' parameters; once, before training and before a checkpoint is loaded."""
        for term in self.members():
            term.set_up(setting)
        self.reads = self.needs().reads

    def exported(self) -> dict[str, dict[str, Tensor]]:
        """What terms add to the finished model: name of the term -> its tensors, on the CPU."""
        found = {name: term.exported() for name, term in zip(self.names, self.members(), strict=True)}
        return {name: {key: t.cpu().contiguous() for key, t in tensors.items()} for name, tensors in found.items() if tensors}

    @property
    def has_parameters(self) -> bool:
        """Whether the terms learn something themselves."""
        return next(self.parameters(), None) is not None

    @property
    def has_schedule(self) -> bool:
        """Whether a weight changes over the training."""
        return any(isinstance(config.weight, WeightSchedule) for config in self.configs)

    def weights_P(self, batch: TorchBatch) -> Tensor:
        """(P,) what each position counts in a mean.

        A sequence's last position has a teacher but no target id: it must not count in a mean of cross entropies alone.
        """
        if all(isinstance(term, CrossEntropyTerm) for term in self.members()):
            return batch.weights_P * (batch.target_ids_P != NO_TARGET)
        return batch.weights_P

    def counts(self, batch: TorchBatch) -> Tensor:
        """(terms,) float64: what the terms' sums over this batch are divided by."""
        weights_P = self.weights_P(batch)
        return torch.stack([term.count(batch, weights_P).detach().to(_wide(weights_P)) for term in self.members()])

    def total_counts(self, batches: Iterable[TorchBatch]) -> Tensor:
        """The counts of several batches on all ranks together: a scalar where all terms count positions, else (terms,).

        A collective where torch.distributed is initialised: every rank calls it.
        """
        totals = summed_over_ranks(torch.stack([self.counts(batch) for batch in batches]).sum(dim=0))
        return totals[0] if all(type(term).count is Term.count for term in self.members()) else totals

    def forward(
        self,
        student: StudentStates,
        batch: TorchBatch,
        *,
        scale: Tensor | float | None = None,
        at: tuple[int, int] = (0, 1),
        varied: Varied | None = None,
    ) -> Tensor:
        """A scalar: sum over terms of weight * scale * sum over the batch. `last` then has the parts.

        Args:
            student: its states, with all that `reads` names.
            batch: on the student's device.
            scale: one for all terms, or (terms,); None for 1 / count of this batch, which makes means.
            at: the step, and the number of steps, for weights that change.
            varied: numbers by position that a program gives with this batch.
        """
        weights_P, counts = self.weights_P(batch), self.counts(batch)
        runs = [_Run(*one) for one in zip(self.members(), self.configs, self.names, strict=True)]
        for run in runs:
            run.begin(batch, weights_P, at, (varied or {}).get(run.name, {}))
        scales = None if scale is None else torch.as_tensor(scale, device=counts.device).expand(len(counts))
        summed = [*self._fused(runs, student, batch, weights_P, scales), *self._alone(runs, student, batch, counts, scales)]
        self.last = TermValues(
            sums=torch.stack([run.value.to(counts) for run in runs]),
            counts=counts,
            weights=torch.stack([torch.as_tensor(run.weight).to(counts) for run in runs]),
        )
        # Wrappers wait for the gradient of every parameter, also of a term that was left out or had nothing to read.
        touched = [*self.parameters(), *([] if summed else [student.hidden_PH])]
        return torch.stack([*summed, *(zero_of(tensor) for tensor in touched)]).sum()

    def report(self) -> dict[str, float]:
        """Of the last forward and this rank: each term's mean, its weight where that changes, and its own measures."""
        if self.last is None:
            return {}
        means, weights = (self.last.sums / self.last.counts).tolist(), self.last.weights.tolist()
        shown: dict[str, float] = {}
        for i, (name, term, config) in enumerate(zip(self.names, self.members(), self.configs, strict=True)):
            shown |= {f"{name}.weight": weights[i]} if _changes(config) else {}
            if not math.isnan(means[i]):  # of a term that was left out
                shown |= {name: means[i]} | {f"{name}.{measure}": value for measure, value in term.measures().items()}
        return shown

    def _fused(
        self, runs: list[_Run], student: StudentStates, batch: TorchBatch, weights_P: Tensor, scales: Tensor | None
    ) -> list[Tensor]:
        """The terms that share one pass over the logits, added up; nothing where there is none."""
        own = [i for i, run in enumerate(runs) if run.is_fused and run.is_on]
        if not own:
            return []
        in_pass = [InPass(_as_logit(runs[i].term), float(runs[i].weight), runs[i].factor_P) for i in own]
        settings = LossSettings(reduction="mean" if scales is None else "sum", backend=self.config.backend)
        found = one_pass(in_pass, student, batch, weights_P, settings)
        for i, value in zip(own, found.values, strict=True):
            runs[i].value = value * weights_P.sum() if scales is None else value
        return [found.loss if scales is None else found.loss * scales[own[0]].to(found.loss.dtype)]

    def _alone(
        self, runs: list[_Run], student: StudentStates, batch: TorchBatch, counts: Tensor, scales: Tensor | None
    ) -> list[Tensor]:
        """The other terms, each with its weight and scale."""
        own = [i for i, run in enumerate(runs) if not run.is_fused and run.is_on]
        sums = {i: runs[i].term(student, batch, runs[i].weights_P) for i in own}
        for i, total in sums.items():
            runs[i].value = total.detach()
        _balance(runs, counts)
        by = torch.where(counts > 0, 1 / counts, 0.0) if scales is None else scales
        return [(runs[i].weight * by[i]).to(total.dtype) * total for i, total in sums.items()]


class _Run:
    """A term in one forward: its weight, what of it differs by position, and its value."""

    def __init__(self, term: Term, config: TermConfig, name: str) -> None:
        self.term, self.config, self.name = term, config, name
        self.weight: float | Tensor = 0.0
        self.factor_P: Tensor | None = None
        self.value = torch.tensor(math.nan)
        # What is balanced is known after its own pass alone.
        self.is_fused = isinstance(term, LogitTerm) and config.balance == "none"

    def begin(self, batch: TorchBatch, weights_P: Tensor, at: tuple[int, int], given: Mapping[str, Tensor]) -> None:
        self.weight = weight_at(self.config.weight, *at)
        if "weight" in given:
            _check_reads_weights(self.name, self.term, "a weight by position")
        factors = [given["weight"]] if "weight" in given else []
        factors += [] if self.config.per_position is None else [values_P(self.config.per_position, batch)]
        self.factor_P = torch.stack(factors).prod(dim=0) if factors else None
        self.weights_P = weights_P if self.factor_P is None else weights_P * self.factor_P
        options = {name: values_P(varying, batch) for name, varying in self.config.varying_options().items()}
        self.term.varied = options | {name: value for name, value in given.items() if name != "weight"}

    @property
    def is_on(self) -> bool:
        """Whether it has a weight in this step."""
        return isinstance(self.weight, Tensor) or self.weight != 0


def _balance(runs: list[_Run], counts: Tensor) -> None:
    """Give terms that are to be balanced the first one's mean over their own as a further weight: that of all ranks' batch."""
    balanced = [i for i, run in enumerate(runs) if run.config.balance == "equal"]
    if not balanced:
        return
    both = summed_over_ranks(torch.stack([torch.stack([run.value.to(counts) for run in runs]), counts]))
    means = (both[0] / both[1]).abs()
    for i in balanced:
        ratio = means[0] / means[i]
        runs[i].weight = runs[i].weight * torch.where(torch.isfinite(ratio), ratio, 0.0)


def summed_over_ranks(tensor: Tensor) -> Tensor:
    """The sum over all ranks; a collective where torch.distributed is initialised."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def scale_of(totals: Tensor, num_ranks: int) -> Tensor:
    """What each rank multiplies the terms' sums with, so that gradients averaged over ranks are those of the means."""
    return torch.where(totals > 0, num_ranks / totals.clamp_min(torch.finfo(totals.dtype).tiny), 0.0)


def check_term(name: str, term: Term, manifest: Manifest) -> None:
    """Refuse a cache that is not enough for one term.

    Raises:
        ConfigError: it lacks a feature or a sidecar that the term needs, or what `Term.check` asks for.
        LossError: as `Term.check`.
    """
    needs = term.needs()
    if needs.features:
        _check_there(name, "feature", needs.features, [feature.name for feature in manifest.identity.features])
    if needs.sidecars:
        _check_there(name, "sidecar", needs.sidecars, [sidecar.name for sidecar in manifest.sidecars])
    term.check(manifest)


def _check_reads_weights(name: str, term: Term, what: str) -> None:
    if not term.reads_weights:
        raise ConfigError(
            f"loss term {name!r} counts sequences or all vectors alike, so {what} would have no effect; leave it out, or "
            "compare a feature of positions with `positions: supervised`, where the term has this option"
        )


def _check_there(name: str, kind: str, wanted: Sequence[str], there: Sequence[str]) -> None:
    for missing in [one for one in wanted if one not in there]:
        has = ", ".join(there) or "none"
        raise ConfigError(
            f"loss term {name!r} needs the {kind} {missing!r}, which the cache was captured without; it has {has}"
        )


def _changes(config: TermConfig) -> bool:
    return config.balance != "none" or isinstance(config.weight, WeightSchedule)


def _as_logit(term: Term) -> LogitTerm:
    assert isinstance(term, LogitTerm)
    return term


def _unique(names: Sequence[str]) -> list[str]:
    """The names, with a number where one comes again: "divergence", "divergence_2"."""
    counted: dict[str, int] = {}
    made: list[str] = []
    for name in names:
        counted[name] = counted.get(name, 0) + 1
        made.append(name if counted[name] == 1 else f"{name}_{counted[name]}")
    return made


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.device.type == "mps" else torch.float64
