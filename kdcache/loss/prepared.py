"""What every loss is given in the end: constants, checked and in one form, for all backends."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from kdcache.errors import LossError
from kdcache.format.soft_targets import SoftTargets
from kdcache.kernels.base import PADDING_ID, KernelInputs, Objective, Summand, make_kernel_inputs


@dataclass(frozen=True, slots=True, eq=False)
class ReadPart:
    """One divergence, and the teacher as it reads it.

    Attributes:
        teacher: at the objective's temperature, with those entries alone that the divergence reads. It has num_exact_P only
            where the divergence tells exact entries from estimates.
        objective: divergence, tail policy and temperature; its alpha is 1. Options of the divergence may be (P,).
        factor: what the losses count, alpha included: a number, or (P,).
        is_whole: whether it reads every entry that any part reads.
    """

    teacher: SoftTargets[Tensor]
    objective: Objective
    factor: float | Tensor
    is_whole: bool = True

    def slice(self, start: int, stop: int) -> ReadPart:
        """Views of positions start..stop."""
        divergence = self.objective.divergence.map(lambda option_P: option_P[start:stop])
        objective = (
            self.objective if divergence is self.objective.divergence else replace(self.objective, divergence=divergence)
        )
        return ReadPart(self.teacher.slice(start, stop), objective, sliced(self.factor, start, stop), self.is_whole)


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """What P positions of the student are compared with, and how; constants, no gradient flows into them.

    Attributes:
        parts: the divergences at one temperature; none for the cross entropy alone.
        token_ids_PK: the ids of all parts' entries: in each column a part has this id, or -1, and then what it does not read is
            in its tail.
        temperature: of the parts.
        target_share: what the cross entropy of the target ids counts: a number, or (P,).
        target_ids_P: (P,) integers, NO_TARGET where there is none; None for none at all.
        weights_P: (P,) >= 0; None for 1 everywhere.
        scales_P: (P,) float64, what each position's loss is multiplied by; see `position_scales`.
        backend: `numba`, `triton` or `torch`.
        columns: each part's column among the values of all parts.
        num_values: how many parts there are at all temperatures; 0 where their values are not asked for.
        further: the parts at other temperatures, without a cross entropy.
    """

    parts: tuple[ReadPart, ...]
    token_ids_PK: Tensor
    temperature: float
    target_share: float | Tensor
    target_ids_P: Tensor | None
    weights_P: Tensor | None
    scales_P: Tensor
    backend: str
    columns: tuple[int, ...] = (0,)
    num_values: int = 0
    further: tuple[Prepared, ...] = ()

    @property
    def has_target_share(self) -> bool:
        """Whether target ids may count."""
        is_asked = isinstance(self.target_share, Tensor) or self.target_share > 0
        return is_asked and self.target_ids_P is not None

    @property
    def is_uniform(self) -> bool:
        """Whether a part spreads the tail's mass."""
        return any(part.objective.tail == "uniform" for part in self.parts)

    def slice(self, start: int, stop: int) -> Prepared:
        """Views of positions start..stop, without `further`."""
        part = slice(start, stop)
        return replace(
            self,
            parts=tuple(one.slice(start, stop) for one in self.parts),
            token_ids_PK=self.token_ids_PK[part],
            target_share=sliced(self.target_share, start, stop),
            target_ids_P=None if self.target_ids_P is None else self.target_ids_P[part],
            weights_P=None if self.weights_P is None else self.weights_P[part],
            scales_P=self.scales_P[part],
            further=(),
        )

    def spread(self, values_PD1: Tensor) -> Tensor:
        """(P, num_values + 1) of the values of these parts and the cross entropy's: 0 for parts at other temperatures.

        Times its weight where that differs by position: else a mean would be over positions that do not count in it.
        """
        weights = (*(part.factor for part in self.parts), self.target_share)
        own = [
            values_P * w.detach() if isinstance(w, Tensor) else values_P
            for w, values_P in zip(weights, values_PD1.T, strict=True)
        ]
        all_PD1 = values_PD1.new_zeros(len(values_PD1), self.num_values + 1)
        all_PD1[:, [*self.columns, self.num_values]] = torch.stack(own, dim=1)
        return all_PD1


def alone(
    teacher: SoftTargets[Tensor], objective: Objective, shared: tuple[Tensor | None, Tensor | None, Tensor], backend: str
) -> Prepared:
    """One divergence, its alpha included; `shared` are target ids, weights and scales."""
    parts = (ReadPart(teacher, replace(objective, alpha=1.0), objective.alpha),) if objective.alpha > 0 else ()
    ids_PK, columns = teacher.token_ids_PK, tuple(range(len(parts)))
    return Prepared(parts, ids_PK, objective.temperature, 1.0 - objective.alpha, *shared, backend, columns)


def sliced(values: float | Tensor, start: int, stop: int) -> float | Tensor:
    """Positions start..stop of what may be one number for all."""
    return values[start:stop] if isinstance(values, Tensor) else values


