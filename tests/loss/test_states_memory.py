"""Losses on whole distributions hold one chunk of logits per side, never those of all positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kdcache.loss.fused import Projection
from kdcache.loss.states.dpkd import Answers, dpkd_loss
from kdcache.loss.states.dual_space import Affine, dual_space_loss
from kdcache.loss.states.exact_kl import TeacherStates, exact_kd_loss

NUM_POSITIONS, VOCAB_SIZE, CHUNK = 200, 1000, 10


class Largest(TorchDispatchMode):
    """Notes the most numbers of any tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            self.numel = max(self.numel, tensor.numel() if isinstance(tensor, torch.Tensor) else 0)
        return made


def losses() -> dict[str, Any]:
    hidden_PH, weight_VH = torch.randn((NUM_POSITIONS, 4)).requires_grad_(), torch.randn((VOCAB_SIZE, 4)).requires_grad_()
    projection = Projection(weight_VH, chunk_positions=CHUNK)
    teacher = TeacherStates(torch.randn((NUM_POSITIONS, 6)), Projection(torch.randn((VOCAB_SIZE, 6)), chunk_positions=CHUNK))
    maps = Affine(torch.randn((4, 6)).requires_grad_()), Affine(torch.randn((6, 4)))
    targets_P, teacher_P = torch.zeros(NUM_POSITIONS, dtype=torch.int64), -torch.ones(NUM_POSITIONS)
    answers = Answers(torch.arange(NUM_POSITIONS) // 100, torch.tensor([[0, 1]]), 2)
    ones_P = torch.ones(NUM_POSITIONS)
    return {
        "exact_kl": lambda: exact_kd_loss(hidden_PH, projection, teacher),
        "dual_space": lambda: dual_space_loss((hidden_PH, projection), teacher, maps).total(),
        "dpkd": lambda: dpkd_loss(hidden_PH, projection, targets_P, teacher_P, answers, ones_P),
        "whole": lambda: (hidden_PH @ weight_VH.T).log_softmax(dim=1).sum(),
    }


@pytest.mark.parametrize("name", ["exact_kl", "dual_space", "dpkd", "whole"])
def test_the_largest_tensor_is_a_chunk_of_logits(name: str) -> None:
    with Largest() as largest:
        losses()[name]().backward()
    found, allowed = largest.numel, CHUNK * VOCAB_SIZE
    assert (found >= NUM_POSITIONS * VOCAB_SIZE) if name == "whole" else (found <= allowed)
