"""The terms of a loss, made from a config, checked and added up."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kdcache import extensions
from kdcache.config.terms import TermConfig, WeightSchedule
from kdcache.errors import ConfigError
from kdcache.format.manifest import Manifest
from kdcache.loader.torch_batches import TorchBatch
from kdcache.train.terms.base import StudentStates, Term


def make_terms(configs: Sequence[TermConfig]) -> list[tuple[float, Term]]:
    """The weight and the term of each config.

    Raises:
        ConfigError: no installed package brings the term, or it does not take its options.
    """
    return [(_constant(config), _make(config)) for config in configs]


def _constant(config: TermConfig) -> float:
    if isinstance(config.weight, WeightSchedule):
        raise ConfigError(f"loss term {config.term!r}: weights by a schedule are not built yet; give a number")
    return config.weight


def _make(config: TermConfig) -> Term:
    kind = extensions.find("losses", config.term)
    if not (isinstance(kind, type) and issubclass(kind, Term)):
        raise ConfigError(f"loss term {config.term!r} is not a Term, but {kind!r}; mend the package that brings it")
    try:
        return kind(**config.options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"loss term {config.term!r} does not take the options {config.options!r}: {error}") from error


def sum_of_terms(configs: Sequence[TermConfig], student: StudentStates, batch: TorchBatch, weights_P: Tensor) -> Tensor:
    """A scalar: the terms' sums over the positions, each times its own weight."""
    return torch.stack([weight * term(student, batch, weights_P) for weight, term in make_terms(configs)]).sum()


def check_terms(configs: Sequence[TermConfig], manifest: Manifest) -> None:
    """Refuse, before anything is trained, a term for which the cache is not enough.

    Raises:
        ConfigError: as `make_terms` and `Term.check`.
    """
    for _, term in make_terms(configs):
        term.check(manifest)
