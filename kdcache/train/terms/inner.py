"""A student's inner states, taken by hooks while it runs: no second forward, and only the layers that terms read.

Hooks hang on the model's own modules, so that wrappers (DDP, accelerate, adapters of peft) do not matter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kdcache.errors import ConfigError
from kdcache.teacher.features import find_decoder
from kdcache.teacher.hf.attention_calls import AttentionCall, prove_calls, seen_calls
from kdcache.teacher.hf.heads import prove_heads, seen_heads
from kdcache.train.body import hidden_states, text_config
from kdcache.train.terms.base import Read

_PROBE_TOKENS = 8
_AFTER_NORM: Read = ("hidden", -1)


def check_reads(model: Any, reads: Sequence[Read]) -> None:
    """Refuse, on a few tokens, to read what the student does not show, or shows differently from `output_hidden_states`.

    Raises:
        ConfigError: a layer that the student does not have, or that hooks do not see rightly.
    """
    num_layers = int(text_config(model).num_hidden_layers)
    for kind, layer in reads:
        first = 0 if kind == "hidden" else 1
        if not (first <= layer <= num_layers or (kind, layer) == _AFTER_NORM):
            has = f"layers {first} to {num_layers}{', and -1 after the final norm' if kind == 'hidden' else ''}"
            raise ConfigError(f"a loss term reads {_in_words(kind, layer)} of the student, but the student has {has}")
    was_training = model.training
    try:
        _prove(model.eval(), reads, num_layers)
    finally:
        model.train(was_training)


class Seen:
    """What was read in the latest forward, by kind and layer."""

    def __init__(self) -> None:
        self.hidden: dict[Read, Tensor] = {}
        self.heads: Mapping[Any, Tensor] = {}
        self.calls: Mapping[int, AttentionCall] = {}

    def found(self) -> dict[Read, Any]:
        """All of it."""
        return {**self.hidden, **self.heads, **{("attention", layer): call for layer, call in self.calls.items()}}


@contextmanager
def reading(model: Any, reads: Sequence[Read]) -> Iterator[Seen]:
    """Hold what is read in each forward while the context is open; all but the state after the final norm.

    Args:
        model: the student itself, not a wrapper of it.
        reads: see `Needs.reads`.
    """
    seen = Seen()
    with ExitStack() as stack:
        for kind, layer in reads:
            if kind == "hidden" and layer != -1:
                stack.callback(_watch(model, layer, seen.hidden).remove)
        if heads := _heads(reads):
            seen.heads = stack.enter_context(seen_heads(model, heads))
        if calls := _calls(reads):
            seen.calls = stack.enter_context(seen_calls(model, calls))
        yield seen


def complete(seen: Seen, reads: Sequence[Read], hidden_BTH: Tensor) -> dict[Read, Any]:
    """What was read, and the state after the final norm.

    Raises:
        ConfigError: something was not seen, or has no gradient: the model is compiled, or checkpoints its layers in a way that
            hides them.
    """
    found: dict[Read, Any] = {**seen.found(), _AFTER_NORM: hidden_BTH}
    for read in reads:
        what = f"a loss term reads {_in_words(*read)} of the student"
        if read not in found:
            raise ConfigError(f"{what}, which this forward did not show; do not compile the model, or leave the term out")
        state = found[read].query_BhTd if read[0] == "attention" else found[read]
        if hidden_BTH.requires_grad and not state.requires_grad and _should_have(read):
            raise ConfigError(
                f"{what}, which has no gradient: turn gradient checkpointing on with "
                "gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
    return {read: found[read] for read in reads}


def _in_words(kind: str, layer: int) -> str:
    return f"{'hidden states' if kind == 'hidden' else kind} of layer {layer}"


def _heads(reads: Sequence[Read]) -> list[Read]:
    return [(kind, layer) for kind, layer in reads if kind not in ("hidden", "attention")]


def _calls(reads: Sequence[Read]) -> list[int]:
    return [layer for kind, layer in reads if kind == "attention"]


def _should_have(read: Read) -> bool:
    # The embeddings' output has none where they are frozen, as under LoRA; a layer after them has one.
    return read != ("hidden", 0)


def _watch(model: Any, layer: int, states: dict[Read, Tensor]) -> Any:
    layers = _layers(model)
    if layer == 0:

        def before(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            states["hidden", 0] = args[0] if args else kwargs["hidden_states"]

        return layers[0].register_forward_pre_hook(before, with_kwargs=True)

    def after(_module: nn.Module, _args: Any, output: Any) -> None:
        states["hidden", layer] = output if isinstance(output, Tensor) else output[0]

    return layers[layer - 1].register_forward_hook(after)


def _layers(model: Any) -> Any:
    found = find_decoder(model, int(text_config(model).num_hidden_layers))
    if found is None:
        raise ConfigError(
            f"a loss term reads inner states, but the layers of {type(model).__name__} are not found; read layer -1, the state "
            "after the final norm"
        )
    return found[1]


@torch.no_grad()
def _prove(model: Any, reads: Sequence[Read], num_layers: int) -> None:
    ids_1T = torch.arange(1, 1 + _PROBE_TOKENS, device=model.device)[None] % text_config(model).vocab_size
    layers = [layer for kind, layer in reads if kind == "hidden" and layer != -1]
    if layers:
        _prove_layers(model, layers, num_layers, ids_1T)
    try:
        if heads := _heads(reads):
            prove_heads(model, heads, ids_1T)
        if calls := _calls(reads):
            prove_calls(model, calls, ids_1T)
    except ConfigError as error:
        what = ", ".join(_in_words(kind, layer) for kind, layer in reads if kind != "hidden")
        raise ConfigError(f"a loss term reads {what} of the student, which cannot be read ({error})") from error


def _prove_layers(model: Any, layers: Sequence[int], num_layers: int, ids_1T: Tensor) -> None:
    positions_1T = torch.arange(_PROBE_TOKENS, device=model.device)[None]
    expected = model(input_ids=ids_1T, use_cache=False, output_hidden_states=True).hidden_states
    with reading(model, [("hidden", layer) for layer in layers]) as seen, _norm_inputs(model) as inputs:
        last_1TH = hidden_states(model, ids_1T, positions_1T)
    # Before the final norm: what the module took whose output is the last state.
    before_norm = [given for given, output in inputs if output.shape == last_1TH.shape and torch.equal(output, last_1TH)]
    for layer in layers:
        right = before_norm if layer == num_layers else [] if expected is None else [expected[layer]]
        state = seen.hidden.get(("hidden", layer))
        if state is None or not any(torch.equal(state, one) for one in right):
            raise ConfigError(
                f"a loss term reads layer {layer} of the student, but what that layer of {type(model).__name__} gives is not "
                "what output_hidden_states gives; read layer -1, the state after the final norm"
            )


@contextmanager
def _norm_inputs(model: Any) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Of the modules next to the list of layers, the last one of which is the final norm: what each took and gave."""
    found = find_decoder(model, int(text_config(model).num_hidden_layers))
    seen: list[tuple[Tensor, Tensor]] = []

    def after(_module: nn.Module, args: Any, output: Any) -> None:
        if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
            seen.append((args[0], output))

    with ExitStack() as stack:
        for module in found[0].children() if found else ():
            stack.callback(module.register_forward_hook(after).remove)
        yield seen
