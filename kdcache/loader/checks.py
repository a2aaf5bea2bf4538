"""What a loader refuses before it reads."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kdcache.config.load import config_to_builtins, convert_config
from kdcache.config.loader import LoaderConfig
from kdcache.errors import ConfigError
from kdcache.loader.order.mix import CacheTable, epoch_counts


def check_config(config: LoaderConfig, caches: Sequence[CacheTable]) -> None:
    """Raise ConfigError unless the config is in range and fits the caches, and each sequence fits a row."""
    # Structs do not check the ranges of their fields when they are made in Python.
    convert_config(config_to_builtins(config), LoaderConfig, where="loader")
    for index, cache in enumerate(caches):
        _check_cache(config, cache, "the cache" if len(caches) == 1 else f"cache {index}")
    epoch_counts([len(cache.num_tokens_S) for cache in caches], config.mix)


def check_epoch(epoch: int) -> None:
    """Raise ConfigError unless it can be an epoch."""
    if epoch < 0:
        raise ConfigError(f"epoch is {epoch}, expected 0 or more")


def check_ranks(config: LoaderConfig, rank: int, world_size: int) -> None:
    """Raise ConfigError unless `rank` is one of `world_size` ranks that share a global batch equally."""
    if world_size < 1 or not 0 <= rank < world_size:
        raise ConfigError(f"rank is {rank} of world_size {world_size}; expected 0 <= rank < world_size")
    if config.batch_rows % world_size:
        raise ConfigError(
            f"batch_rows is {config.batch_rows}, which {world_size} ranks cannot share equally; it counts the rows of the "
            f"global batch, so make it a multiple of world_size"
        )


def _check_cache(config: LoaderConfig, cache: CacheTable, name: str) -> None:
    lengths_S = cache.num_tokens_S
    if len(lengths_S) == 0:
        raise ConfigError(f"{name} holds no sequence, so there is nothing to load; finish the capture first")
    longest = int(lengths_S.max())
    if longest > config.seq_len and cache.bundles is not None:
        raise ConfigError(
            f"seq_len is {config.seq_len}, but {int((lengths_S > config.seq_len).sum())} of {len(cache.bundles)} pairs and "
            f"single sequences of {name} have more tokens together: raise seq_len to {longest}, or capture shorter answers"
        )
    if longest > config.seq_len:
        too_long = np.flatnonzero(lengths_S > config.seq_len)
        raise ConfigError(
            f"seq_len is {config.seq_len}, but {len(too_long)} of {len(lengths_S)} sequences of {name} are longer, the first "
            f"of them sequence {too_long[0]} with {lengths_S[too_long[0]]} tokens: raise seq_len to {longest}, or capture "
            f"again with input.window.size <= {config.seq_len}"
        )
