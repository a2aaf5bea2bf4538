"""Heads that predict further tokens, as Medusa's: head j at position t learns what the teacher said at position t+j.

Source: Cai et al., Medusa, arXiv 2401.10774: a head is h + SiLU(W h + b), begun with W = b = 0, and its loss weighs decay^j.
Here it learns the teacher's distributions in place of the tokens that came. A cache has them all: the record of position t+j.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kdcache.format.manifest import Manifest
from kdcache.kernels.divergences import get_divergence
from kdcache.loader.torch_batches import TorchBatch
from kdcache.loss.fused import Projection, fused_sparse_kd_loss
from kdcache.loss.prepare import LossSettings
from kdcache.loss.selection_rules import reading_for
from kdcache.loss.states.vectors import zero_of
from kdcache.train.terms.base import Setting, StudentStates, Term


class FurtherTokens(Term):
    """A divergence from the teacher's distributions of the tokens after the next one, of one head each.

    The output projection is the student's own, for all heads. With the finished model they are in `further_tokens.safetensors`:
    `heads.<j-1>.weight` (H, H) and `heads.<j-1>.bias` (H,).

    Args:
        num_heads: head j = 1..num_heads predicts the token at t + 1 + j.
        decay: head j's positions count decay^j.
        divergence: as `loss.divergence`; with `divergence_options` and `tail`.
        train_student: false trains the heads alone (Medusa-1): the student learns nothing from them.
    """

    needed = "entries that suit the divergence"

    def __init__(
        self,
        num_heads: int = 3,
        decay: float = 0.8,
        divergence: str = "forward_kl",
        divergence_options: dict[str, float] | None = None,
        tail: str | None = None,
        *,
        train_student: bool = True,
    ) -> None:
        super().__init__()
        if num_heads < 1 or not 0 < decay <= 1:
            raise ValueError(f"num_heads is {num_heads} and decay {decay}; expected at least 1 head, and a decay in (0, 1]")
        self.num_heads, self.decay, self.train_student = num_heads, decay, train_student
        self._divergence = get_divergence(divergence, **(divergence_options or {}))
        self._tail: Any = tail
        self.heads = nn.ModuleList()

    def check(self, manifest: Manifest) -> None:
        """Raise LossError where the divergence would be wrong for the cache's selection."""
        reading_for(manifest.identity.selection.kind, self._divergence, tail=self._tail, temperature=1.0)

    def set_up(self, setting: Setting) -> None:
        """Make the heads: all predict what the student's own projection does, to begin with."""
        size = setting.hidden_size
        self.heads = nn.ModuleList(nn.Linear(size, size, device=setting.device) for _ in range(self.num_heads))
        for parameter in self.heads.parameters():
            nn.init.zeros_(parameter)

    def forward(self, student: StudentStates, batch: TorchBatch, weights_P: Tensor) -> Tensor:
        """The weighted sum over heads and positions."""
        hidden_PH, projection = student.hidden_PH, student.projection
        if not self.train_student:
            hidden_PH, projection = hidden_PH.detach(), _detached(projection)
        total = zero_of(hidden_PH)
        for ahead, head in enumerate(self.heads, start=1):
            here, there = positions_ahead(batch, ahead)
            states = hidden_PH[here]
            weight, bias = head.weight.to(states.dtype), head.bias.to(states.dtype)
            states = states + nn.functional.silu(nn.functional.linear(states, weight, bias))  # pyright: ignore[reportArgumentType]
            total = total + self.decay**ahead * fused_sparse_kd_loss(
                states,
                projection,
                batch.teacher.map(lambda array, there=there: array[there]),
                divergence=self._divergence,
                weights=weights_P[there],
                settings=LossSettings(tail=self._tail, reduction="sum"),
            )
        return total

    def exported(self) -> Mapping[str, Tensor]:
        """The heads."""
        return {f"heads.{name}": tensor.detach() for name, tensor in self.heads.state_dict().items()}

    def count(self, batch: TorchBatch, weights_P: Tensor) -> Tensor:
        """The weights of the positions that the heads learn from, by their decay."""
        sums = [self.decay**ahead * weights_P[positions_ahead(batch, ahead)[1]].sum() for ahead in range(1, self.num_heads + 1)]
        return torch.stack(sums).sum()


def positions_ahead(batch: TorchBatch, ahead: int) -> tuple[Tensor, Tensor]:
    """(M,) int64 twice: the positions of a batch that have one `ahead` tokens later in the same sequence, and those.

    Args:
        batch: both index into its positions 0..P-1.
        ahead: at least 1.
    """
    slots_P = batch.flat_positions_P
    if not len(slots_P):
        return slots_P, slots_P
    later_P = slots_P + ahead
    found_P = torch.searchsorted(slots_P, later_P).clamp(max=len(slots_P) - 1)
    segments = batch.segment_ids_BT.flatten()
    num_slots = batch.segment_ids_BT.shape[1]
    within = torch.minimum(later_P, torch.full_like(later_P, segments.numel() - 1))
    is_there = (slots_P[found_P] == later_P) & (segments[slots_P] == segments[within])
    is_there &= slots_P // num_slots == later_P // num_slots
    return torch.nonzero(is_there)[:, 0], found_P[is_there]


def _detached(projection: Projection) -> Projection:
    bias_V = None if projection.bias_V is None else projection.bias_V.detach()
    return Projection(projection.weight_VH.detach(), bias_V, projection.head, projection.chunk_positions)
