"""Losses of a student's vectors against the teacher's of the same size, one number for each vector."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from kdcache.errors import LossError

_SMALLEST = 1e-12
"""Norms below are taken for this: a vector of zeros has no direction, and gets no gradient beyond any bound."""


def vector_loss(name: str, student_FH: Tensor, teacher_FH: Tensor) -> Tensor:
    """(F,) the loss `name` of each of the student's vectors, in float32 or float64.

    Args:
        name: `cosine`, 1 - cos; `mse`, the mean over elements; `relative_mse`, as a share of the teacher's mean square;
            `normalized_mse`, the sum over elements where both have length 1.
        student_FH: (F, H), any floating dtype.
        teacher_FH: (F, H); gets no gradient.

    Raises:
        LossError: another name, or sizes that differ.
    """
    if name not in VECTOR_LOSSES:
        raise LossError(f"the loss of hidden states is {name!r}, but must be one of {', '.join(VECTOR_LOSSES)}")
    if student_FH.shape != teacher_FH.shape:
        raise LossError(
            f"the student's vectors are {tuple(student_FH.shape)} and the teacher's {tuple(teacher_FH.shape)}; vectors of "
            "another size need a projector (`projector: linear`)"
        )
    return VECTOR_LOSSES[name](widened(student_FH), widened(teacher_FH.detach()))


def widened(values: Tensor) -> Tensor:
    """In float32, or in float64 where they are: losses are not computed in half precision."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def zero_of(*tensors: Tensor) -> Tensor:
    """A float32 0 on the graph of all of these, which get gradients of 0; their numbers are not read, as 0 * NaN is NaN."""
    return torch.stack([tensor[None][:0].sum(dtype=torch.float32) for tensor in tensors]).sum()


def full_precision(values: Tensor) -> torch.autocast:
    """A context in which products are made in their operands' dtype, whatever autocast a trainer has chosen."""
    return torch.autocast(values.device.type, enabled=False)


def _cosine(student_FH: Tensor, teacher_FH: Tensor) -> Tensor:
    return 1 - functional.cosine_similarity(student_FH, teacher_FH.to(student_FH.dtype), dim=1, eps=_SMALLEST)


def _mse(student_FH: Tensor, teacher_FH: Tensor) -> Tensor:
    return (student_FH - teacher_FH).square().mean(dim=1)


def _relative_mse(student_FH: Tensor, teacher_FH: Tensor) -> Tensor:
    return (student_FH - teacher_FH).square().sum(dim=1) / teacher_FH.square().sum(dim=1).clamp_min(_SMALLEST)


def _normalized_mse(student_FH: Tensor, teacher_FH: Tensor) -> Tensor:
    student_FH, teacher_FH = (functional.normalize(values, dim=1, eps=_SMALLEST) for values in (student_FH, teacher_FH))
    return (student_FH - teacher_FH).square().sum(dim=1)


VECTOR_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cosine": _cosine,
    "mse": _mse,
    "relative_mse": _relative_mse,
    "normalized_mse": _normalized_mse,
}
"""name -> the loss of each vector."""
