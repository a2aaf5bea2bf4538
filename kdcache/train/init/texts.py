"""Where the statistics come from that decide what is cut: the capture, the cache's own text, or a file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from kdcache.config.cut import StatisticsConfig
from kdcache.config.train import StudentConfig
from kdcache.loader.cache import Cache
from kdcache.teacher.checkpoint import weights_digest
from kdcache.teacher.sidecars import ACTIVATION_STATISTICS
from kdcache.teacher.tokenizer import Tokenizer
from kdcache.train.evaluation.heldout import read_heldout
from kdcache.train.init.layers import Statistics
from kdcache.train.init.measure import measured


@dataclass(frozen=True)
class Source:
    """Gives statistics of a teacher.

    Attributes:
        name: for people: a file or a cache.
        measure: of a teacher in evaluation mode.
    """

    name: str
    measure: Callable[[PreTrainedModel], Statistics]


def source_of(
    config: StudentConfig, tokenizer: Callable[[], Tokenizer], cache: Cache | None, device: torch.device | None = None
) -> Source | None:
    """What a config names; None where there is neither a file nor a cache.

    Args:
        config: which teacher and which text.
        tokenizer: gives the teacher's, which makes ids of a file's text.
        cache: whose statistics or sequences are taken where the config names no file.
        device: where the teacher runs meanwhile; None for where it is.

    Raises:
        InputError: when it is measured, a file that cannot be read.
    """
    text = config.statistics
    if text.data is not None:
        path = text.data
        return Source(path, lambda teacher: _measured(teacher, _of_file(path, tokenizer(), text), device))
    if cache is None:
        return None
    kept = cache
    if any(sidecar.name == ACTIVATION_STATISTICS for sidecar in cache.manifest.sidecars) and _captured(config, cache):
        return Source(f"the capture ({ACTIVATION_STATISTICS})", lambda _: kept.sidecar(ACTIVATION_STATISTICS))
    return Source("the cache's sequences", lambda teacher: _measured(teacher, _of_cache(kept, text.num_sequences), device))


def _captured(config: StudentConfig, cache: Cache) -> bool:
    """Whether the capture's teacher has these weights: the same files, or the same name on the hub at the same revision."""
    ours, teacher = weights_digest(config.model), cache.manifest.identity.teacher
    if ours is not None or teacher.weights_digest is not None:
        return ours == teacher.weights_digest
    return config.model == teacher.model and config.revision in (None, teacher.revision)


def _measured(teacher: PreTrainedModel, sequences: list[NDArray[np.integer]], device: torch.device | None) -> Statistics:
    before = teacher.device
    try:
        return measured(teacher.to(device or before), sequences)  # pyright: ignore[reportArgumentType]
    finally:
        teacher.to(before)  # pyright: ignore[reportArgumentType]


def _of_file(path: str, tokenizer: Tokenizer, config: StatisticsConfig) -> list[NDArray[np.integer]]:
    """Windows evenly spread over the file."""
    windows = [sequence.input_ids_N for sequence in read_heldout(path, tokenizer, window=config.window)]
    return [windows[index] for index in _spread(len(windows), config.num_sequences)]


def _of_cache(cache: Cache, count: int) -> list[NDArray[np.integer]]:
    """Sequences evenly spread over the cache."""
    return [record.sequence.input_ids_N for record in cache.get(_spread(len(cache), count))]


def _spread(num_there: int, count: int) -> list[int]:
    return sorted({int(index) for index in np.linspace(0, num_there - 1, min(count, num_there))})
