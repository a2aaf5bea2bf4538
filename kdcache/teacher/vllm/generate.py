"""Answers by vLLM's offline engine: one request per answer, with a seed of its own, all in the engine's queue at once.

On a CPU they come in groups. When a prompt has been read in part, the engine takes back the draw that it made too early, which
the random generators of a CPU cannot do: vLLM 0.32 ends with "CPU Generator does not use offset". So there prompts are read
whole: the prompts of a group fit into one step, and with their answers into the cache, so that none is dropped and read again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import vllm

from kdcache.errors import ConfigError, TeacherError
from kdcache.shown import get_logger
from kdcache.teacher.generation import Ending, Generated, Observe, Prompt
from kdcache.teacher.tokenizer import Tokenizer
from kdcache.teacher.vllm import engine, internals
from kdcache.teacher.vllm.options import CPU_MAX_SEQUENCES

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput, SamplingParams
    from vllm.lora.request import LoRARequest

    from kdcache.config.capture import GenerateConfig

log = get_logger(__name__)


@dataclass(frozen=True)
class Writer:
    """An idle engine, and the adapter that its answers come from; None for the plain model."""

    llm: LLM
    adapter: LoRARequest | None


def write_answers(
    writer: Writer, prompts: Sequence[Prompt], ending: Ending, tokenizer: Tokenizer, observe: Observe
) -> Iterator[Generated]:
    """The answers, in order, once the engine has finished the last of them (on a CPU: the last of a group).

    If the engine cannot take the tokenizer, answers run to their full length and are searched for stop strings then: the same
    answers, later.

    Args:
        writer: who answers.
        prompts: already checked.
        ending: where answers end, and how tokens are drawn. The engine itself knows the checkpoint's own end tokens.
        tokenizer: of the prompts.
        observe: told of each step, and of the tokens of each complete answer.

    Raises:
        TeacherError: the engine gave up an answer.
    """
    sees_text = bool(ending.config.stop) and give_tokenizer(writer.llm, tokenizer)
    if ending.config.stop and not sees_text:
        log.warning("vLLM cannot look for generate.stop itself here; answers run to generate.max_tokens and are cut afterwards")
    for group in _groups(writer.llm, prompts, ending.config):
        requests: list[Any] = [{"prompt_token_ids": prompt.sequence.input_ids_N.tolist()} for prompt in group]
        params = [sampling_params(prompt, ending, sees_text=sees_text) for prompt in group]
        outputs = _run(writer, requests, params, observe)
        if len(outputs) != len(group):
            raise TeacherError(f"vLLM {vllm.__version__} gave {len(outputs)} answers to {len(group)} prompts")
        yield from [_read(output, prompt, ending) for output, prompt in zip(outputs, group, strict=True)]


def check_read_whole(llm: LLM, prompts: Sequence[Prompt], config: GenerateConfig) -> None:
    """Raise ConfigError if a prompt would be read in parts where draws cannot be taken back; see the module's docstring."""
    limit = _tokens_per_step(llm, config)
    longest = max((prompt.sequence.num_tokens for prompt in prompts), default=0)
    if limit is not None and longest > limit:
        raise ConfigError(
            f"a prompt has {longest} tokens, and vLLM {vllm.__version__} reads {limit} at once: on a CPU it cannot draw from a "
            f"seed after it has read a prompt in parts; set teacher.tokens_per_forward to {longest} or more (and "
            "teacher.vllm.route to worker), or teacher.backend to transformers"
        )


def groups_read_whole(prompts: Sequence[Prompt], max_tokens: int, tokens_per_step: int) -> Iterator[Sequence[Prompt]]:
    """Cut prompts into runs that fit into one step, and with their answers into twice as many tokens of cache."""
    start = read = kept = 0
    for index, prompt in enumerate(prompts):
        num_tokens = prompt.sequence.num_tokens
        # One more per request: those that write count in the step too.
        read, kept = read + num_tokens + 1, kept + num_tokens + max_tokens
        if index > start and (read > tokens_per_step or kept > 2 * tokens_per_step or index - start >= CPU_MAX_SEQUENCES):
            yield prompts[start:index]
            start, read, kept = index, num_tokens + 1, num_tokens + max_tokens
    if start < len(prompts):
        yield prompts[start:]


def _groups(llm: LLM, prompts: Sequence[Prompt], config: GenerateConfig) -> Iterator[Sequence[Prompt]]:
    limit = _tokens_per_step(llm, config)
    return iter([prompts]) if limit is None else groups_read_whole(prompts, config.max_tokens, limit)


def _tokens_per_step(llm: LLM, config: GenerateConfig) -> int | None:
    """How many tokens of a prompt the engine reads at once; None where that does not matter."""
    if config.temperature == 0 or not engine.runs_on_cpu():
        return None
    scheduler = llm.llm_engine.vllm_config.scheduler_config
    return min(filter(None, (scheduler.max_num_batched_tokens, scheduler.long_prefill_token_threshold)))


def sampling_params(prompt: Prompt, ending: Ending, *, sees_text: bool) -> SamplingParams:
    """The parameters of one request; `sees_text`: whether the engine has text, and so can look for stop strings."""
    config = ending.config
    return vllm.SamplingParams(
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        min_p=config.min_p,
        seed=prompt.seed,
        max_tokens=config.max_tokens,
        stop=list(config.stop) if sees_text else None,
        stop_token_ids=sorted(ending.end_ids),
        ignore_eos=config.ignore_eos,
        detokenize=sees_text,
        # A stop string may hold a special token, and its text belongs to the answer.
        skip_special_tokens=False,
        include_stop_str_in_output=True,
    )


def give_tokenizer(llm: LLM, tokenizer: Tokenizer) -> bool:
    """Let an engine that was started without a tokenizer turn its tokens into text. Gives whether it can."""
    return tokenizer.underlying is not None and internals.give_tokenizer(llm.llm_engine, tokenizer.underlying)


def _run(writer: Writer, requests: list[Any], params: list[SamplingParams], observe: Observe) -> list[RequestOutput]:
    """Run step by step, so that a watchdog sees progress: one answer may take minutes, and so may all of them."""
    outputs: list[Any] = []
    llm = writer.llm
    llm.enqueue(requests, params, lora_request=writer.adapter, use_tqdm=False)
    while llm.llm_engine.has_unfinished_requests():
        finished: list[Any] = [output for output in llm.llm_engine.step() if output.finished]
        outputs += finished
        observe(sum(len(output.outputs[0].token_ids) for output in finished))
    return sorted(outputs, key=lambda output: int(output.request_id))


def _read(output: RequestOutput, prompt: Prompt, ending: Ending) -> Generated:
    answer = output.outputs[0]
    token_ids, finish = list(answer.token_ids), answer.finish_reason
    if finish not in ("stop", "length") or not token_ids:
        raise TeacherError(f"{prompt.sequence.source}: vLLM ended the answer after {len(token_ids)} tokens with {finish!r}")
    cut = ending.cut(token_ids) if ending.config.stop else None
    # The engine knows end tokens of the checkpoint that we do not: unless our cut is shorter, its finish counts.
    if cut is not None and len(cut.token_ids_N) < len(token_ids):
        return cut
    return Generated(np.array(token_ids, np.int32), "stop" if cut is not None and cut.finish == "stop" else finish)
