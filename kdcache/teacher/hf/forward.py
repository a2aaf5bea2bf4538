"""The forward of a model of `transformers` in pieces: its body, its output projection a chunk of positions at a time.

A model whose logits are more than a projection of its last state (soft-capped, scaled) is fed in chunks with a key-value cache
instead: its own forward must make the logits. Which of the two a model is, is measured when it is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from kdcache.errors import TeacherError
from kdcache.format.manifest import FeatureInfo
from kdcache.format.record import Distributions, TokenSequence
from kdcache.shown import first_line, get_logger
from kdcache.teacher.base import no_positions
from kdcache.teacher.features import HIDDEN, LAST, Source, with_no_vectors
from kdcache.teacher.hf.features import Seen, Vectors, joined, positions_of, seen_sources, vectors_at
from kdcache.teacher.hf.proof import Texts, asked_again, looked_at, reads_ahead
from kdcache.teacher.select.found import Found, Selected
from kdcache.teacher.select.torch_selector import Selector
from kdcache.teacher.select.uniforms import position_states

log = get_logger(__name__)

PROBE_TOKENS = 8


@dataclass(frozen=True)
class Asked:
    """What to keep of each position; `sources` are those that the features need."""

    selector: Selector
    features: Sequence[FeatureInfo]
    sources: Sequence[Source]

    def nothing(self) -> Distributions:
        """The answer to a sequence in which nothing is supervised."""
        return with_no_vectors(no_positions(self.selector.selection), self.features)


@torch.inference_mode()
def score_separable(
    model: PreTrainedModel, batch: Sequence[TokenSequence], asked: Asked, chunk: int
) -> tuple[Found | None, list[Vectors]]:
    """Select at all supervised positions of a batch: the body runs once, the head in chunks.

    Returns:
        What is found, None where nothing is supervised; and the vectors of each text.
    """
    selector = asked.selector
    longest = max(sequence.num_tokens for sequence in batch)
    ids_BT = np.zeros((len(batch), longest), np.int64)
    supervised_BT = np.zeros(ids_BT.shape, np.bool_)
    for b, sequence in enumerate(batch):
        ids_BT[b, : sequence.num_tokens] = sequence.input_ids_N
        supervised_BT[b, : sequence.num_tokens] = sequence.supervised_N
    with seen_sources(model, asked.sources, head=False) as seen:
        hidden_BTH = _hidden(model, torch.from_numpy(ids_BT).to(model.device))
    seen.states[HIDDEN, LAST] = hidden_BTH
    flat_positions_P = torch.from_numpy(np.flatnonzero(supervised_BT)).to(hidden_BTH.device)
    target_ids_P = np.concatenate([sequence.target_ids_P for sequence in batch])
    states_P = np.concatenate([_states(sequence, selector) for sequence in batch])
    hidden_PH = hidden_BTH.reshape(-1, hidden_BTH.shape[-1])
    parts = [
        _select(
            selector, _logits(model, hidden_PH[index_C]), target_ids_P[start : start + chunk], states_P[start : start + chunk]
        )
        for start, index_C in zip(range(0, len(flat_positions_P), chunk), flat_positions_P.split(chunk), strict=False)
    ]
    return _concatenate(parts), _vectors_of(seen, batch, asked.features)


def _vectors_of(seen: Seen, batch: Sequence[TokenSequence], features: Sequence[FeatureInfo]) -> list[Vectors]:
    if not features:
        return [{} for _ in batch]
    return [vectors_at(seen, features, b, positions_of(features, sequence)) for b, sequence in enumerate(batch)]


@torch.inference_mode()
def score_in_chunks(model: PreTrainedModel, sequence: TokenSequence, asked: Asked, chunk: int) -> tuple[Found | None, Vectors]:
    """Select at all supervised positions of one sequence, which is fed in chunks with a key-value cache; as above."""
    selector = asked.selector
    target_ids_P, states_P = sequence.target_ids_P, _states(sequence, selector)
    ids_1N = torch.from_numpy(sequence.input_ids_N.astype(np.int64))[None].to(model.device)
    parts: list[list[NDArray[Any]]] = []
    vectors: list[Vectors] = []
    wanted = positions_of(asked.features, sequence)
    cache: Any = None
    done = 0
    for start in range(0, sequence.num_tokens, chunk):
        here = slice(start, start + chunk)
        with seen_sources(model, asked.sources, head=True) as seen:
            output = model(input_ids=ids_1N[:, here], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        index_C = np.flatnonzero(sequence.supervised_N[here])
        if len(index_C):
            these = slice(done, done + len(index_C))
            logits_CV = output.logits[0, torch.from_numpy(index_C).to(output.logits.device)]
            parts.append(_select(selector, logits_CV, target_ids_P[these], states_P[these]))
            done = these.stop
        if asked.features:
            index_F = [positions[(positions >= start) & (positions < here.stop)] - start for positions in wanted]
            vectors.append(vectors_at(seen, asked.features, 0, index_F))
    return _concatenate(parts), joined(vectors)


@torch.inference_mode()
def read_whole(model: PreTrainedModel, texts: Sequence[NDArray[np.integer]]) -> None:
    """Run the body over texts, for what watches it; no logits are made."""
    ids_BT = np.zeros((len(texts), max(map(len, texts))), np.int64)
    for b, text in enumerate(texts):
        ids_BT[b, : len(text)] = text
    model.base_model(input_ids=torch.from_numpy(ids_BT).to(model.device), use_cache=False)


def logits_at(model: PreTrainedModel, texts: Texts) -> list[Tensor]:
    """The logits of each text at the positions of the proof, from one forward of body and head."""
    ids_BT = np.zeros((len(texts), max(map(len, texts))), np.int64)
    for b, text in enumerate(texts):
        ids_BT[b, : len(text)] = text
    hidden_BTH = _hidden(model, torch.from_numpy(ids_BT).to(model.device))
    return [_logits(model, hidden_BTH[b, torch.from_numpy(looked_at(len(text)))]) for b, text in enumerate(texts)]


def whole_logits_at(model: PreTrainedModel, text: NDArray[np.int64]) -> Tensor:
    """The logits of a text at the positions of the proof, from the model's own forward."""
    logits_NV = model(input_ids=torch.from_numpy(text)[None].to(model.device), use_cache=False).logits[0]
    return logits_NV[torch.from_numpy(looked_at(len(text)))]


