"""One pass of a teacher over some text, for what its layers, heads, neurons and channels do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from kdcache.errors import ConfigError
from kdcache.teacher.hf.activations import ActivationWatch, Statistics

_SEQUENCES_PER_FORWARD = 8


@torch.no_grad()
def measured(teacher: PreTrainedModel, sequences: Iterable[NDArray[np.integer]]) -> Statistics:
    """What the teacher does with these sequences; `kdcache.teacher.hf.activations` has the formulas.

    Args:
        teacher: in evaluation mode.
        sequences: token ids, each at least one.

    Raises:
        ConfigError: not one sequence is given.
    """
    with ActivationWatch(teacher) as watch:
        for batch in _batches(sequences):
            ids_BT = torch.from_numpy(np.stack(batch).astype(np.int64)).to(teacher.device)
            with watch.texts([len(ids) for ids in batch]):
                teacher(input_ids=ids_BT, use_cache=False)
    statistics = watch.statistics()
    if not statistics["num_sequences"][0]:
        raise ConfigError("student.statistics: the text to measure the teacher on is empty")
    return statistics


def _batches(sequences: Iterable[NDArray[np.integer]]) -> Iterator[Sequence[NDArray[np.integer]]]:
    """Neighbours of equal length share a forward, so that nothing is padded."""
    for _, same in groupby((ids for ids in sequences if len(ids)), key=len):
        batch: list[NDArray[np.integer]] = []
        for ids in same:
            batch.append(ids)
            if len(batch) == _SEQUENCES_PER_FORWARD:
                yield batch
                batch = []
        if batch:
            yield batch
