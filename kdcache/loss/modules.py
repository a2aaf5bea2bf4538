"""The losses as modules: options said once, tensors at every step.

Shape letters: P positions (rows), K entries per position (padded), V the student's vocabulary, H hidden.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from kdcache.loss.fused import fused_sparse_kd_loss
from kdcache.loss.sparse_kd import sparse_kd_loss


class SparseKD(nn.Module):
    """`sparse_kd_loss` with its options given once; it has no parameters of its own.

    Args:
        options: those keyword arguments of `sparse_kd_loss` that are not tensors.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(
        self,
        student_logits_PV: Tensor,
        token_ids_PK: Tensor,
        logprobs_PK: Tensor,
        tail_mass_P: Tensor,
        **tensors: Any,
    ) -> Tensor:
        """The loss; `tensors` are target_ids_P, weights_P, num_exact_P and log_z_P."""
        return sparse_kd_loss(student_logits_PV, token_ids_PK, logprobs_PK, tail_mass_P, **self.options, **tensors)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class FusedSparseKD(nn.Module):
    """`fused_sparse_kd_loss` with its options given once; the projection's weight is the model's, given at every step.

    Under FSDP2 the weight must be whole when this is called: call it inside the module that owns the projection, so that its
    hooks have gathered it.

    Args:
        options: those keyword arguments of `fused_sparse_kd_loss` that are not tensors.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(
        self,
        hidden_PH: Tensor,
        weight_VH: Tensor,
        token_ids_PK: Tensor | None = None,
        logprobs_PK: Tensor | None = None,
        tail_mass_P: Tensor | None = None,
        **tensors: Any,
    ) -> Tensor:
        """The loss; `tensors` are bias, target_ids_P, weights_P, num_exact_P and log_z_P."""
        teacher = (token_ids_PK, logprobs_PK, tail_mass_P)
        return fused_sparse_kd_loss(hidden_PH, weight_VH, *teacher, **self.options, **tensors)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