def _states(sequence: TokenSequence, selector: Selector) -> NDArray[np.int64]:
    """(P,) the states of the draws at the sequence's positions; 0 if nothing is drawn."""
    if selector.seed is None:
        return np.zeros(len(sequence.positions_P), np.int64)
    return position_states(selector.seed, sequence.key, sequence.positions_P).view(np.int64)


def _select(
    selector: Selector, logits_CV: Tensor, target_ids_C: NDArray[np.int32], states_C: NDArray[np.int64]
) -> list[NDArray[Any]]:
    given = (torch.from_numpy(array).to(logits_CV.device) for array in (target_ids_C.astype(np.int64), states_C))
    return [tensor.cpu().numpy() for tensor in selector.select(logits_CV, *given)]


def _concatenate(parts: Sequence[Sequence[NDArray[Any]]]) -> Found | None:
    if not parts:
        return None
    return Found.from_padded(Selected(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True))))


def _hidden(model: PreTrainedModel, ids_BT: Tensor) -> Tensor:
    """(B, T, H): the states that the output projection takes.

    Padding is on the right, where a causal model does not see it. Without a mask, attention may take its causal fast path.
    """
    return model.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state


def _logits(model: PreTrainedModel, hidden_CH: Tensor) -> Tensor:
    head = model.get_output_embeddings()
    if head is None:
        raise AttributeError("the model has no output projection")
    return head(hidden_CH)


@torch.inference_mode()
def probe_forward(model: PreTrainedModel, name: str) -> tuple[bool, int]:
    """Whether the logits are `get_output_embeddings()` of the body's last state, bit for bit; and their width.

    Raises:
        TeacherError: the model does not run, or neither way of making logits in chunks gives what its forward gives.
    """
    ids_1T = (torch.arange(PROBE_TOKENS, device=model.device) + 1)[None] % model.config.get_text_config().vocab_size
    try:
        whole_TV = model(input_ids=ids_1T, use_cache=False).logits[0]
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        raise TeacherError(f"the model {name!r} does not run: {first_line(error)}") from error
    try:
        parts_TV = _logits(model, _hidden(model, ids_1T))[0]
        if torch.equal(whole_TV, parts_TV):
            return True, whole_TV.shape[-1]
    except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError) as error:
        log.debug("%s: body and head cannot be run apart: %s", name, error)
    half = PROBE_TOKENS // 2
    first = model(input_ids=ids_1T[:, :half], use_cache=True)
    if getattr(first, "past_key_values", None) is None:
        raise TeacherError(
            f"the model {name!r} makes its logits in its own way and keeps no key-value cache to read a text in chunks; "
            "use teacher.backend vllm, or teacher.dtype float32 if it is not"
        )
    second = model(input_ids=ids_1T[:, half:], past_key_values=first.past_key_values, use_cache=True)
    # Two steps sum in another order than one; a model that ignores the cache is off by far more.
    if not torch.allclose(torch.cat([first.logits[0], second.logits[0]]).float(), whole_TV.float(), rtol=0.05, atol=0.05):
        raise TeacherError(_why_not_in_chunks(model, ids_1T, whole_TV, name))
    log.info("%s: logits are more than a projection of the last state; scoring one sequence at a time", name)
    return False, whole_TV.shape[-1]


def _why_not_in_chunks(model: PreTrainedModel, ids_1T: Tensor, whole_TV: Tensor, name: str) -> str:
    again_TV = model(input_ids=ids_1T, use_cache=False).logits[0]
    if not torch.allclose(again_TV.float(), whole_TV.float(), rtol=0.05, atol=0.05):
        return asked_again(name)
    ids_1T = torch.cat([ids_1T[:, :-1], ids_1T[:, :1]], dim=1)
    changed_TV = model(input_ids=ids_1T, use_cache=False).logits[0, :-1]
    if not torch.allclose(changed_TV.float(), whole_TV[:-1].float(), rtol=0.05, atol=0.05):
        return reads_ahead(name)
    return (
        f"the model {name!r} gives its logits neither as a projection of its last state nor step by step; "
        "use teacher.backend vllm"
    )
