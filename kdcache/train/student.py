"""The student: built or loaded, and checked against the cache."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import logging

from kdcache.config.train import StudentConfig
from kdcache.errors import ConfigError, MismatchError
from kdcache.format.manifest import Identity
from kdcache.shown import first_line
from kdcache.teacher import load_tokenizer
from kdcache.teacher.checkpoint import check_model_name, why_not_loaded
from kdcache.teacher.hf.attention import must_be_eager, use_eager
from kdcache.teacher.hf.load import class_of_checkpoint, language_model_class
from kdcache.teacher.hf.rotary import mend_rotary
from kdcache.train.body import text_config, vocab_size
from kdcache.train.finite import not_finite_weight
from kdcache.train.runs.digests import DIGESTS, find_damage

_DERIVED_FIELDS = ("head_dim", "num_key_value_heads", "layer_types")
"""Fields that a configuration class fills in from others. Kept from the base they would contradict the overrides."""


def build_student(config: StudentConfig, *, seed: int) -> PreTrainedModel:
    """The model in float32 on the CPU, with attention that keeps packed documents apart.

    Args:
        config: which model; one with `init: from_teacher` is built by `kdcache.train.init.from_teacher`.
        seed: of random weights; torch's global generator is seeded with it and left so, for dropout.

    Raises:
        ConfigError: the configuration or weights do not load, or an override is unknown or impossible.
    """
    assert config.init != "from_teacher", "kdcache.train.init.from_teacher cuts it"
    torch.manual_seed(seed)
    return with_attention(lambda attention: _built(config, attention), config.attention, field="student.attention")


def with_attention(load: Callable[[str], PreTrainedModel], asked: str, *, field: str | None) -> PreTrainedModel:
    """A model with an attention that does what its configuration asks, and each text's own rotary factors.

    Args:
        load: the model with the attention of this name.
        asked: that name, or `auto`.
        field: that asks, for messages; None where nothing can be asked for.

    Raises:
        ConfigError: it does not load, or what is asked for leaves something out.
    """
    try:
        model = load("sdpa" if asked == "auto" else asked)
    except AttentionError:
        if asked != "auto":
            raise
        model = load("eager")
    was_training = model.training
    model.eval()
    if must_be_eager(model, named=asked != "auto", field=field) and not use_eager(model):
        model = load("eager")
    mend_rotary(model.eval())
    return model.train(was_training)


def _built(config: StudentConfig, attention: str) -> PreTrainedModel:
    options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": attention}
    if config.init == "pretrained":
        return load_model(config.model, revision=config.revision, field="student.model", **options)
    model_config = _student_config(config)
    try:
        return language_model_class(model_config).from_config(model_config, **options)
    except Exception as error:
        _refuse_attention(error, "student.overrides")
        raise ConfigError(f"student.overrides: {config.overrides!r} does not make a model: {error}") from error


def load_model(name: str, *, field: str, revision: str | None = None, **options: Any) -> PreTrainedModel:
    """A causal language model with its weights.

    Args:
        name: folder in the Hugging Face layout or hub id.
        field: config field or flag that named it, for the message.
        revision: hub commit or tag.
        options: as `from_pretrained` takes them.

    Raises:
        ConfigError: it does not load, or weights are missing, damaged or not finite.
    """
    try:
        check_model_name(name)
        with without_progress_bars():
            options = {"trust_remote_code": False} | options
            loaded: Any = class_of_checkpoint(name, revision, **options).from_pretrained(
                name, revision=revision or "main", output_loading_info=True, **options
            )
    except Exception as error:
        _refuse_attention(error, field)
        raise ConfigError(
            f"{field}: no model can be loaded from {name!r}: {why_not_loaded(name, first_line(error))}"
        ) from error
    model, info = loaded
    damage = find_damage(Path(name)) if (Path(name) / DIGESTS).is_file() else None
    if damage is not None:
        raise ConfigError(
            f"{field}: the model in {name!r} is not as it was written: {damage}; make it again, or delete {DIGESTS} there if "
            "it was changed on purpose"
        )
    # transformers fills what is missing with random numbers, and goes on.
    lacking = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if lacking:
        raise ConfigError(
            f"{field}: the weights in {name!r} do not fit their configuration: {lacking[0]} is missing or misshapen"
        )
    broken = not_finite_weight(model)
    if broken is not None:
        raise ConfigError(
            f"{field}: the weight {broken!r} in {name!r} holds numbers that are not finite; take another checkpoint"
        )
    return model


def _student_config(config: StudentConfig) -> Any:
    try:
        base = AutoConfig.from_pretrained(config.model, revision=config.revision or "main", trust_remote_code=False)
    except Exception as error:
        raise ConfigError(
            f"student.model: no model configuration can be read from {config.model!r}: "
            f"{why_not_loaded(config.model, first_line(error))}"
        ) from error
    return _overridden(base, config.overrides)


def _overridden(base: Any, overrides: dict[str, Any]) -> Any:
    """The configuration with some fields changed; those of the text alone may lie below `text_config`."""
    text = base.get_text_config()
    fields = base.to_dict()
    inner = {name: value for name, value in overrides.items() if text is not base and name not in fields}
    if inner:
        changed = _overridden(text, inner)
        base = type(base).from_dict(fields | {_field_of(base, text): changed.to_dict()})
        overrides = {name: value for name, value in overrides.items() if name not in inner}
        fields = base.to_dict()
    for name in overrides:
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"student.overrides.{name}: {type(base).__name__} has no such field{hint}")
    derived = [name for name in _DERIVED_FIELDS if _is_derived(base, name)]
    kept = {name: value for name, value in fields.items() if name not in derived}
    try:
        return type(base).from_dict(kept | overrides)
    except Exception as error:
        raise ConfigError(f"student.overrides: {type(base).__name__} refuses {overrides!r}: {error}") from error


def _field_of(base: Any, text: Any) -> str:
    return next(name for name, value in vars(base).items() if value is text)


def _is_derived(base: Any, name: str) -> bool:
    """Whether the class, not told this field, comes to the base's value itself."""
    fields = base.to_dict()
    if name not in fields:
        return False
    value = fields.pop(name)
    return type(base).from_dict(fields).to_dict().get(name) == value


