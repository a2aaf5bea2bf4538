"""Exact distillation over the whole vocabulary: the teacher's distribution is made again of its last states, chunk by chunk.

A cache that holds the teacher's last hidden states and, once, its output projection holds every distribution whole. Per chunk
of positions the teacher's logits go into one buffer, the student's into another, and the gradient then takes the student's
buffer: (P, V) never exists, and one matrix product is added to the three of the fused loss. This is the ceiling that every
record of some entries is compared with. Definition: `dense_reference`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kdcache.errors import LossError
from kdcache.kernels import divergences as d
from kdcache.loss.chunks import Product
from kdcache.loss.fused import PLAIN_HEAD, Projection, check_projection, run_fused
from kdcache.loss.prepare import position_scales
from kdcache.loss.states.dense_steps import DenseStep

# Those that are a sum over ids: the others ask which buckets are the support.
OVER_IDS = (
    d.ForwardKL, d.ReverseKL, d.JensenShannon, d.SkewKL, d.SkewReverseKL, d.TotalVariation, d.Hellinger, d.AlphaBeta,
)  # fmt: skip

# A whole distribution has no rounded tail: only what underflows has to be kept from an infinite logarithm.
SMALLEST_MASS = 1e-30


@dataclass(frozen=True, slots=True, eq=False)
class TeacherStates:
    """The teacher's last states at P positions, and what makes its logits of them. No gradient flows into either.

    Attributes:
        hidden_PH: (P, H) after the final norm, as the projection takes them; of a low rank: their coordinates.
        projection: of the teacher: weight (V, H), bias and head. `low_rank` makes that of coordinates. Half precision of one
            dtype with the states is multiplied as it is; anything else in float32. Logits are float32 in any case.
    """

    hidden_PH: Tensor
    projection: Projection

    def product(self, num_ids: int) -> Product:
        """What makes the logits of the first `num_ids` ids, or of all where the teacher has fewer."""
        hidden_PH, (weight_VH, bias_V) = self.hidden_PH.detach(), self.projection.without_padding()
        if hidden_PH.dtype != weight_VH.dtype:
            hidden_PH, weight_VH = hidden_PH.float(), weight_VH.float()
        weight_VH, bias_V = weight_VH[:num_ids].detach(), None if bias_V is None else bias_V[:num_ids].detach()
        head = replace(self.projection.head or PLAIN_HEAD, float32_logits=True)
        # Logits are float32, and so may be the bias: that of a low rank holds the mean's logits, too large for half precision.
        dtype = torch.promote_types(hidden_PH.dtype, torch.float32)
        return Product(hidden_PH, weight_VH, None if bias_V is None else bias_V.to(dtype), head)


def low_rank(projection: Projection, basis: Tensor, mean_H: Tensor | None = None) -> Projection:
    """The projection that takes coordinates, where hidden = coordinates @ basis + mean.

    Its product is as much cheaper as its rank is less than H.

    Args:
        projection: takes whole states.
        basis: (rank, H), one direction a line.
        mean_H: (H,); None for 0.
    """
    weight_VH, bias_V = projection.without_padding()
    dtype = torch.promote_types(weight_VH.dtype, torch.float32)
    bias_V = None if bias_V is None else bias_V.to(dtype)
    if mean_H is not None:
        shift_V = weight_VH.to(dtype) @ mean_H.to(dtype)
        bias_V = shift_V if bias_V is None else bias_V + shift_V
    head = None if projection.head is None else replace(projection.head, vocab_size=None)
    return Projection(weight_VH.to(dtype) @ basis.to(dtype).T, bias_V, head, projection.chunk_positions)


def exact_kd_loss(
    hidden_PH: Tensor,
    projection: Tensor | Projection,
    teacher: TeacherStates,
    *,
    divergence: str | d.Divergence = "forward_kl",
    temperature: float = 1.0,
    weights: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """T^2 times a divergence of whole distributions, teacher's and student's, both at temperature T.

    Gradients are computed in the forward pass, for those of the student's hidden states, weight and bias that require one,
    and can be differentiated once. Ids beyond the student's are padding of the teacher and are left out, as if they did not
    exist; ids beyond the teacher's get probability 0 (`Projection.head.vocab_size` leaves them out too).

    Args:
        hidden_PH: (P, H) the student's last hidden states.
        projection: the student's: its weight, or a Projection that says more.
        teacher: at the same positions.
        divergence: one that is a sum over ids, by name or made. By name, a `floor` is 1e-30: every mass is known here.
        temperature: of both; any number above 0, without any normaliser of the record.
        weights: (P,) >= 0; None for 1. At positions of weight 0 the teacher's numbers may be any, the student's have
            to be finite.
        reduction: `mean`, sum(weight * loss) / sum(weight) and 0 where nothing counts, or `sum`.

    Returns:
        A scalar; float64 for float64 hidden states, else float32.

    Raises:
        LossError: an argument is impossible or does not fit the others.
    """
    if reduction not in ("mean", "sum"):
        raise LossError(f"reduction is {reduction!r}, but must be 'mean' or 'sum': the gradients are summed over positions")
    scales_P = position_scales(hidden_PH, weights, reduction)
    projection = projection if isinstance(projection, Projection) else Projection(projection)
    product = student_product(hidden_PH, projection)
    check_teacher(hidden_PH, teacher)
    check_temperature(temperature)
    step = DenseStep(teacher.product(len(product.weight_VH)), whole_divergence(divergence), float(temperature), scales_P)
    return run_fused(product, step, projection.chunk_positions or 0)


def whole_divergence(name: str | d.Divergence, **options: float) -> d.Divergence:
    """The divergence, for whole distributions.

    Raises:
        LossError: unknown, a wrong option, or one that is not a sum over ids.
    """
    known = ", ".join(repr(kind.name) for kind in OVER_IDS)
    kind = d.find_kind(name) if isinstance(name, str) else type(name)
    if kind not in OVER_IDS:
        raise LossError(
            f"divergence is {kind.name!r}, which asks for a support and its tail; between whole distributions there are {known}"
        )
    if isinstance(name, str) and "floor" in kind.__match_args__:
        options = {"floor": SMALLEST_MASS} | options
    return d.get_divergence(name, **options)


def student_product(hidden_PH: Tensor, projection: Projection) -> Product:
    """The student's logits, of the ids that exist; raises LossError where the tensors do not fit."""
    check_projection(hidden_PH, projection.weight_VH, projection.bias_V)
    return Product(hidden_PH, *projection.without_padding(), projection.head or PLAIN_HEAD)


