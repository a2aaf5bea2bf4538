"""What terms are told before training: the cache and the student's sizes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from torch import Tensor

from kdcache.errors import ConfigError
from kdcache.format.feature_vectors import FeatureVectors, stacked_vectors
from kdcache.format.identity import TeacherIdentity
from kdcache.format.manifest import Manifest
from kdcache.loader.cache import Cache
from kdcache.loader.torch_batches import feature_tensors, sidecar_tensors
from kdcache.shown import get_logger
from kdcache.train.body import output_projection, text_config
from kdcache.train.terms.base import Setting
from kdcache.train.terms.engine import LossTerms
from kdcache.train.terms.inner import check_reads

log = get_logger(__name__)


def set_up_terms(terms: LossTerms, model: Any, caches: Sequence[Cache], *, seed: int) -> LossTerms:
    """Make the terms' parameters for a student and a cache, and look whether the student shows what they read.

    Args:
        terms: not yet set up.
        model: of transformers, on its device.
        caches: open; of several, the first one's manifest counts, and the sidecars that terms read have to be the same.
        seed: of what terms draw at random.

    Raises:
        ConfigError: see `check_reads` and `check_teachers`; whatever a term refuses.
    """
    check_teachers(terms, [cache.manifest for cache in caches])
    terms.set_up(setting_of(model, caches, seed=seed))
    check_reads(model, terms.reads)
    return terms


def setting_of(model: Any, caches: Sequence[Cache], *, seed: int) -> Setting:
    """The setting of a student and a cache.

    Args:
        model: of transformers.
        caches: open; of several, the first one's manifest counts, and the sidecars that terms read have to be the same.
        seed: of what terms draw at random.
    """
    config = text_config(model)
    num_heads = int(config.num_attention_heads)
    return Setting(
        manifest=caches[0].manifest,
        sidecar=lambda name: _same_sidecar(caches, name),
        hidden_size=int(config.hidden_size),
        num_layers=int(config.num_hidden_layers),
        num_heads=num_heads,
        num_kv_heads=int(getattr(config, "num_key_value_heads", None) or num_heads),
        head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // num_heads),
        vocab_size=int(config.vocab_size),
        num_sequences=sum(map(len, caches)),
        seed=seed,
        device=output_projection(model).weight.device,
        pooled_features=lambda name: _of_all(caches, name),
        student=model,
    )


def check_teachers(terms: LossTerms, manifests: Sequence[Manifest]) -> None:
    """Look whether terms read features of several teachers: refuse it where that is wrong, and warn once where it is doubtful.

    Raises:
        ConfigError: a term compares vectors of one teacher with those of another.
    """
    teachers = [manifest.identity.teacher for manifest in manifests]
    other = next((teacher for teacher in teachers if not _is_same(teachers[0], teacher)), None)
    if other is None:
        return
    mine, theirs = teachers[0].model, other.model
    both = f"{mine!r} and {theirs!r}" if mine != theirs else f"{mine!r} in two versions"
    reading = [(name, t) for name, t in zip(terms.names, terms.members(), strict=True) if t.needs().features]
    wrong = next((name for name, term in reading if term.several_teachers == "wrong"), None)
    if wrong is not None:
        raise ConfigError(
            f"loss term {wrong!r} compares sequences with one another by their features, but the caches are of different "
            f"teachers ({both}), whose spaces have nothing in common; train from one of them"
        )
    doubtful = ", ".join(repr(name) for name, term in reading if term.several_teachers == "doubtful")
    if doubtful:
        log.warning(
            "the loss reads features of different teachers (%s): the student's states, or one projector of them, are brought "
            "near to both spaces at once, in %s; train from one of them if that is not meant",
            both,
            doubtful,
        )


def _is_same(one: TeacherIdentity, other: TeacherIdentity) -> bool:
    if one.weights_digest is not None and other.weights_digest is not None:
        return one.weights_digest == other.weights_digest
    return (one.model, one.revision) == (other.model, other.revision)


def _same_sidecar(caches: Sequence[Cache], name: str) -> dict[str, Tensor]:
    """A sidecar that all caches have; raises ConfigError where theirs are not the same."""
    found = [{sidecar.name: sidecar.sha256 for sidecar in cache.manifest.sidecars}.get(name) for cache in caches]
    missing = [index for index, digest in enumerate(found) if digest is None]
    if missing and any(found):
        raise ConfigError(
            f"cache {missing[0]} lacks the sidecar {name!r}, which another of the caches has; train from that one alone, or "
            "capture the other again with it"
        )
    if len(set(found)) > 1:
        raise ConfigError(
            f"sidecar {name!r} differs between the caches, which are of different teachers or dtypes; train from one of them"
        )
    return sidecar_tensors(caches[0], name)


def _of_all(caches: Sequence[Cache], name: str) -> FeatureVectors[Tensor]:
    """A pooled feature of the sequences of all caches, in the loader's order."""
    parts = [cache.pooled_features(name) for cache in caches]
    offsets = [0, *accumulate(len(cache) for cache in caches[:-1])]
    return feature_tensors(parts[0] if len(parts) == 1 else stacked_vectors(parts, offsets))