def check_against_cache(
    model: PreTrainedModel, config: StudentConfig, identity: Identity, *, longest_sequence: int, accept: Collection[str] = ()
) -> None:
    """Refuse a student whose ids or positions are not the cache's.

    Args:
        model: the student.
        config: names its tokenizer.
        identity: the cache's.
        longest_sequence: tokens of the cache's longest sequence.
        accept: with `tokenizer`, another tokenizer is not refused.

    Raises:
        MismatchError: another tokenizer, a vocabulary too small for the teacher's ids, or too short a context.
    """
    if "tokenizer" not in accept:
        _check_tokenizer(config, identity)
    advice = f"set student.overrides.vocab_size to {identity.teacher.vocab_size}"
    if config.init != "random":
        advice = (
            f"load it with transformers, call resize_token_embeddings({identity.teacher.vocab_size}), save it with its "
            "tokenizer, and name that folder as student.model"
        )
    check_vocabulary(vocab_size(model), identity, advice)
    context = getattr(text_config(model), "max_position_embeddings", None)
    if context is not None and context < longest_sequence:
        raise MismatchError(
            f"the student's max_position_embeddings is {context}, but the cache's longest sequence has {longest_sequence} "
            "tokens: set student.overrides.max_position_embeddings, or capture shorter windows"
        )


def check_vocabulary(size: int, identity: Identity, advice: str) -> None:
    """Refuse a student that has no row for some token of the cache's tokenizer.

    Ids from the tokenizer's size on are padding: a teacher that has more of them than the student gives them next to nothing,
    which counts to its tail (`kdcache.loss.padding`), and a student that has more leaves its own out (`loss.train_padding`).

    Raises:
        MismatchError: names all three sizes, and ends with the advice.
    """
    needed = min(identity.teacher.vocab_size, identity.tokenizer.vocab_size)
    if size < needed:
        raise MismatchError(
            f"the student's vocabulary of {size} cannot hold the {needed} token ids of the cache's tokenizer (teacher "
            f"{identity.teacher.model!r} has {identity.teacher.vocab_size}): {advice}"
        )


def _check_tokenizer(config: StudentConfig, identity: Identity) -> None:
    name = config.tokenizer or config.model
    mine, theirs = load_tokenizer(name, config.revision).identity, identity.tokenizer
    if mine.fingerprint != theirs.fingerprint:
        raise MismatchError(
            f"the student's tokenizer {name!r} ({mine.fingerprint[:12]}, {mine.vocab_size} ids) is not the one that made the "
            f"cache, {theirs.name!r} ({theirs.fingerprint[:12]}, {theirs.vocab_size} ids): set student.tokenizer to that one, "
            "or `accept: [tokenizer]` if both give the same ids"
        )


class AttentionError(ConfigError):
    """The model does not have the attention that was asked for."""


def _refuse_attention(error: Exception, field: str) -> None:
    """Say which field chooses the attention, where that is what transformers complains of."""
    if "attn_implementation" in str(error) or "attention implementation" in str(error):
        raise AttentionError(
            f"{field}: the model has no such attention as student.attention asks for; set it to eager ({first_line(error)})"
        ) from error


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """No bar of transformers for every file that it reads or writes; progress is the trainer's to show."""
    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()