def check_temperature(temperature: float) -> None:
    """Raise LossError unless it is above 0."""
    if not temperature > 0:
        raise LossError(f"temperature is {temperature!r}, but must be above 0")


def check_teacher(hidden_PH: Tensor, teacher: TeacherStates) -> None:
    """Raise LossError unless a teacher's states stand at a student's positions and fit their own projection."""
    states_PH, weight_VH = teacher.hidden_PH, teacher.projection.weight_VH
    if states_PH.ndim != 2 or weight_VH.ndim != 2 or states_PH.shape[1] != weight_VH.shape[1]:
        raise LossError(
            f"the teacher's states {tuple(states_PH.shape)} and its output projection {tuple(weight_VH.shape)} must be "
            "(positions, hidden) and (vocabulary, hidden) with the same hidden size; states of a low rank need "
            "kdcache.loss.states.exact_kl.low_rank(projection, basis, mean)"
        )
    if len(states_PH) != len(hidden_PH):
        raise LossError(
            f"the teacher has states at {len(states_PH)} positions, but the student at {len(hidden_PH)}: a feature with "
            "positions 'supervised', without stride and pooling, has one at each"
        )
    if states_PH.device != hidden_PH.device or weight_VH.device != hidden_PH.device:
        raise LossError(
            f"the teacher's states are on {states_PH.device} and its projection on {weight_VH.device}, but the student is on "
            f"{hidden_PH.device}; move them there"
        )
