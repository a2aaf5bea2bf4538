"""What terms are told before training: the cache and the student's sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kdcache.errors import ConfigError
from kdcache.loader.cache import Cache
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
        sidecar=_none_yet,
        hidden_size=int(config.hidden_size),
        num_layers=int(config.num_hidden_layers),
        num_heads=num_heads,
        num_kv_heads=int(getattr(config, "num_key_value_heads", None) or num_heads),
        head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // num_heads),
        vocab_size=int(config.vocab_size),
        num_sequences=sum(map(len, caches)),
        seed=seed,
        device=output_projection(model).weight.device,
        pooled_features=_none_yet,
        student=model,
    )


def _none_yet(name: str) -> Any:
    raise ConfigError(f"the cache has no {name!r}")
