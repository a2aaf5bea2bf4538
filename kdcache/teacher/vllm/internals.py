"""What kdcache knows of vLLM's internals: all there is to look at when a new release moves something, with `signatures.py`, and
`layers.py` for states inside the model.

Each of vLLM's two model runners has one method that sees a step's hidden states of the last
pipeline stage, right after they are computed, in every step and on every tensor-parallel rank: the
one that computes prompt logprobs. We wrap it; what it does for other requests stays. Nothing here
imports vLLM at the top: it is handed the worker.

- V1, `v1/worker/gpu_model_runner.py`: `GPUModelRunner._get_prompt_logprobs_dict(hidden_states, num_scheduled_tokens)`.
- V2, `v1/worker/gpu/`: `PromptLogprobsWorker.compute_prompt_logprobs(logits_fn, hidden_states, input_batch, ...)`, and
  `add_request`, which is how it learns of a request's sampling parameters.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from kdcache.teacher.vllm.signatures import HOOKS_V1, HOOKS_V2, RUNNER_V1, fault_of_hook


class Span(NamedTuple):
    """Positions of one request in one step.

    Attributes:
        extra_args: of the request's sampling parameters.
        start: index of the first one among the tokens of the step.
        position: the first position.
        length: how many positions; all lie in the prompt.
    """

    extra_args: Mapping[str, Any]
    start: int
    position: int
    length: int


OnStep = Callable[[Any, Callable[[], Iterator[Span]]], None]
"""Called once per step with its hidden states (tokens, H) and a function that gives its spans. Must not raise."""


def install(worker: Any, on_step: OnStep) -> str | None:
    """Call `on_step` in every step from now on; or change nothing and say what in this vLLM is not as expected."""
    runner = worker.model_runner
    if problem := projection_problem(runner.model):
        return problem
    if hasattr(runner, "prompt_logprobs_worker"):
        return _install_v2(runner, on_step)
    return _install_v1(runner, on_step)


def is_last_stage(worker: Any) -> bool:
    """Whether this worker's pipeline stage is the one with the output projection."""
    from vllm.distributed import get_pp_group

    del worker
    return bool(get_pp_group().is_last_rank)


def is_first_of_its_stage(worker: Any) -> bool:
    """Whether this worker is the one of its tensor-parallel group that is sure to have the logits; its answer counts."""
    from vllm.distributed import get_tensor_model_parallel_rank

    del worker
    return get_tensor_model_parallel_rank() == 0


def projection(worker: Any) -> Callable[[Any], Any]:
    """A function of hidden states (C, H) that gives logits (C, V), gathered over ranks, scaled and soft-capped as in the model.

    Every rank must call it equally often. It gives None on ranks to which the platform does not gather.
    """
    model = worker.model_runner.model
    wrappers = _lora_wrappers(model)

    def project(hidden_CH: Any) -> Any:
        with _without_adapters(wrappers):
            return model.compute_logits(hidden_CH)

    return project


def num_ranks(worker: Any) -> int:
    """How many workers take part in one projection and wait for one another in it."""
    from vllm.distributed import get_tensor_model_parallel_world_size

    del worker
    return int(get_tensor_model_parallel_world_size())


def hidden_layout(worker: Any) -> tuple[int, Any, Any]:
    """Size, dtype and device of the hidden states that the projection takes."""
    return worker.model_config.get_hidden_size(), worker.model_config.dtype, worker.device


def project_alone(worker: Any, hidden_CH: Any) -> Any:
    """Project on this rank alone: takes the memory of a projection while no rank waits for another; the logits mean nothing.

    Raises whatever the projection would.
    """
    several = num_ranks(worker)
    processors = [module for module in worker.model_runner.model.modules() if hasattr(module, "_gather_logits")]

    def gathered(logits_CV: Any) -> Any:
        return logits_CV.new_zeros((len(logits_CV), several * logits_CV.shape[1]))

    try:
        for processor in processors:
            processor._gather_logits = gathered
        return projection(worker)(hidden_CH)
    finally:
        for processor in processors:
            del processor._gather_logits


def projection_problem(model: Any) -> str | None:
    """What `projection` relies on and the model lacks, if anything."""
    compute = getattr(model, "compute_logits", None)
    parameters = [] if compute is None else list(inspect.signature(compute).parameters.values())
    if not parameters or any(parameter.default is parameter.empty for parameter in parameters[1:]):
        return f"{type(model).__name__} has no compute_logits(hidden_states)"
    for wrapper in _lora_wrappers(model):
        ours, theirs = (getattr(part, "_get_logits", None) for part in (getattr(wrapper, "base_layer", None), wrapper))
        if ours is None or theirs is None:
            return "LogitsProcessorWithLoRA or its base_layer has no _get_logits"
        if unknown := set(inspect.signature(theirs).parameters) - set(inspect.signature(ours).parameters):
            return f"LogitsProcessorWithLoRA._get_logits takes {', '.join(sorted(unknown))}, which its base_layer's does not"
    return None


def _lora_wrappers(model: Any) -> list[Any]:
    return [module for module in model.modules() if type(module).__name__ == "LogitsProcessorWithLoRA"]


