"""The fused loss of a model that is called through its wrapper: DDP, FSDP2, accelerate's, Lightning's, an adapter's.

Gradients are all-reduced (and sharded weights gathered) by hooks on the wrapper's forward, so the model must be called as a
whole. It is, with its output projection exchanged for the time of the call for one that gives the loss instead of logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kdcache.config.train import LossConfig
from kdcache.errors import ConfigError, NotFiniteError
from kdcache.half_precision import warn_if_emulated
from kdcache.loader.loader import Loader
from kdcache.loader.torch_batches import TorchBatch
from kdcache.shown import get_logger
from kdcache.teacher.hf.attention import attention_gap, attention_of
from kdcache.train.adapters.attached import attach, check_wrapped, parameter_groups
from kdcache.train.body import output_projection, positions
from kdcache.train.finite import not_finite_weight, shown_sources
from kdcache.train.packed import check_architecture, logits_head
from kdcache.train.step import BatchLoss
from kdcache.train.student import check_vocabulary
from kdcache.train.terms.engine import Varied, scale_of, with_needs
from kdcache.train.terms.inner import reading
from kdcache.train.terms.setting import set_up_terms

log = get_logger(__name__)

_SHRUNK = 2.0**-40


class StudentLoss:
    """The loss of a student from a loader's batches; [P, V] logits never exist whole.

    Args:
        model: a causal language model of transformers, or one with adapters of peft; not yet wrapped.
        loader: its caches say what their entries are.
        config: what is minimised. Features that its terms need are asked of the loader. Terms that learn something themselves
            (projectors) become a part of the model, so make optimisers and wrappers after this, see `parameter_groups`.
        seed: of what terms draw at random, as their first weights.
        check_finite: refuse a loss that is not finite before its gradient reaches the weights. Waits for the device at every
            call; without it NaN goes on as in any loop of torch.

    Attributes:
        at: the step and the number of steps, for terms whose weight follows a schedule: set it before each call.

    Raises:
        ConfigError: a model that would silently be trained wrongly, see `check_architecture`; a cache or a model that lacks
            what a term needs.
        MismatchError: the model's vocabulary cannot hold the tokenizer's ids.
        LossError: a loss that would be wrong for the cache's selection.
    """

    def __init__(
        self,
        model: nn.Module,
        loader: Loader,
        config: LossConfig = LossConfig(),  # noqa: B008 - frozen
        *,
        seed: int = 0,
        check_finite: bool = True,
    ) -> None:
        plain: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # pyright: ignore[reportCallIssue]
        check_architecture(plain, is_packed=loader.config.packing != "none")
        _warn_of_attention(plain)
        self._plain = plain
        self.head = output_projection(plain)
        identity = loader.caches[0].manifest.identity
        advice = f"call its resize_token_embeddings({identity.teacher.vocab_size}) first"
        check_vocabulary(self.head.out_features, identity, advice)
        self.loss = BatchLoss(config, logits_head(plain))
        self.at: tuple[int, int] | None = None
        for cache in loader.caches:
            self.loss.terms.check(cache.manifest)
            for note in self.loss.terms.notes(cache.manifest):
                log.warning("%s", note)
        loader.ask_for(with_needs(loader.config, self.loss.terms.needs()))
        attach(model, set_up_terms(self.loss.terms, plain, loader.caches, seed=seed))
        self._loader, self._check_finite = loader, check_finite
        # The model takes the loss for logits, and scales and caps it: the first is undone, the second does nothing to the tiny.
        self._shrink = 1.0 if self.loss.scaled.softcap is None else _SHRUNK

    def __call__(
        self,
        model: nn.Module,
        batch: TorchBatch,
        scale: Tensor | float | None = None,
        *,
        varied: Varied | None = None,
    ) -> Tensor:
        """A scalar.

        Args:
            model: the one given before, or a wrapper of it.
            batch: on the model's device.
            scale: None for means over this batch; else the terms' sums over it times this, see `scale`.
            varied: weights and options by position, see `LossTerms.forward`.

        Raises:
            NotFiniteError: the loss is NaN or infinite; names the sequences, and a weight that is not finite.
        """

        def loss_of(hidden_BTH: Tensor) -> Tensor:
            with torch.autocast(hidden_BTH.device.type, enabled=False):
                loss = self.loss(hidden_BTH, self.head, batch, dtype=dtype, inner=inner, scale=scale, at=at, varied=varied)
            return loss * self._shrink

        kind = batch.input_ids_BT.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.head.weight.dtype
        warn_if_emulated(str(dtype).removeprefix("torch."), kind, "a student in float32, without autocast,")
        check_wrapped(model, self.loss.terms)
        at = self._at()
        with reading(self._plain, self.loss.terms.reads) as inner, _instead_of_forward(self.head, loss_of):
            where = positions(self._plain, self._plain, batch.position_ids_BT)
            outputs = model(input_ids=batch.input_ids_BT, use_cache=False, **where)
        # Taken from the output, not from loss_of: wrappers hang their backward hooks on what the forward gives.
        loss = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
        if loss.ndim:
            raise ConfigError(
                f"{type(model).__name__} made logits of the shape {tuple(loss.shape)} without calling its output projection "
                "as a module (its forward was exchanged?); the fused loss cannot replace it"
            )
        loss = loss / (self._shrink * self.loss.scaled.logit_scale)
        if self._check_finite and not bool(torch.isfinite(loss.detach())):
            self._refuse(model, loss, batch)
        return loss

    def _refuse(self, model: nn.Module, loss: Tensor, batch: TorchBatch) -> None:
        sources = [] if batch.state is None else self._loader.sources_before(batch.state)
        weight = not_finite_weight(model)
        cause = "" if weight is None else f": the weight {weight!r} is not finite"
        raise NotFiniteError(
            f"the student's loss is {loss.item()}{f', {shown_sources(sources)}' if sources else ''}{cause}; start again, or "
            "from the last checkpoint with a lower learning rate or a longer warm-up, or leave the batch out"
        )

    def scale(self, batches: Iterable[TorchBatch]) -> Tensor:
        """For all batches of one optimiser step: what makes their losses add up, and average over ranks, to the means over all
        that terms count on all ranks. A collective: every rank calls it, also one without a position."""
        totals = self.counts(batches)
        num_ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        return scale_of(totals, num_ranks)

    def counts(self, batches: Iterable[TorchBatch]) -> Tensor:
        """Of all batches of one optimiser step on all ranks: what terms count, a scalar where they all count positions, else
        (terms,). A collective, as `scale`."""
        return self.loss.terms.total_counts(batches)

    def report(self) -> dict[str, float]:
        """Of the last call and this rank: each term's mean and what else it measures."""
        return self.loss.terms.report()

    def seen(self) -> Tensor:
        """(2, terms) of the last call and this rank: the terms' sums and what they are divided by, to be added up."""
        last = self.loss.terms.last
        if last is None:
            raise ConfigError("the student's loss has not been computed yet; call it first")
        is_on = ~torch.isnan(last.sums)
        return torch.stack([last.sums.nan_to_num(), last.counts * is_on])

    def parameter_groups(self, model: nn.Module, *, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """What an optimiser of torch is made with: terms have their own learning rate and no weight decay.

        Args:
            model: as it is to be optimised.
            weight_decay: of the model's matrices.
        """
        return parameter_groups(model, self.loss.terms, weight_decay)

    def _at(self) -> tuple[int, int]:
        if self.at is None and self.loss.terms.has_schedule:
            raise ConfigError(
                "the weight of a loss term follows a schedule, but the step is not known here: set `at = (step, num_steps)` of "
                "the StudentLoss before each call"
            )
        return self.at or (0, 1)


def _warn_of_attention(model: Any) -> None:
    """The model is the caller's, who may know what was left out: it is said, and not changed."""
    was_training = model.training
    gap, name = attention_gap(model.eval()), attention_of(model)
    model.train(was_training)
    if gap.layers:
        log.warning(
            "the student's %s attention leaves out what its configuration asks (its output is up to %.0f%% of the most off); "
            "load it with attn_implementation='eager'",
            name, 100 * gap.layers,
        )  # fmt: skip


@contextmanager
def _instead_of_forward(module: nn.Module, function: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Calls of the module go to the function, and still through the module's hooks (FSDP gathers its weight in them)."""
    before = module.__dict__.get("forward")  # of a library that exchanged it too, as accelerate's hooks do
    module.forward = function
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
