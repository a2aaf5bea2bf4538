"""Answers by `transformers`: batches of prompts of similar length, padded on the left, one token per step with a cache.

The library's own `generate` is not used: it draws a batch's tokens from one generator, so that an answer would depend on its
neighbours, and takes sampling settings from the checkpoint, such as a repetition penalty, that nobody asked for here.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kdcache.errors import TeacherError
from kdcache.teacher.batches import batches_by_length
from kdcache.teacher.generation import Ending, Generated, Observe, Prompt
from kdcache.teacher.hf.proof import Sharing, Texts, longest_text, prove_sharing
from kdcache.teacher.hf.rotary import TextRotary
from kdcache.teacher.select.torch_answers import draw_tokens

CACHED_BATCHES = 4
"""A decoding step takes one token of each prompt, so the cache limits how many are answered at once."""


def own_end_ids(model: PreTrainedModel) -> int | list[int] | None:
    """The ids that end an answer by the checkpoint's own config; a chat model may have several."""
    generation = getattr(model, "generation_config", None)
    end = None if generation is None else generation.eos_token_id
    return getattr(model.config.get_text_config(), "eos_token_id", None) if end is None else end


def write_answers(
    model: PreTrainedModel,
    rotary: TextRotary,
    prompts: Sequence[Prompt],
    ending: Ending,
    tokens_per_forward: int,
    observe: Observe,
) -> Iterator[Generated]:
    """Answer the prompts, in order; all answers come at the end.

    Args:
        model: one with a key-value cache.
        rotary: the model's.
        prompts: already checked.
        ending: where answers end, and how tokens are drawn.
        tokens_per_forward: the most tokens of prompts that are read at once. Keys and values of up to CACHED_BATCHES times as
            many tokens, of prompts and answers, exist at once.
        observe: told of each step.

    Raises:
        TeacherError: the model keeps no cache, gives NaN, runs out of memory, or answers differently when asked again.
    """
    answers: dict[int, Generated] = {}
    sharing = _sharing(model) if len(prompts) > 1 else "any"
    for batch in batches_to_write(
        [p.sequence.num_tokens for p in prompts], ending.config.max_tokens, tokens_per_forward, sharing
    ):
        try:
            members = [prompts[index] for index in batch]
            answers |= zip(batch, _write_batch(model, rotary, members, ending, observe), strict=True)
        except torch.OutOfMemoryError as error:
            raise TeacherError(
                f"the teacher ran out of memory while writing; make teacher.tokens_per_forward ({tokens_per_forward}) smaller"
            ) from error
    yield from (answers[index] for index in range(len(prompts)))


def batches_to_write(lengths: Sequence[int], max_tokens: int, tokens_per_forward: int, sharing: Sharing) -> Iterator[list[int]]:
    """The prompts of each batch, by index; of one length each, if only equal lengths may share a forward."""
    kinds = sorted(set(lengths), reverse=True) if sharing == "equal" else [None]
    for kind in kinds:
        indices = [index for index, length in enumerate(lengths) if kind in (None, length)]
        weights = [_weight(lengths[index], max_tokens) for index in indices]
        for batch in batches_by_length(weights, tokens_per_forward, "alone" if sharing == "alone" else "any"):
            yield [indices[rank] for rank in batch]


def _sharing(model: PreTrainedModel) -> Sharing:
    """Find out which prompts may share a forward, by comparing a few alone and together, padded on the left."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31

    def logits_of(texts: Texts) -> list[Tensor]:
        ids_BT, mask_BT = _padded_on_the_left(texts, model.device)
        return list(_step(model, ids_BT, mask_BT, None)[0][:, None])

    return prove_sharing(
        logits_of, model, longest=longest_text(model, context=context, most=1024), name=str(model.name_or_path), what="answers"
    )


def _weight(num_prompt_tokens: int, max_tokens: int) -> int:
    """How much of a batch a prompt takes, in tokens: its own, or its share of the cache if that is scarcer."""
    return max(num_prompt_tokens, -(-(num_prompt_tokens + max_tokens) // CACHED_BATCHES))


@torch.inference_mode()
def _write_batch(
    model: PreTrainedModel, rotary: TextRotary, prompts: Sequence[Prompt], ending: Ending, observe: Observe
) -> list[Generated]:
    texts = [prompt.sequence.input_ids_N.astype("int64") for prompt in prompts]
    ids_BT, mask_BT = _padded_on_the_left(texts, model.device)
    whole_BT = ids_BT
    generators = [torch.Generator().manual_seed(prompt.seed) for prompt in prompts]
    answers: list[list[int]] = [[] for _ in prompts]
    unfinished = set(range(len(prompts)))
    cache: Any = None
    while unfinished:
        logits_BV, cache = _step(model, ids_BT, mask_BT, cache)
        uniform_B = torch.stack([torch.rand((), dtype=torch.float64, generator=generator) for generator in generators])
        drawn_B = draw_tokens(logits_BV, ending.config, uniform_B.to(logits_BV.device))
        for b, token_id in enumerate(drawn_B.tolist()):
            if b in unfinished:
                answers[b].append(token_id)
        observe(len(unfinished))
        unfinished = {b for b in unfinished if not ending.finish(answers[b])}
        # An answer that has ended keeps drawing, unseen, until the last of its batch has ended.
        ids_BT = drawn_B[:, None]
        mask_BT = torch.cat([mask_BT, torch.ones_like(ids_BT)], dim=1)
        whole_BT = torch.cat([whole_BT, ids_BT], dim=1)
        if rotary.depends_on_length and any(map(rotary.changes_at, mask_BT.sum(dim=1).tolist())):
            # The cached keys were rotated with factors that a text of the new length does not have.
            ids_BT, cache = whole_BT, None
    return [ending.cut(answer) for answer in answers]


def _step(model: PreTrainedModel, ids_BT: Tensor, mask_BT: Tensor, cache: Any) -> tuple[Tensor, Any]:
    """(B, V): the logits after the last token; and the cache, which now holds all tokens."""
    known = inspect.signature(model.forward).parameters
    arguments: dict[str, Any] = {"input_ids": ids_BT, "attention_mask": mask_BT, "past_key_values": cache, "use_cache": True}
    if "position_ids" in known:
        arguments["position_ids"] = (mask_BT.cumsum(dim=-1) - 1).clamp(min=0)[:, -ids_BT.shape[1] :]
    if "logits_to_keep" in known:
        arguments["logits_to_keep"] = 1
    output = model(**arguments)
    if getattr(output, "past_key_values", None) is None:
        raise TeacherError(f"{type(model).__name__} keeps no key-value cache to write with; use teacher.backend vllm")
    return output.logits[:, -1], output.past_key_values


def _padded_on_the_left(texts: Texts, device: torch.device) -> tuple[Tensor, Tensor]:
    """(B, T) int64 ids and (B, T) int64 mask, 1 where there is a token."""
    longest = max(map(len, texts))
    ids_BT = torch.zeros((len(texts), longest), dtype=torch.int64)
    mask_BT = torch.zeros_like(ids_BT)
    for b, text in enumerate(texts):
        start = longest - len(text)
        ids_BT[b, start:] = torch.from_numpy(text)
        mask_BT[b, start:] = 1
    return ids_BT.to(device), mask_BT.to(device)