@contextmanager
def _without_adapters(wrappers: list[Any]) -> Iterator[None]:
    """Project with the base model: with LoRA on, vLLM would apply to our positions the adapters of those that it samples from.

    Adapters of the body have acted by now; those of the output projection are refused.
    """
    for wrapper in wrappers:
        wrapper._get_logits = wrapper.base_layer._get_logits
    try:
        yield
    finally:
        for wrapper in wrappers:
            del wrapper._get_logits


def misfits(worker: Any) -> list[str]:
    """Modules that a loaded adapter has weights for, and that the worker's part of the model lacks or has in another size.

    vLLM ignores such weights, or uses a corner of them. Modules of experts are not checked: names
    and sizes change when they are stacked.
    """
    manager = worker.model_runner.lora_manager._adapter_manager
    loaded = {name: weights for adapter in manager.list_adapters().values() for name, weights in adapter.loras.items()}
    return sorted(
        name
        for name, weights in loaded.items()
        if ".experts" not in name and not (name in manager.modules and _fits(manager.modules[name], weights))
    )


def _fits(module: Any, weights: Any) -> bool:
    from vllm.distributed import get_tensor_model_parallel_world_size

    if get_tensor_model_parallel_world_size() > 1:
        return True  # a rank has its share of the rows or columns
    several = isinstance(weights.lora_a, list)  # in one module, like queries, keys and values
    pairs = zip(weights.lora_a, weights.lora_b, strict=True) if several else [(weights.lora_a, weights.lora_b)]
    room = zip(module.lora_a_stacked, module.lora_b_stacked, strict=True)
    return all(
        a is None or (a.shape[-1] == room_a.shape[-1] and b.shape[0] == room_b.shape[-2])
        for (a, b), (room_a, room_b) in zip(pairs, room, strict=False)
    )


def give_tokenizer(llm_engine: Any, tokenizer: Any) -> bool:
    """Give this tokenizer of `transformers` to an `LLMEngine` that was started without one, for requests that ask for text.

    Gives whether the engine is as expected; otherwise nothing is changed.
    """
    processor: Any = getattr(llm_engine, "output_processor", None)
    if not hasattr(processor, "tokenizer"):
        return False
    processor.tokenizer = tokenizer
    return True


def _install_v1(runner: Any, on_step: OnStep) -> str | None:
    problem = next(filter(None, (fault_of_hook(runner, *hook) for hook in HOOKS_V1.items())), None)
    missing = [name for name in RUNNER_V1 if not hasattr(runner, name)]
    if problem or missing:
        return problem or f"{type(runner).__name__} has no {', '.join(missing)}"
    (name,) = HOOKS_V1
    original = getattr(runner, name)

    def spans(num_scheduled_tokens: Mapping[str, int]) -> Iterator[Span]:
        for req_id, num_tokens in num_scheduled_tokens.items():
            state = runner.requests[req_id]
            extra_args = state.sampling_params and state.sampling_params.extra_args
            # Still the count before this step.
            position = int(state.num_computed_tokens)
            length = min(num_tokens, state.num_prompt_tokens - position)
            if extra_args and length > 0:
                start = int(runner.query_start_loc.np[runner.input_batch.req_id_to_index[req_id]])
                yield Span(extra_args, start, position, length)

    def hook(hidden_states: Any, num_scheduled_tokens: Mapping[str, int]) -> Any:
        on_step(hidden_states, lambda: spans(num_scheduled_tokens))
        return original(hidden_states, num_scheduled_tokens)

    setattr(runner, name, hook)
    return None


def _install_v2(runner: Any, on_step: OnStep) -> str | None:
    target = runner.prompt_logprobs_worker
    if problem := next(filter(None, (fault_of_hook(target, *hook) for hook in HOOKS_V2.items())), None):
        return problem
    originals = {name: getattr(target, name) for name in HOOKS_V2}
    arguments: dict[str, Mapping[str, Any]] = {}

    def add_request(req_id: str, req_idx: int, sampling_params: Any) -> None:
        if sampling_params.extra_args:
            arguments[req_id] = sampling_params.extra_args
        originals["add_request"](req_id, req_idx, sampling_params)

    def remove_request(req_id: str) -> None:
        arguments.pop(req_id, None)
        originals["remove_request"](req_id)

    def spans(batch: Any, prompt_lens: Any) -> Iterator[Span]:
        for index, req_id in enumerate(batch.req_ids):
            position = int(batch.num_computed_prefill_tokens_np[index])
            length = min(int(batch.num_scheduled_tokens[index]), int(prompt_lens[batch.idx_mapping_np[index]]) - position)
            if req_id in arguments and length > 0:
                yield Span(arguments[req_id], int(batch.query_start_loc_np[index]), position, length)

    # The parameters have vLLM's names: a release may pass them by name.
    def compute_prompt_logprobs(
        logits_fn: Any, hidden_states: Any, input_batch: Any, all_token_ids: Any, num_computed_tokens: Any, prompt_lens: Any
    ) -> Any:
        on_step(hidden_states, lambda: spans(input_batch, prompt_lens))
        original = originals["compute_prompt_logprobs"]
        return original(logits_fn, hidden_states, input_batch, all_token_ids, num_computed_tokens, prompt_lens)

    target.add_request, target.remove_request = add_request, remove_request
    target.compute_prompt_logprobs = compute_prompt_logprobs
    return None
