"""A look at whether a student is what it was cut from: the teacher, with the other layers skipped.

Asked of the models themselves on a few tokens, so that no list of architectures has to be right.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdcache.errors import ConfigError
from kdcache.train.body import text_config
from kdcache.train.init.build import layer_modules

_TOKENS = 32
_LAYER_FIELDS = ("layer_idx", "layer_id", "layer_index", "layer_number")
"""Attributes that may differ: a layer's own number."""


@torch.no_grad()
def prove_layers(teacher: PreTrainedModel, student: PreTrainedModel, kept: Sequence[int]) -> None:
    """Refuse a student whose logits are not, bit for bit, those of the teacher with the other layers skipped.

    Args:
        teacher, student: in evaluation mode, of one dtype and on one device.
        kept: the teacher's layers that the student has.

    Raises:
        ConfigError: a logit differs, or a layer is set up otherwise than the one it was copied from (a window longer than the
            few tokens would not show in the logits).
    """
    ids_1T = probe_ids(student)
    with skipped(teacher, kept):
        expected = teacher(input_ids=ids_1T, use_cache=False).logits
    found = student(input_ids=ids_1T, use_cache=False).logits
    if not torch.equal(found, expected):
        gap = float((found.float() - expected.float()).abs().max())
        raise ConfigError(
            f"student.layers: layers {', '.join(map(str, kept))} of {type(teacher).__name__} alone do not give what the "
            f"teacher gives with the others skipped (logits differ by up to {gap:.2g}): what they compute depends on their "
            "number, or on other layers; keep other layers, or use init random"
        )
    for new, layer in enumerate(kept):
        odd = _difference(layer_modules(teacher)[layer], layer_modules(student)[new])
        if odd is not None:
            raise ConfigError(
                f"student.layers: as layer {new} of the student, layer {layer} of {type(teacher).__name__} would be set up "
                f"otherwise ({odd}); keep other layers, or use init random"
            )


@contextmanager
def skipped(model: Any, kept: Sequence[int]) -> Iterator[None]:
    """Run a model as if it had these layers only: the others hand on what they are given."""
    handles = [
        module.register_forward_hook(_hand_on, with_kwargs=True)
        for layer, module in enumerate(layer_modules(model))
        if layer not in set(kept)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hand_on(_module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    given = args[0] if args else kwargs["hidden_states"]
    return given if isinstance(output, Tensor) else (given, *output[1:])


def probe_ids(model: Any) -> Tensor:
    """(1, T) a few ids of the model."""
    text = text_config(model)
    count = min(_TOKENS, getattr(text, "max_position_embeddings", None) or _TOKENS)
    return (torch.arange(count, device=model.device) * 37 + 11)[None] % int(text.vocab_size)


def _difference(theirs: nn.Module, ours: nn.Module) -> str | None:
    """An attribute in which two layers differ, as in `self_attn.sliding_window is 4096 there, None here`."""
    modules = dict(ours.named_modules())
    for path, module in theirs.named_modules():
        before, now = _plain(module), _plain(modules[path])
        for name in before | now:
            if before.get(name) != now.get(name):
                where = f"{path}.{name}" if path else name
                return f"{where} is {before.get(name)!r} in the teacher, {now.get(name)!r} in the student"
    return None


def _plain(module: nn.Module) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, bool | int | float | str | None) and not name.startswith("_") and name not in _LAYER_FIELDS
    }
