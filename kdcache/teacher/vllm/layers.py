"""Inner states of a model in vLLM's worker: what its decoder layers, or the attention inside them, see in a step.

There are two ways to them:

- Hooks on the decoder layers of a model that runs in eager mode. A layer gives a tensor, or a pair whose sum the next layer
  normalises; the first one takes the embeddings as `hidden_states`.
- `aux_hidden_state_layers` of vLLM's own models, which hand the residual streams of chosen layers out of their forward,
  compiled or not. They must be chosen before the model is compiled: `layered_worker.py` does that. Queries, keys and values are
  not among them.

Nothing here imports vLLM at the top: it is handed the worker.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from kdcache.teacher.features import Source, find_decoder

LAYERS = "kdcache_layers"
"""The key of the engine's `additional_config` that holds the layers to hand out. vLLM's compile cache depends on it."""

_NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f", "norm_f")
"""What models call the norm after their last layer."""


class SeenLayers:
    """What was seen inside the model in the current step.

    Attributes:
        wanted: the sources whose states are held. With none, the hooks cost nothing.
        states: source -> (tokens of the step or more, width). Copies, since the next layer overwrites a layer's own memory.
        wants_normed: whether to hold the last layer's state after the final norm, too.
        normed: the state after the final norm.
        handed: layers whose states a compiled model hands out, ascending; empty for one in eager mode.
        directly: whether a compiled model is to run its layers one by one, so that the hooks see them, for the proof.
    """

    def __init__(self, handed: Sequence[int] = (), compiled: Sequence[Any] = ()) -> None:
        self.wanted: frozenset[Source] = frozenset()
        self.states: dict[Source, Any] = {}
        self.wants_normed = False
        self.normed: Any = None
        self.handed = tuple(handed)
        self.directly = False
        self._compiled = compiled
        self._layer = 0

    @property
    def hooks_see(self) -> bool:
        """Whether the hooks are what sees the states."""
        return self.directly or not self.handed

    def run_directly(self, directly: bool) -> None:
        """Have a compiled model run its layers one by one from now on, or no longer."""
        self.directly = directly
        for module in self._compiled:
            module.do_not_compile = directly

    def enter(self, layer: int) -> None:
        """Note that this layer begins: modules that layers share are told apart by it. The first one begins a step."""
        self._layer = layer
        if layer == 1 and self.wanted:
            self.states = {}

    def offer(self, kind: str, state: Any, *, layer: int | None = None, again: bool = True) -> None:
        """Hold a copy of a state, if it is wanted; with again=False only where none of this step is held yet."""
        source = (kind, self._layer if layer is None else layer)
        if source in self.wanted and (again or source not in self.states):
            self.states[source] = state.clone()


def watch_layers(worker: Any) -> SeenLayers | str:
    """Watch the states inside the model from now on; or change nothing and give the reason."""
    from vllm.distributed import get_pp_group

    if get_pp_group().world_size > 1:
        return (
            "the layer may be on another pipeline stage than the output projection; with pipeline stages only layer -1 is seen"
        )
    handed = getattr(worker, LAYERS, ())
    if isinstance(handed, str):
        return f"{handed}; set teacher.engine_options.enforce_eager to true, which is slower, or keep layer -1 only"
    if not handed and not worker.model_config.enforce_eager:
        return (
            "a compiled model, or one in CUDA graphs, does not show its layers; set teacher.engine_options.enforce_eager to "
            "true, which is slower, or keep layer -1 only"
        )
    model = worker.model_runner.model
    parent, layers = find_decoder(model, worker.model_config.get_total_num_hidden_layers()) or (None, ())
    norm = final_norm(parent)
    if norm is None or "hidden_states" not in inspect.signature(layers[0].forward).parameters:
        return f"the layers of {type(model).__name__} are not where kdcache looks for them; keep layer -1 only"
    seen = SeenLayers(handed, [module for module in model.modules() if getattr(module, "do_not_compile", None) is False])
    _hook_layers(seen, layers, norm)
    _hook_attention(seen, layers)
    if handed:
        _take_handed(seen, worker.model_runner, norm)
    return seen


def final_norm(parent: Any) -> Any:
    """The norm after the layers of the module that holds them; None if it is not found."""
    return next((getattr(parent, name) for name in _NORMS if hasattr(parent, name)), None)


def hand_out(worker: Any, layers: Sequence[int]) -> tuple[int, ...] | str:
    """Have a loaded model hand out the states of these layers, before it is compiled; or change nothing and give the reason.

    Returns:
        The layers in the order in which the model hands them out.
    """
    runner = worker.model_runner
    model = runner.model
    if not hasattr(runner, "use_aux_hidden_state_outputs") or not hasattr(model, "set_aux_hidden_state_layers"):
        return f"{type(model).__name__} of this vLLM hands out no inner states when it is compiled"
    if runner.use_aux_hidden_state_outputs:
        return "speculative decoding takes the inner states for itself"
    try:
        model.set_aux_hidden_state_layers(tuple(sorted(set(layers))))
    except Exception as error:  # an assertion, where a model claims more than its parts do
        return f"{type(model).__name__} hands out no inner states: {error}"
    runner.use_aux_hidden_state_outputs = True
    return tuple(sorted(set(layers)))


def _take_handed(seen: SeenLayers, runner: Any, norm: Any) -> None:
    """Read what the model hands out between the two halves of each step: both model runners keep it for the second half."""
    original = runner.sample_tokens

    def sample_tokens(*args: Any, **kwargs: Any) -> Any:
        state = runner.execute_model_state
        handed = None if state is None else state.aux_hidden_states
        if handed is not None and not seen.hooks_see and (seen.wanted or seen.wants_normed):
            states = dict(zip(seen.handed, handed, strict=True))
            seen.states = {("hidden", layer): states[layer] for kind, layer in seen.wanted if kind == "hidden"}
            if seen.wants_normed:
                seen.normed = _only(norm(states[seen.handed[-1]].clone()))
        return original(*args, **kwargs)

    runner.sample_tokens = sample_tokens


def _hook_layers(seen: SeenLayers, layers: Any, norm: Any) -> None:
    signature = inspect.signature(layers[0].forward)

    def enter(layer: int) -> Callable[..., None]:
        return lambda _module, _args: seen.enter(layer)

    def before(_module: Any, args: Any, kwargs: Any) -> None:
        seen.offer("hidden", signature.bind(*args, **kwargs).arguments["hidden_states"], layer=0)

    def after(layer: int, output: Any) -> None:
        pair = output if isinstance(output, tuple) and len(output) == 2 and output[1] is not None else None
        if ("hidden", layer) in seen.wanted:
            seen.states["hidden", layer] = pair[0] + pair[1] if pair else _only(output).clone()
        if layer == len(layers) and seen.wants_normed and seen.hooks_see:
            seen.normed = _only(norm(pair[0].clone(), pair[1].clone()) if pair else norm(_only(output).clone()))

    def hook_of(layer: int) -> Callable[..., None]:
        return lambda _module, _args, output: after(layer, output)

    for layer, module in enumerate(layers, start=1):
        module.register_forward_pre_hook(enter(layer))
        module.register_forward_hook(hook_of(layer))
    layers[0].register_forward_pre_hook(before, with_kwargs=True)


def _hook_attention(seen: SeenLayers, layers: Any) -> None:
    """Watch queries and keys before the rotary embedding, and values as the attention takes them.

    Layers may share one rotary module, and a layer may have none. vLLM rotates in place.
    """
    rotated: set[int] = set()

    def before_rotary(_module: Any, args: Any, kwargs: Any) -> None:
        given = [*args, *kwargs.values()]
        if len(given) >= 3 and seen.wanted:
            seen.offer("queries", given[1])
            seen.offer("keys", given[2])

    def before_attention(_module: Any, args: Any, kwargs: Any) -> None:
        given = [*args, *kwargs.values()]
        if len(given) >= 3 and seen.wanted:
            for kind, state in zip(("queries", "keys", "values"), given, strict=False):
                seen.offer(kind, state, again=kind == "values")

    for module in layers:
        for part in module.modules():
            if type(part).__name__ == "Attention":
                part.register_forward_pre_hook(before_attention, with_kwargs=True)
            elif "RotaryEmbedding" in type(part).__name__ and id(part) not in rotated:
                rotated.add(id(part))
                part.register_forward_pre_hook(before_rotary, with_kwargs=True)


def _only(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output