def with_common_columns(parts: list[ReadPart]) -> tuple[tuple[ReadPart, ...], Tensor]:
    """The parts with as many columns each, and the ids of all: what one does not read is -1 there."""
    width = max(part.teacher.token_ids_PK.shape[1] for part in parts)
    parts = [replace(part, teacher=_padded(part.teacher, width)) for part in parts]
    ids_PK = parts[0].teacher.token_ids_PK
    for part in parts[1:]:
        if part.teacher.token_ids_PK is not ids_PK:
            ids_PK = torch.maximum(ids_PK, part.teacher.token_ids_PK)
    return tuple(replace(part, is_whole=part.teacher.token_ids_PK is ids_PK) for part in parts), ids_PK


def _padded(teacher: SoftTargets[Tensor], width: int) -> SoftTargets[Tensor]:
    missing = width - teacher.token_ids_PK.shape[1]
    if missing == 0:
        return teacher
    pad = torch.nn.functional.pad
    ids_PK, logprobs_PK = teacher.token_ids_PK, teacher.logprobs_PK
    return replace(
        teacher,
        token_ids_PK=pad(ids_PK, (0, missing), value=PADDING_ID),
        logprobs_PK=pad(logprobs_PK, (0, missing), value=-torch.inf),
    )


def to_summands(ready: Prepared, vocab_size: int) -> list[Summand]:
    """The kernels' form of CPU tensors, with the scales for the weights; the cross entropy comes last.

    Raises:
        LossError: as `make_kernel_inputs`, and a divergence's option outside its range.
    """
    scales_P = np.require(_to_numpy(ready.scales_P), np.float64, ["C", "W"])
    checked = check_ranges(ready, vocab_size)
    summands = [
        Summand(
            replace(inputs, weights_P=scales_P),
            replace(part.objective, divergence=part.objective.divergence.map(_to_float64)),
            _to_float64(part.factor) if isinstance(part.factor, Tensor) else np.full(len(scales_P), float(part.factor)),
        )
        for inputs, part in zip(checked, ready.parts, strict=False)
    ]
    share = ready.target_share
    share_P = _to_float64(share) if isinstance(share, Tensor) else np.full(len(scales_P), float(share))
    if not ready.has_target_share:
        share_P = np.zeros(len(scales_P))
    objective = Objective(alpha=0.0, temperature=ready.temperature)
    return [*summands, Summand(replace(checked[0], weights_P=scales_P), objective, share_P)]


def check_ranges(ready: Prepared, vocab_size: int) -> list[KernelInputs]:
    """Each part's kernel inputs, at least one, of CPU tensors.

    Raises:
        LossError: ids outside the vocabulary and the like.
    """
    inputs = _to_checked(ready, vocab_size)
    for part in ready.parts:
        part.objective.divergence.map(_to_float64)
    for weight in (*(part.factor for part in ready.parts), ready.target_share):
        if isinstance(weight, Tensor):
            check_weight(weight)
    return inputs


def check_weight(weights_P: Tensor) -> None:
    """Raise LossError where a weight of a divergence or of the cross entropy is below 0 or not finite."""
    wrong_P = ~((weights_P >= 0) & (weights_P < torch.inf))
    if bool(wrong_P.any()):
        position = int(wrong_P.int().argmax())
        raise LossError(
            f"position {position} has the weight {weights_P[position].item()!r} in a DivergenceSum, but weights must be finite "
            "and at least 0"
        )


def _to_checked(ready: Prepared, vocab_size: int) -> list[KernelInputs]:
    """For each part, at least one."""
    target_ids_P = None if ready.target_ids_P is None else _to_numpy(ready.target_ids_P)
    weights_P = None if ready.weights_P is None else _to_numpy(ready.weights_P)
    teachers = [part.teacher for part in ready.parts]
    if not teachers:
        empty_PK = ready.token_ids_PK.new_empty((len(ready.scales_P), 0), dtype=torch.float32)
        teachers = [SoftTargets(ready.token_ids_PK[:, :0], empty_PK, torch.ones(len(ready.scales_P)), "exact")]
    made: dict[int, KernelInputs] = {}
    for teacher in teachers:
        if id(teacher) not in made:
            made[id(teacher)] = make_kernel_inputs(
                _to_numpy(teacher.token_ids_PK),
                _to_numpy(teacher.logprobs_PK),
                _to_numpy(teacher.tail_mass_P),
                vocab_size=vocab_size,
                target_ids_P=target_ids_P,
                weights_P=weights_P,
                num_exact_P=None if teacher.num_exact_P is None else _to_numpy(teacher.num_exact_P),
            )
    return [made[id(teacher)] for teacher in teachers]


def _to_numpy(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _to_float64(tensor: Tensor) -> np.ndarray:
    return np.require(_to_numpy(tensor), np.float64, ["C"])
