"""Terms of a loss as a part of the model that another trainer wraps, trains and keeps in its checkpoints.

What terms learn (projectors) must be in the model before it is wrapped: DDP and FSDP synchronise what is there, trainers'
checkpoints hold its `state_dict`, and both optimisers and weight checks look at its parameters. The exported model must not
have it: `save_pretrained` leaves out the names in `_keys_to_ignore_on_save`, which are these.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel

from kdcache.errors import ConfigError
from kdcache.train.terms.engine import LossTerms

NAME = "kdcache_terms"
"""Of the submodule."""


def attach(model: nn.Module, terms: LossTerms) -> None:
    """Make terms that have parameters a submodule of a model; those of an earlier loss go.

    Args:
        model: not yet wrapped; of transformers or of peft.
        terms: set up, on the model's device.
    """
    detach(model)
    if not terms.has_parameters:
        return
    model.add_module(NAME, terms)
    saver: Any = model
    if hasattr(model, "_keys_to_ignore_on_save"):
        saver._keys_to_ignore_on_save = [*(saver._keys_to_ignore_on_save or ()), *_names(terms)]


def detach(model: nn.Module) -> None:
    """Take terms out of a model; nothing happens where there are none."""
    terms = model._modules.pop(NAME, None)
    if terms is not None and hasattr(model, "_keys_to_ignore_on_save"):
        saver: Any = model
        own = set(_names(terms))
        saver._keys_to_ignore_on_save = [name for name in saver._keys_to_ignore_on_save or () if name not in own] or None


def check_wrapped(model: nn.Module, terms: LossTerms) -> None:
    """Refuse a wrapper that was made before terms were attached: their gradients would differ from rank to rank, in silence.

    Raises:
        ConfigError: DistributedDataParallel does not know them.
    """
    if not (isinstance(model, DistributedDataParallel) and terms.has_parameters):
        return
    known = {id(parameter) for parameter in model._module_parameters}
    if not all(id(parameter) in known for parameter in terms.parameters()):
        raise ConfigError(
            "the StudentLoss was made after the model was wrapped by DistributedDataParallel, which then does not average the "
            "gradients of its projectors: make it first"
        )


@contextmanager
def without(model: nn.Module) -> Iterator[None]:
    """A model without its terms for a while."""
    terms = model._modules.pop(NAME, None)
    try:
        yield
    finally:
        if terms is not None:
            model._modules[NAME] = terms


def parameter_groups(model: nn.Module, terms: LossTerms, weight_decay: float) -> list[dict[str, Any]]:
    """Groups for an optimiser of torch: matrices with weight decay, vectors without, and terms with their own learning rate."""
    own = {id(parameter) for parameter in terms.parameters()}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [*groups, projector_group(terms)] if own else groups


def projector_group(terms: LossTerms) -> dict[str, Any]:
    """The group of what terms learn."""
    parameters: Iterable[Parameter] = terms.parameters()
    return {"params": list(parameters), "lr": terms.config.projector_lr, "weight_decay": 0.0}


def _names(terms: nn.Module) -> list[str]:
    return [f"{NAME}.{name}" for name in terms.state_dict()]
