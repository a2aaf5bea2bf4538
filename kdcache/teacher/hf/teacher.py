"""The `transformers` teacher: batches of similar lengths, logits a chunk of positions at a time.

The model's body runs over a batch; the output projection and the selection run over `chunk_positions` supervised positions at a
time, so [tokens, vocab] never exists.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from kdcache.config.capture import GenerateConfig, TeacherConfig
from kdcache.errors import TeacherError
from kdcache.format.manifest import FeatureInfo, SelectionInfo, TeacherIdentity
from kdcache.format.output_projection import OutputProjection
from kdcache.format.record import Distributions, TokenSequence
from kdcache.shown import get_logger
from kdcache.teacher.base import check_selectable, check_sequences, no_positions
from kdcache.teacher.batches import batches_by_length, groups_of_tokens
from kdcache.teacher.checkpoint import check_model_name, resolved_revision, short_name, weights_digest
from kdcache.teacher.engine_identity import transformers_options
from kdcache.teacher.features import HiddenShape, bytes_per_position, check_askable, is_read
from kdcache.teacher.generation import Ending, Generated, Observe, Prompt, check_prompts, end_tokens
from kdcache.teacher.hf.activations import ActivationWatch
from kdcache.teacher.hf.features import Vectors, needed_sources, stored
from kdcache.teacher.hf.forward import (
    Asked,
    logits_at,
    probe_forward,
    read_whole,
    score_in_chunks,
    score_separable,
    whole_logits_at,
)
from kdcache.teacher.hf.generate import own_end_ids, write_answers
from kdcache.teacher.hf.heads import model_shape
from kdcache.teacher.hf.load import load_checked
from kdcache.teacher.hf.projection import projection_of
from kdcache.teacher.hf.proof import (
    Sharing,
    Texts,
    longest_text,
    prove_sharing,
    untouched_generators,
)
from kdcache.teacher.hf.rotary import TextRotary, mend_rotary
from kdcache.teacher.select.found import Found, record_of
from kdcache.teacher.select.torch_selector import Selector
from kdcache.teacher.tokenizer import Tokenizer

log = get_logger(__name__)

BATCHES_PER_GROUP = 8
"""Sequences are sorted by length within groups of about this many batches, whose answers wait in memory."""

FEATURE_BYTES_PER_GROUP = 256 * 2**20
"""Groups are smaller, down to one batch, if their features would take more than this."""

NO_LIMIT = 2**31 - 1
"""The context_length of a model that states none."""


class HfTeacher:
    """A causal language model of `transformers`; see the module's docstring."""

    def __init__(self, config: TeacherConfig) -> None:
        """Load the model.

        Raises:
            ConfigError: a setting that only vLLM has, or an attention that leaves out what the model's config asks.
            TeacherError: the model does not load, cannot give its logits in chunks, or answers differently when asked again.
        """
        check_model_name(config.model)
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        self._config = config
        self._model: PreTrainedModel | None = load_checked(config)
        self._rotary = mend_rotary(self._model)
        with untouched_generators(self._model):
            self._is_separable, vocab_size = probe_forward(self._model, config.model)
        self._sharing: Sharing = self._proven(self._model)
        self._identity = _identity(config, self._model, vocab_size, _batching(self._rotary, self._sharing))
        self._hidden_shape = model_shape(self._model)

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
        asked = Asked(Selector(selection, self._identity.vocab_size), features, needed_sources(self._model, features))
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

    def output_projection(self) -> OutputProjection:
        """See `SidecarTeacher`."""
        return projection_of(self._open_model(), self._identity.vocab_size)

    def activation_statistics(self, sequences: Sequence[TokenSequence]) -> dict[str, NDArray[Any]]:
        """See `SidecarTeacher`."""
        model = self._open_model()
        check_sequences(sequences, self._identity)
        lengths = [sequence.num_tokens for sequence in sequences]
        with ActivationWatch(model) as watch:
            for batch in batches_by_length(lengths, self._config.tokens_per_forward, self._sharing):
                of_batch = [lengths[index] for index in batch]
                with self._rotary.texts(of_batch), watch.texts(of_batch):
                    read_whole(model, [sequences[index].input_ids_N for index in batch])
        return watch.statistics()

    def _open_model(self) -> PreTrainedModel:
        if self._model is None:
            raise TeacherError(f"the teacher {self._identity.model!r} is closed")
        return self._model

    def close(self) -> None:
        """See `Teacher`."""
        self._model = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _proven(self, model: PreTrainedModel) -> Sharing:
        """Find out which texts may share a forward, by comparing a few alone and together."""
        longest = longest_text(model, context=_context_length(model), most=self._config.tokens_per_forward // 2)

        def logits_of(texts: Texts) -> list[Tensor]:
            with self._rotary.texts([len(text) for text in texts]):
                return logits_at(model, texts) if self._is_separable else [whole_logits_at(model, text) for text in texts]

        return prove_sharing(logits_of, model, longest=longest, name=self._config.model)

    def _score_all(self, model: PreTrainedModel, sequences: Sequence[TokenSequence], asked: Asked) -> Iterator[Distributions]:
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

    def _score_batch(self, model: PreTrainedModel, batch: Sequence[TokenSequence], asked: Asked) -> Iterator[Distributions]:
        read = [sequence for sequence in batch if is_read(sequence, asked.features)]
        try:
            scores = iter(self._scores(model, read, asked))
            return iter([next(scores) if is_read(s, asked.features) else asked.nothing() for s in batch])
        except torch.OutOfMemoryError as error:
            raise TeacherError(
                f"the teacher {self._identity.model!r} ran out of memory; make teacher.tokens_per_forward "
                f"({self._config.tokens_per_forward}) or teacher.chunk_positions ({self._config.chunk_positions}) smaller"
            ) from error

    def _scores(self, model: PreTrainedModel, batch: Sequence[TokenSequence], asked: Asked) -> Iterator[Distributions]:
        chunk = self._config.chunk_positions
        if not self._is_separable:
            for sequence in batch:
                with self._rotary.texts([sequence.num_tokens]):
                    found, vectors = score_in_chunks(model, sequence, asked, chunk)
                yield _record(sequence, asked, found, vectors)
        elif batch:
            with self._rotary.texts([sequence.num_tokens for sequence in batch]):
                found, of_each = score_separable(model, batch, asked, chunk)
            start = 0
            for sequence, vectors in zip(batch, of_each, strict=True):
                end = start + len(sequence.positions_P)
                yield _record(sequence, asked, None if found is None else found.positions(start, end), vectors)
                start = end


def _record(sequence: TokenSequence, asked: Asked, found: Found | None, vectors: Vectors) -> Distributions:
    if found is None or not sequence.supervised_N.any():
        distributions = no_positions(asked.selector.selection)
    else:
        distributions = record_of(sequence, asked.selector.selection, found)
    return replace(distributions, features=stored(vectors, asked.features)) if asked.features else distributions


def _context_length(model: PreTrainedModel) -> int:
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or NO_LIMIT


def _batching(rotary: TextRotary, sharing: Sharing) -> dict[str, str]:
    """What was decided about batches when the model was loaded, unless it is the default; the numbers depend on it."""
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
