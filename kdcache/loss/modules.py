"""The losses as modules: what is asked for is said once, tensors come at every step."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from kdcache.format.soft_targets import SoftTargets
from kdcache.kernels.divergences import Divergence
from kdcache.loss.divergence_sum import DivergenceSum
from kdcache.loss.fused import Projection, fused_sparse_kd_loss
from kdcache.loss.prepare import DEFAULT, LossSettings
from kdcache.loss.sparse_kd import sparse_kd_loss


class _Loss(nn.Module):
    """What a loss is asked for; it has no parameters of its own. The arguments are those of `sparse_kd_loss`."""

    def __init__(
        self,
        *,
        divergence: str | Divergence | DivergenceSum = "forward_kl",
        alpha: float = 1.0,
        temperature: float = 1.0,
        settings: LossSettings = DEFAULT,
    ) -> None:
        super().__init__()
        self.asked: dict[str, Any] = {
            "divergence": divergence, "alpha": alpha, "temperature": temperature, "settings": settings
        }  # fmt: skip

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.asked.items())


class SparseKD(_Loss):
    """`sparse_kd_loss` as a module."""

    def forward(
        self,
        student_logits_PV: Tensor,
        teacher: SoftTargets[Tensor] | None,
        *,
        target_ids: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        """The loss."""
        return sparse_kd_loss(student_logits_PV, teacher, target_ids=target_ids, weights=weights, **self.asked)


class FusedSparseKD(_Loss):
    """`fused_sparse_kd_loss` as a module; the projection is the model's, given at every step.

    Under FSDP2 its weight must be whole when this is called: call it inside the module that owns the projection, so that its
    hooks have gathered it.
    """

    def forward(
        self,
        hidden_PH: Tensor,
        projection: Tensor | Projection,
        teacher: SoftTargets[Tensor] | None,
        *,
        target_ids: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        """The loss."""
        return fused_sparse_kd_loss(hidden_PH, projection, teacher, target_ids=target_ids, weights=weights, **self.asked)
