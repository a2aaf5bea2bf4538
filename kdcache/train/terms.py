"""Further terms of a loss: what is added to the divergence from the teacher and the cross entropy of the target ids."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kdcache import extensions
from kdcache.config.train import TermConfig
from kdcache.errors import ConfigError
from kdcache.format.manifest import Manifest
from kdcache.loader.torch_batches import TorchBatch
from kdcache.loss.fused import PLAIN_HEAD, Projection


@dataclass(frozen=True, slots=True, eq=False)
class StudentStates:
    """What the student makes of a batch at its positions, with gradients.

    Attributes:
        hidden_PH: (P, H) what the output projection reads.
        projection: the output projection.
    """

    hidden_PH: Tensor
    projection: Projection

    def logits(self) -> Tensor:
        """(P, V) float32: all of them at once, for terms that are not fused with the projection."""
        projection = self.projection
        weight_VH, bias_V, head = projection.weight_VH, projection.bias_V, projection.head or PLAIN_HEAD
        logits_PV = torch.nn.functional.linear(self.hidden_PH, weight_VH, bias_V)[:, : head.vocab_size].float()
        logits_PV = logits_PV * head.logit_scale
        return logits_PV if head.softcap is None else head.softcap * torch.tanh(logits_PV / head.softcap)


class Term(ABC):
    """One further term; a subclass is registered under its name as an entry point of the group `kdcache.losses`.

    It is made with the config's `options` as keywords, and raises ConfigError, TypeError or ValueError for wrong ones.
    """

    def check(self, manifest: Manifest) -> None:  # noqa: B027
        """Raise ConfigError, in one sentence, where a cache lacks what the term needs; called before anything is trained."""

    @abstractmethod
    def __call__(self, student: StudentStates, batch: TorchBatch, weights_P: Tensor) -> Tensor:
        """A scalar: sum over positions of weight * loss, differentiable with respect to the student's tensors.

        Positions of weight 0 add nothing, whatever stands there, and the sum over a batch is that over its parts: ranks and
        accumulated batches are then averaged as the rest of the loss is.

        Args:
            student: its states at the batch's positions.
            batch: the whole batch on the student's device, with `teacher`, `target_ids_P` and features that were asked for.
            weights_P: (P,) >= 0.
        """


def make_terms(configs: Sequence[TermConfig]) -> list[tuple[float, Term]]:
    """The weight and the term of each config.

    Raises:
        ConfigError: no installed package brings the term, or it does not take its options.
    """
    return [(config.weight, _make(config)) for config in configs]


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
