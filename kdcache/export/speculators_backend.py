"""A cache as a backend of speculators' own registry: its trainer reads states from the shards, and nothing is exported."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from hs_connectors import HiddenStatesBackend, HiddenStatesTransfer

from kdcache.errors import ConfigError
from kdcache.export.folder import NAME, read_made
from kdcache.export.states import choose_features, drafter_states
from kdcache.export.torch_files import speculators_tensors
from kdcache.loader.cache import Cache, open_cache


class CacheTransfer(HiddenStatesTransfer):
    """States of the sequences of a cache, by their index; can be pickled into a worker process."""

    def __init__(self, cache: Cache, features: list[str]) -> None:
        self._cache = cache
        self._features = choose_features(cache, features, last="before_norm").all

    def get_cached(self, file_idx: int) -> dict[str, torch.Tensor] | None:
        """`hidden_states` (N, layers, H) bfloat16 and `token_ids` (N,) of a sequence; None where the cache has fewer."""
        if not 0 <= file_idx < len(self._cache):
            return None
        return speculators_tensors(drafter_states(self._cache, file_idx, self._features))

    def get_generated(self, hs_transfer_params: dict[str, Any]) -> dict[str, torch.Tensor] | None:  # noqa: ARG002
        """Nothing: a cache is not written to while a drafter is trained."""
        raise ConfigError(
            "a sequence is not in the cache, and the kdcache backend generates nothing; train with --on-missing skip or raise"
        )


@HiddenStatesBackend.register("kdcache")
class CacheBackend(HiddenStatesBackend):
    """`--hidden-states-backend kdcache`, with the cache that the exported folder names or `--kdcache-cache`."""

    @staticmethod
    def add_train_args(parser: argparse.ArgumentParser) -> None:
        """Add `--kdcache-cache`."""
        parser.add_argument(
            "--kdcache-cache", type=str, default=None, help="the cache; by default the one that the data path was made from"
        )

    @staticmethod
    def add_launch_args(parser: argparse.ArgumentParser) -> None:
        """Nothing: no engine runs."""

    @staticmethod
    def from_train_args(args: argparse.Namespace, data_path: str) -> CacheTransfer:
        """Open the cache of an exported folder.

        Raises:
            ConfigError: the folder was not made by `kdcache export speculators`, or from another snapshot of the cache.
        """
        path = Path(data_path) / NAME
        if not path.exists():
            raise ConfigError(f"{data_path}: has no {NAME}; make it with `kdcache export speculators CACHE --out {data_path}`")
        made = read_made(path)
        cache = open_cache(getattr(args, "kdcache_cache", None) or made["cache"])
        if cache.snapshot != made["snapshot"]:
            raise ConfigError(f"{data_path}: was made from another snapshot of the cache; export it again into another folder")
        auxiliary = made["features"][:-1]
        return CacheTransfer(cache, auxiliary)

    @staticmethod
    def build_kv_transfer_config(args: argparse.Namespace) -> dict[str, Any]:  # noqa: ARG004
        """Refuse: nothing is generated."""
        raise ConfigError("the kdcache backend reads a cache; it has no part in launching vLLM")
