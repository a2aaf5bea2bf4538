"""A student's inner states, taken by hooks while it runs: no second forward, and only the layers that terms read.

Hooks hang on the model's own modules, so that wrappers (DDP, accelerate, adapters of peft) do not matter.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kdcache.errors import ConfigError
from kdcache.teacher.features import find_decoder
from kdcache.teacher.hf.attention_calls import seen_calls
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
            raise ConfigError(f"a loss term reads the student's {kind} of layer {layer}, but the student has {has}")
    layers = [layer for kind, layer in reads if kind == "hidden" and layer != -1]
    was_training = model.training
    try:
        if layers:
            _prove_layers(model.eval(), layers, num_layers)
        if heads := _heads(reads):
            _prove_heads(model.eval(), heads)
    finally:
        model.train(was_training)


@contextmanager
def reading(model: Any, reads: Sequence[Read]) -> Iterator[Mapping[Read, Any]]:
    """Hold what is read in each forward while the context is open; all but the state after the final norm.

    Args:
        model: the student itself, not a wrapper of it.
        reads: see `Needs.reads`.
    """
    states: dict[Read, Any] = {}
    with ExitStack() as stack:
        for kind, layer in reads:
            if kind == "hidden" and layer != -1:
                stack.callback(_watch(model, layer, states).remove)
        heads: Any = stack.enter_context(seen_heads(model, wanted)) if (wanted := _heads(reads)) else {}
        calls: Any = _Calls(stack.enter_context(seen_calls(model, [layer for kind, layer in reads if kind == "attention"])))
        yield ChainMap(states, heads, calls)


class _Calls(Mapping[Read, Any]):
    """Calls of attention by what is read, from those by layer, which each forward fills in."""

    def __init__(self, calls: Mapping[int, Any]) -> None:
        self.calls = calls

    def __getitem__(self, read: Read) -> Any:
        return self.calls[read[1]]

    def __iter__(self) -> Iterator[Read]:
        return (("attention", layer) for layer in self.calls)

    def __len__(self) -> int:
        return len(self.calls)


def _heads(reads: Sequence[Read]) -> list[Read]:
    return [read for read in reads if read[0] in ("queries", "keys", "values")]


def complete(states: Mapping[Read, Any], reads: Sequence[Read], hidden_BTH: Tensor) -> dict[Read, Any]:
    """What was read, and the state after the final norm.

    Raises:
        ConfigError: something was not seen, or has no gradient: the model is compiled, or checkpoints its layers in a way that
            hides them.
    """
    found: dict[Read, Any] = {**states, _AFTER_NORM: hidden_BTH}
    for read in reads:
        what = f"a loss term reads the student's {read[0]} of layer {read[1]}"
        if read not in found:
            raise ConfigError(f"{what}, which this forward did not show; do not compile the model, or leave the term out")
        state = found[read]
        if isinstance(state, Tensor) and hidden_BTH.requires_grad and not state.requires_grad and _should_have(read):
            raise ConfigError(
                f"{what}, which has no gradient: turn gradient checkpointing on with "
                "gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
    return {read: found[read] for read in reads}


def _should_have(read: Read) -> bool:
    # The embeddings' output has none where they are frozen, as under LoRA; a layer after them has one.
    return read != ("hidden", 0)


def _watch(model: Any, layer: int, states: dict[Read, Any]) -> Any:
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


def _prove_heads(model: Any, heads: Sequence[Read]) -> None:
    try:
        prove_heads(model, heads, _probe_ids(model))
    except ConfigError as error:
        raise ConfigError(f"a loss term reads the student's {heads[0][0]}, which are not known: {error}") from error


@torch.no_grad()
def _prove_layers(model: Any, layers: Sequence[int], num_layers: int) -> None:
    ids_1T = _probe_ids(model)
    positions_1T = torch.arange(_PROBE_TOKENS, device=model.device)[None]
    expected = model(input_ids=ids_1T, use_cache=False, output_hidden_states=True).hidden_states
    reads: list[Read] = [("hidden", layer) for layer in layers]
    with reading(model, reads) as states, _norm_inputs(model) as inputs:
        last_1TH = hidden_states(model, ids_1T, positions_1T)
    # Before the final norm: what the module took whose output is the last state.
    before_norm = [given for given, output in inputs if output.shape == last_1TH.shape and torch.equal(output, last_1TH)]
    for layer in layers:
        right = before_norm if layer == num_layers else [] if expected is None else [expected[layer]]
        seen = states.get(("hidden", layer))
        if seen is None or not any(torch.equal(seen, one) for one in right):
            raise ConfigError(
                f"a loss term reads layer {layer} of the student, but what that layer of {type(model).__name__} gives is not "
                "what output_hidden_states gives; read layer -1, the state after the final norm"
            )


def _probe_ids(model: Any) -> Tensor:
    return torch.arange(1, 1 + _PROBE_TOKENS, device=model.device)[None] % text_config(model).vocab_size


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
