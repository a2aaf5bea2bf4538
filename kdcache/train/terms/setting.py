"""What terms are told before training: the cache and the student's sizes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from torch import Tensor

from kdcache.format.feature_vectors import FeatureVectors, stacked_vectors
from kdcache.loader.cache import Cache
from kdcache.loader.torch_batches import feature_tensors, sidecar_tensors
from kdcache.train.body import output_projection, text_config
from kdcache.train.terms.base import Setting
from kdcache.train.terms.engine import LossTerms
from kdcache.train.terms.inner import check_reads


def set_up_terms(terms: LossTerms, model: Any, caches: Sequence[Cache], *, seed: int) -> LossTerms:
    """Make the terms' parameters for a student and a cache, and look whether the student shows what they read.

    Args:
        terms: not yet set up.
        model: of transformers, on its device.
        caches: open; of several, the first one's manifest and sidecars count.
        seed: of what terms draw at random.

    Raises:
        ConfigError: see `check_reads`; whatever a term refuses.
    """
    terms.set_up(setting_of(model, caches, seed=seed))
    check_reads(model, terms.reads)
    return terms


def setting_of(model: Any, caches: Sequence[Cache], *, seed: int) -> Setting:
    """The setting of a student and a cache.

    Args:
        model: of transformers.
        caches: open; of several, the first one's manifest and sidecars count.
        seed: of what terms draw at random.
    """
    config = text_config(model)
    num_heads = int(config.num_attention_heads)
    return Setting(
        manifest=caches[0].manifest,
        sidecar=lambda name: sidecar_tensors(caches[0], name),
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


def _of_all(caches: Sequence[Cache], name: str) -> FeatureVectors[Tensor]:
    """A pooled feature of the sequences of all caches, in the loader's order."""
    parts = [cache.pooled_features(name) for cache in caches]
    offsets = [0, *accumulate(len(cache) for cache in caches[:-1])]
    return feature_tensors(parts[0] if len(parts) == 1 else stacked_vectors(parts, offsets))
