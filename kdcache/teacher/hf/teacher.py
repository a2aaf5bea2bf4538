"""The `transformers` teacher: batched by length, logits a chunk at a time.

The model's body runs over a batch of similar lengths; the output projection and the selection run over `chunk_positions`
supervised positions at a time, so [tokens, vocab] never exists.

Shape letters: B sequences of a batch, T their longest, P supervised positions of the batch, C positions of a chunk, H hidden,
V vocabulary.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from kdcache.config.capture import GenerateConfig, TeacherConfig
from kdcache.errors import TeacherError
from kdcache.format.manifest import FeatureInfo, SelectionInfo, TeacherIdentity
from kdcache.format.record import Distributions, TokenSequence
from kdcache.shown import get_logger
from kdcache.teacher.base import check_selectable, check_sequences, first_line, no_positions
from kdcache.teacher.batches import batches_by_length, groups_of_tokens
from kdcache.teacher.checkpoint import check_model_name, resolved_revision, short_name, weights_digest
from kdcache.teacher.engine_identity import transformers_options
from kdcache.teacher.features import HiddenShape, bytes_per_position, check_askable, features_from, with_no_rows
from kdcache.teacher.generation import Ending, Generated, Observe, Prompt, check_prompts, end_tokens
from kdcache.teacher.hf.features import LayerRows, hidden_shape, joined, needed_layers, rows_of, seen_layers
from kdcache.teacher.hf.generate import own_end_ids, write_answers
from kdcache.teacher.hf.load import load_checked
from kdcache.teacher.hf.proof import (
    Sharing,
    Texts,
    asked_again,
    longest_text,
    looked_at,
    prove_sharing,
    reads_ahead,
    untouched_generators,
)
from kdcache.teacher.hf.rotary import TextRotary, mend_rotary
from kdcache.teacher.select.found import Found, Selected, record_of
from kdcache.teacher.select.torch_selector import Selector
from kdcache.teacher.select.uniforms import position_states
from kdcache.teacher.tokenizer import Tokenizer

log = get_logger(__name__)

BATCHES_PER_GROUP = 8
"""Sequences are sorted by length within groups of about this many batches: the answers of one group wait in memory."""

FEATURE_BYTES_PER_GROUP = 256 * 2**20
"""Groups are smaller where their features would take more than this, down to one batch."""

NO_LIMIT = 2**31 - 1
"""context_length of a model that states none."""

PROBE_TOKENS = 8


@dataclass(frozen=True)
class _Asked:
    """What is to be kept of each position; `layers` are those of the features."""

    selector: Selector
    features: Sequence[FeatureInfo]
    layers: Sequence[int]

    def nothing(self) -> Distributions:
        """The answer to a sequence in which nothing is supervised."""
        return with_no_rows(no_positions(self.selector.selection), self.features)


class HfTeacher:
    """A causal language model of `transformers`; see the module's docstring."""

    def __init__(self, config: TeacherConfig) -> None:
        """Load the model.

        Raises:
            ConfigError: a setting that only vLLM has, or an attention that leaves out what the model's config asks.
            TeacherError: the model does not load, its logits cannot be had in chunks, or they are another at each asking.
        """
        check_model_name(config.model)
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        self._config = config
        self._model: PreTrainedModel | None = load_checked(config)
        self._rotary = mend_rotary(self._model)
        with untouched_generators(self._model):
            self._is_separable, vocab_size = _probe(self._model, config.model)
        self._sharing: Sharing = self._proven(self._model)
        self._identity = _identity(config, self._model, vocab_size, _batching(self._rotary, self._sharing))
        self._hidden_shape = hidden_shape(self._model)

    @property
    def identity(self) -> TeacherIdentity:
        """See `Teacher`."""
        return self._identity

    @property
    def hidden_shape(self) -> HiddenShape:
        """See `FeatureTeacher`."""
        return self._hidden_shape

    def score(
        self, sequences: Sequence[TokenSequence], selection: SelectionInfo, features: Sequence[FeatureInfo] = ()
    ) -> Iterator[Distributions]:
        """See `Teacher`."""
        check_selectable(selection, vocab_size=self._identity.vocab_size)
        if self._model is None:
            raise TeacherError(f"the teacher {self._identity.model!r} is closed")
        check_sequences(sequences, self._identity)
        check_askable(features, self._hidden_shape)
        asked = _Asked(Selector(selection, self._identity.vocab_size), features, needed_layers(self._model, features))
        return self._score_all(self._model, sequences, asked)

    def generate(
        self, prompts: Sequence[Prompt], config: GenerateConfig, tokenizer: Tokenizer, observe: Observe = lambda _: None
    ) -> Iterator[Generated]:
        """See `GeneratingTeacher`."""
        if self._model is None:
            raise TeacherError(f"the teacher {self._identity.model!r} is closed")
        check_prompts(prompts, config, self._identity)
        ending = Ending(config, tokenizer, end_tokens(config, tokenizer.end_ids, own_end_ids(self._model)))
        return write_answers(self._model, self._rotary, prompts, ending, self._config.tokens_per_forward, observe)

    def close(self) -> None:
        """See `Teacher`."""
        self._model = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _proven(self, model: PreTrainedModel) -> Sharing:
        """Which texts may share a forward, by comparing a few alone and beside one another."""
        longest = longest_text(model, context=_context_length(model), most=self._config.tokens_per_forward // 2)

        def logits_of(texts: Texts) -> list[Tensor]:
            with self._rotary.texts([len(text) for text in texts]):
                return _logits_at(model, texts) if self._is_separable else [_whole_logits_at(model, text) for text in texts]

        return prove_sharing(logits_of, model, longest=longest, name=self._config.model)

    def _score_all(self, model: PreTrainedModel, sequences: Sequence[TokenSequence], asked: _Asked) -> Iterator[Distributions]:
        group_tokens = BATCHES_PER_GROUP * self._config.tokens_per_forward
        if per_position := bytes_per_position(asked.features):
            group_tokens = min(group_tokens, max(self._config.tokens_per_forward, FEATURE_BYTES_PER_GROUP // per_position))
        for group in groups_of_tokens(sequences, group_tokens):
            answers: dict[int, Distributions] = {}
            lengths = [sequence.num_tokens for sequence in group]
            for batch in batches_by_length(lengths, self._config.tokens_per_forward, self._sharing):
                members = [group[index] for index in batch]
                answers |= zip(batch, self._score_batch(model, members, asked), strict=True)
            yield from (answers[index] for index in range(len(group)))

    def _score_batch(self, model: PreTrainedModel, batch: Sequence[TokenSequence], asked: _Asked) -> Iterator[Distributions]:
        supervised = [sequence for sequence in batch if sequence.supervised_N.any()]
        try:
            scores = iter(self._scores(model, supervised, asked))
            return iter([next(scores) if s.supervised_N.any() else asked.nothing() for s in batch])
        except torch.OutOfMemoryError as error:
            raise TeacherError(
                f"the teacher {self._identity.model!r} ran out of memory; make teacher.tokens_per_forward "
                f"({self._config.tokens_per_forward}) or teacher.chunk_positions ({self._config.chunk_positions}) smaller"
            ) from error

    def _scores(self, model: PreTrainedModel, batch: Sequence[TokenSequence], asked: _Asked) -> Iterator[Distributions]:
        chunk = self._config.chunk_positions
        if not self._is_separable:
            for sequence in batch:
                with self._rotary.texts([sequence.num_tokens]):
                    found, rows = _score_chunked_prefill(model, sequence, asked, chunk)
                yield _record(sequence, asked, found, rows)
        elif batch:
            with self._rotary.texts([sequence.num_tokens for sequence in batch]):
                found, rows = _score_separable(model, batch, asked, chunk)
            start = 0
            for sequence in batch:
                end = start + len(sequence.positions_P)
                of_sequence = {layer: rows_PH[start:end] for layer, rows_PH in rows.items()}
                yield _record(sequence, asked, found.rows(start, end), of_sequence)
                start = end


def _record(sequence: TokenSequence, asked: _Asked, found: Found, rows: LayerRows) -> Distributions:
    distributions = record_of(sequence, asked.selector.selection, found)
    if not asked.features:
        return distributions
    return replace(distributions, features=features_from(asked.features, rows.__getitem__))


@torch.inference_mode()
def _score_separable(
    model: PreTrainedModel, batch: Sequence[TokenSequence], asked: _Asked, chunk: int
) -> tuple[Found, LayerRows]:
    """All supervised positions of a batch: body once, head in chunks."""
    selector = asked.selector
    longest = max(sequence.num_tokens for sequence in batch)
    ids_BT = np.zeros((len(batch), longest), np.int64)
    supervised_BT = np.zeros(ids_BT.shape, np.bool_)
    for row, sequence in enumerate(batch):
        ids_BT[row, : sequence.num_tokens] = sequence.input_ids_N
        supervised_BT[row, : sequence.num_tokens] = sequence.supervised_N
    with seen_layers(model, asked.layers, head=False) as states:
        hidden_BTH = _hidden(model, torch.from_numpy(ids_BT).to(model.device))
    states = {hidden_shape(model).num_layers: hidden_BTH, **states}
    rows_P = torch.from_numpy(np.flatnonzero(supervised_BT)).to(hidden_BTH.device)
    targets_P = np.concatenate([sequence.target_ids_P for sequence in batch])
    states_P = np.concatenate([_states(sequence, selector) for sequence in batch])
    hidden_XH = hidden_BTH.reshape(-1, hidden_BTH.shape[-1])
    parts = [
        _select(selector, _logits(model, hidden_XH[rows_C]), targets_P[start : start + chunk], states_P[start : start + chunk])
        for start, rows_C in zip(range(0, len(rows_P), chunk), rows_P.split(chunk), strict=True)
    ]
    return _concatenate(parts), rows_of(states, asked.layers, rows_P)


@torch.inference_mode()
def _score_chunked_prefill(
    model: PreTrainedModel, sequence: TokenSequence, asked: _Asked, chunk: int
) -> tuple[Found, LayerRows]:
    """All supervised positions of one sequence, fed in chunks with a key-value cache.

    For a model whose logits are more than a projection of its last state (soft-capped, scaled): its own forward must make them.
    """
    selector = asked.selector
    targets_P, states_P = sequence.target_ids_P, _states(sequence, selector)
    ids_1N = torch.from_numpy(sequence.input_ids_N.astype(np.int64))[None].to(model.device)
    parts: list[list[NDArray[Any]]] = []
    rows: list[LayerRows] = []
    cache: Any = None
    done = 0
    for start in range(0, sequence.num_tokens, chunk):
        here = slice(start, start + chunk)
        with seen_layers(model, asked.layers, head=True) as states:
            output = model(input_ids=ids_1N[:, here], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        rows_C = np.flatnonzero(sequence.supervised_N[here])
        if len(rows_C):
            these = slice(done, done + len(rows_C))
            logits_CV = output.logits[0, torch.from_numpy(rows_C).to(output.logits.device)]
            parts.append(_select(selector, logits_CV, targets_P[these], states_P[these]))
            rows.append(rows_of(states, asked.layers, torch.from_numpy(rows_C)))
            done = these.stop
    return _concatenate(parts), joined(rows)


def _logits_at(model: PreTrainedModel, texts: Texts) -> list[Tensor]:
    ids_BT = np.zeros((len(texts), max(map(len, texts))), np.int64)
    for row, text in enumerate(texts):
        ids_BT[row, : len(text)] = text
    hidden_BTH = _hidden(model, torch.from_numpy(ids_BT).to(model.device))
    return [_logits(model, hidden_BTH[row, torch.from_numpy(looked_at(len(text)))]) for row, text in enumerate(texts)]


def _whole_logits_at(model: PreTrainedModel, text: NDArray[np.int64]) -> Tensor:
    logits_NV = model(input_ids=torch.from_numpy(text)[None].to(model.device), use_cache=False).logits[0]
    return logits_NV[torch.from_numpy(looked_at(len(text)))]


def _states(sequence: TokenSequence, selector: Selector) -> NDArray[np.int64]:
    """(P,) where the draws at the sequence's positions start; 0 without any."""
    if selector.seed is None:
        return np.zeros(len(sequence.positions_P), np.int64)
    return position_states(selector.seed, sequence.key, sequence.positions_P).view(np.int64)


def _select(
    selector: Selector, logits_CV: Tensor, targets_C: NDArray[np.int32], states_C: NDArray[np.int64]
) -> list[NDArray[Any]]:
    given = (torch.from_numpy(array).to(logits_CV.device) for array in (targets_C.astype(np.int64), states_C))
    return [tensor.cpu().numpy() for tensor in selector.select(logits_CV, *given)]


def _concatenate(parts: Sequence[Sequence[NDArray[Any]]]) -> Found:
    return Found.from_padded(Selected(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True))))


def _hidden(model: PreTrainedModel, ids_BT: Tensor) -> Tensor:
    """(B, T, H) states that the output projection takes.

    Padding is on the right, where a causal model does not see it: no mask, so that attention may take its causal fast path.
    """
    return model.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state


def _logits(model: PreTrainedModel, hidden_CH: Tensor) -> Tensor:
    head = model.get_output_embeddings()
    if head is None:
        raise AttributeError("the model has no output projection")
    return head(hidden_CH)


@torch.inference_mode()
def _probe(model: PreTrainedModel, name: str) -> tuple[bool, int]:
    """Whether the logits are `get_output_embeddings()` of the body's last state, bit for bit; and their width.

    Raises:
        TeacherError: the model does not run, or neither way of having the logits in chunks gives what its forward gives.
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
            f"the model {name!r} makes its logits in a way of its own and keeps no key-value cache to read a text in chunks; "
            "use teacher.backend vllm, or teacher.dtype float32 where it is not"
        )
    second = model(input_ids=ids_1T[:, half:], past_key_values=first.past_key_values, use_cache=True)
    # Two steps add up in another order than one; a model that ignores the cache is off by far more.
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


def _context_length(model: PreTrainedModel) -> int:
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or NO_LIMIT


def _batching(rotary: TextRotary, sharing: Sharing) -> dict[str, str]:
    """What was decided about batches at load, where it is not the plain way; numbers follow from it, so the identity has it."""
    decided = {"rotary_factors": "per text"} if rotary.depends_within_context else {}
    return decided if sharing == "any" else decided | {"batches": sharing}


def _identity(config: TeacherConfig, model: PreTrainedModel, vocab_size: int, batching: dict[str, str]) -> TeacherIdentity:
    quantization = getattr(model.config, "quantization_config", None)
    if quantization is not None and not isinstance(quantization, dict):
        quantization = quantization.to_dict()
    loaded = getattr(model.config, "_commit_hash", None)
    return TeacherIdentity(
        model=short_name(config.model),
        revision=resolved_revision(config.model, config.revision, loaded),
        weights_digest=weights_digest(config.model),
        architecture=type(model).__name__,
        vocab_size=vocab_size,
        dtype=str(model.dtype).removeprefix("torch."),
        quantization=None if quantization is None else str(quantization.get("quant_method")),
        engine="transformers",
        engine_version=transformers.__version__,
        engine_options=transformers_options(model, config.engine_options) | batching,
        context_length=_context_length(model),
    )
