"""Tiny matrices: with more threads than free cores, torch's own would spend the time waiting for one another."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from unwritten_memory import unwritten_memory_is_nan


@pytest.fixture(autouse=True)
def _one_torch_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def nan_in_new_memory() -> Iterator[None]:
    """What torch.empty gives is NaN (or the largest integer)."""
    with unwritten_memory_is_nan():
        yield
