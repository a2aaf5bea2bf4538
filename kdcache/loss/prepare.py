"""What every loss does first: refuse what would be wrong, choose how the teacher is read, and bring all of it into one form."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kdcache.errors import LossError
from kdcache.format.soft_targets import SoftTargets
from kdcache.kernels.base import PADDING_ID, Objective
from kdcache.kernels.divergences import DIVERGENCES, MEASURES, Divergence, ForwardKL, get_divergence
from kdcache.loss.divergence_sum import DivergenceSum, WeightedDivergence
from kdcache.loss.prepared import Prepared, ReadPart, alone, check_ranges, with_common_columns
from kdcache.loss.selection_rules import reading_for
from kdcache.loss.support import with_target

REDUCTIONS = ("mean", "sum", "none")
BACKENDS = ("auto", "numba", "triton", "torch")

# Rounding of float32 logprobs adds far less than this to the mass of a support.
_LARGEST_MASS = 1.0 + 1e-3


@dataclass(frozen=True, slots=True)
class LossSettings:
    """What a loss is rarely asked for; the defaults are right for every cache.

    Attributes:
        tail: `drop`, `renormalize`, `bucket` or `uniform`: what the divergence does with the teacher's mass outside the
            entries; see `kdcache.kernels.reference`. None for the best one known for the selection and the divergence.
        entries: which entries are read: `exact`, or `unbiased` for all of a random selection, whose gradients are then
            unbiased. The value of such a loss is not: sum p log p is not linear in p, so it is too high by a number that does
            not depend on the student. None for the best that the selection and the tail allow.
        reduction: `mean` is sum(weight * loss) / sum(weight), 0 where all weights are 0; `sum` is sum(weight * loss); `none`
            gives (P,) weight * loss, which the fused loss cannot.
        backend: `numba` (CPU, float32 and bfloat16), `triton` (a GPU; tested in Triton's interpreter only so far, and so not
            what `auto` takes), `torch` (anything; over given logits differentiable twice, and by torch.func), or `auto`.
    """

    tail: str | None = None
    entries: str | None = None
    reduction: str = "mean"
    backend: str = "auto"


DEFAULT = LossSettings()


@dataclass(frozen=True, slots=True)
class Asked:
    """The function that a caller asks for, before it is known whether the teacher allows it."""

    divergence: str | Divergence | DivergenceSum
    alpha: float
    temperature: float
    settings: LossSettings


def prepare(
    student: Tensor,
    teacher: SoftTargets[Tensor] | None,
    asked: Asked,
    per_position: tuple[Tensor | None, Tensor | None],
    vocab_size: int,
) -> Prepared:
    """Check a loss's arguments and resolve its defaults.

    Args:
        student: logits or hidden states, one line per position.
        teacher: may be None where alpha is 0.
        asked: the function.
        per_position: target ids and weights.
        vocab_size: number of ids of the student.

    Raises:
        LossError: an argument is impossible, does not fit the others, or would make a wrong loss.
    """
    (target_ids_P, weights_P), settings = per_position, asked.settings
    _check_settings(settings)
    total, share = _total(asked)
    has_share = isinstance(share, Tensor) or share > 0
    if has_share and target_ids_P is None:
        what = f"alpha is {asked.alpha!r}" if total is None else f"cross_entropy is {share!r}"
        raise LossError(
            f"{what}, which mixes in the cross entropy of the target ids, but target_ids is missing; pass "
            f"target_ids=batch.target_ids_P, or {'alpha=1.0' if total is None else 'cross_entropy=0.0'}"
        )
    _check_tensors(student, {"target_ids": target_ids_P, "weights": weights_P})
    if isinstance(share, Tensor):
        _check_tensors(student, {"the weight of the cross entropy": share})
    scales_P = position_scales(student, weights_P, settings.reduction)
    shared = (target_ids_P, weights_P, scales_P)
    if asked.alpha == 0 and total is None:
        backend = choose_backend(settings.backend, student, ForwardKL())
        return alone(_no_entries(student), Objective(alpha=0.0), shared, backend)
    asked_parts = [_alone(asked)] if total is None else [*total.parts, *(part for _, part in total.watched())]
    teacher = _checked_teacher(teacher, asked.alpha, vocab_size)
    _check_entries(student, teacher)
    if total is not None:
        _check_weights(student, total)
    read = [_read(teacher, part, asked, target_ids_P) for part in asked_parts]
    backend = _common_backend([choose_backend(settings.backend, student, part.objective.divergence) for part in read])
    return _by_temperature(read, share, shared, (backend, 0 if total is None else len(read)))


def _check_settings(settings: LossSettings) -> None:
    for name, value, known in (
        ("reduction", settings.reduction, REDUCTIONS),
        ("backend", settings.backend, BACKENDS),
    ):
        if value not in known:
            raise LossError(f"{name} is {value!r}, but must be one of {', '.join(map(repr, known))}")


def _total(asked: Asked) -> tuple[DivergenceSum | None, float | Tensor]:
    """The sum, if one is asked for, and what the cross entropy counts."""
    if not isinstance(asked.divergence, DivergenceSum):
        return None, 1.0 - asked.alpha
    settings = asked.settings
    if asked.alpha != 1:
        raise LossError(
            f"alpha is {asked.alpha!r}, but a DivergenceSum has weights of its own: leave alpha out, and give the weight of "
            "the cross entropy as DivergenceSum(parts, cross_entropy=...)"
        )
    if settings.tail is not None or settings.entries is not None:
        name = "entries" if settings.tail is None else "tail"
        raise LossError(
            f"settings.{name} is given, but each part of a DivergenceSum has its own: WeightedDivergence({name}=...)"
        )
    return asked.divergence, asked.divergence.cross_entropy


def _alone(asked: Asked) -> WeightedDivergence:
    assert not isinstance(asked.divergence, DivergenceSum)
    return WeightedDivergence(asked.divergence, asked.alpha, asked.settings.tail, asked.settings.entries)


def _check_weights(student: Tensor, total: DivergenceSum) -> None:
    for index, part in enumerate(total.parts):
        tensors = {f"the weight of part {index}": part.weight if isinstance(part.weight, Tensor) else None}
        _check_tensors(student, tensors)


def _read(teacher: SoftTargets[Tensor], part: WeightedDivergence, asked: Asked, target_ids_P: Tensor | None) -> ReadPart:
    """A divergence, and the teacher as it reads it."""
    divergence = get_divergence(part.divergence)
    temperature = float(asked.temperature if part.temperature is None else part.temperature)
    for name, option_P in divergence.arrays.items():
        _check_tensors(teacher.tail_mass_P, {f"{divergence.name}'s {name}": option_P})
    reading = reading_for(teacher.origin, divergence, tail=part.tail, entries=part.entries, temperature=temperature)
    # An alpha that is impossible is refused here.
    alpha = asked.alpha if not isinstance(asked.divergence, DivergenceSum) else 1.0
    objective = replace(Objective(reading.tail, alpha, divergence, temperature), alpha=1.0)
    if divergence.requirements.target:
        if target_ids_P is None:
            raise LossError(f"{divergence.name} needs the target ids, but target_ids is missing; pass batch.target_ids_P")
        read = with_target(teacher, target_ids_P)
    else:
        read = _entries_read(teacher, objective, reading.entries)
    return ReadPart(at_temperature(read, temperature), objective, part.weight)


def _common_backend(backends: list[str]) -> str:
    """One for all parts: torch where one of them has no other."""
    return backends[0] if len(set(backends)) == 1 else "torch"


def _by_temperature(
    read: list[ReadPart],
    share: float | Tensor,
    shared: tuple[Tensor | None, Tensor | None, Tensor],
    rest: tuple[str, int],
) -> Prepared:
    """Parts of one temperature go together; the cross entropy with the first."""
    backend, num_values = rest
    groups: dict[float, list[int]] = {}
    for index, part in enumerate(read):
        groups.setdefault(part.objective.temperature, []).append(index)
    prepared: list[Prepared] = []
    for temperature, columns in groups.items():
        parts, ids_PK = with_common_columns([read[index] for index in columns])
        share_here = 0.0 if prepared else share
        made = Prepared(parts, ids_PK, temperature, share_here, *shared, backend, tuple(columns), num_values)
        prepared.append(made)
    return replace(prepared[0], further=tuple(prepared[1:]))


def _checked_teacher(teacher: SoftTargets[Tensor] | None, alpha: float, vocab_size: int) -> SoftTargets[Tensor]:
    if teacher is None:
        raise LossError(f"teacher is None, but alpha is {alpha!r}; pass teacher=batch.teacher, or alpha=0.0")
    if not isinstance(teacher, SoftTargets):
        raise LossError(
            f"teacher is of type {type(teacher).__name__}, but must be SoftTargets: pass batch.teacher, or "
            "SoftTargets.of(token_ids, logprobs, tail_mass, entries=...)"
        )
    if not isinstance(teacher.token_ids_PK, Tensor):
        raise LossError(
            f"the teacher's arrays are of type {type(teacher.token_ids_PK).__name__}, but must be tensors: take batches from a "
            "kdcache.TorchLoader, or pass teacher.map(torch.from_numpy)"
        )
    if teacher.vocab_size is not None and teacher.vocab_size > vocab_size:
        raise LossError(
            f"the teacher has {teacher.vocab_size} ids, but the student only {vocab_size}: it cannot learn those beyond; if "
            f"they are padding that no token uses, pass kdcache.loss.padding.entries_within(teacher, {vocab_size}).teacher"
        )
    return teacher


def _entries_read(teacher: SoftTargets[Tensor], objective: Objective, entries: str) -> SoftTargets[Tensor]:
    """Estimates become padding where only exact entries are read; num_exact_P is kept where the divergence needs it."""
    if objective.divergence.requirements.tail_sample or teacher.num_exact_P is None:
        return teacher
    ids_PK = teacher.token_ids_PK
    if entries == "exact":
        columns_K = torch.arange(ids_PK.shape[1], device=ids_PK.device)
        ids_PK = ids_PK.masked_fill(columns_K >= teacher.num_exact_P[:, None], PADDING_ID)
    return replace(teacher, token_ids_PK=ids_PK, entries=entries, num_exact_P=None)


def at_temperature(teacher: SoftTargets[Tensor], temperature: float) -> SoftTargets[Tensor]:
    """The teacher at temperature T: logprob / T - log_z, and the tail's mass is what is then missing to 1.

    Raises:
        LossError: log_z of T was not captured, or it is that of another temperature (looked at on a CPU only).
    """
    if temperature == 1:
        return teacher
    log_z_P = teacher.log_z_at(temperature)
    stored_PK = teacher.token_ids_PK >= 0
    logprobs_PK = teacher.logprobs_PK.detach().double() / temperature - log_z_P.detach().double()[:, None]
    logprobs_PK = logprobs_PK.masked_fill(~stored_PK, -torch.inf)
    mass_P = logprobs_PK.exp().sum(dim=1)
    if _can_look_at(mass_P) and not bool((mass_P <= _LARGEST_MASS).all()):
        position = int((~(mass_P <= _LARGEST_MASS)).int().argmax())
        raise LossError(
            f"position {position} has the mass {mass_P[position].item():.6g} in its entries at temperature {temperature!r}; "
            "log_z must be logsumexp(logprobs / temperature) over the whole vocabulary, for this temperature"
        )
    tail_mass_P = (1 - mass_P).clamp(0, 1).float()
    return replace(teacher, logprobs_PK=logprobs_PK.clamp_max(0).float(), tail_mass_P=tail_mass_P)


def _check_entries(student: Tensor, teacher: SoftTargets[Tensor]) -> None:
    """Raise LossError unless shapes and devices fit; looks at no values."""
    num_positions, ids_shape = len(student), tuple(teacher.token_ids_PK.shape)
    if len(ids_shape) != 2 or ids_shape[0] != num_positions:
        raise LossError(
            f"token_ids_PK has the shape {ids_shape}, but {num_positions} positions of the student need ({num_positions}, "
            "entries): take logits.flatten(0, 1)[batch.flat_positions_P]"
        )
    _check_tensors(student, {"token_ids_PK": teacher.token_ids_PK, "logprobs_PK": teacher.logprobs_PK}, ids_shape)
    _check_tensors(student, {"tail_mass_P": teacher.tail_mass_P, "num_exact_P": teacher.num_exact_P})
    log_z_PL = teacher.log_z_PL
    if log_z_PL is not None:
        _check_tensors(student, {"log_z_PL": log_z_PL}, (num_positions, len(teacher.temperatures)))


def _check_tensors(student: Tensor, tensors: dict[str, Tensor | None], shape: tuple[int, ...] | None = None) -> None:
    shape = shape or (len(student),)
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise LossError(f"{name} has the shape {tuple(tensor.shape)}, but must have {shape}")
        if tensor.device != student.device:
            raise LossError(f"{name} is on {tensor.device}, but the student is on {student.device}; move it there")
        is_integer = not tensor.is_floating_point() and tensor.dtype != torch.bool
        if name in ("token_ids_PK", "target_ids", "num_exact_P") and not is_integer:
            raise LossError(f"{name} has the dtype {tensor.dtype}, but must hold integers")


def is_transformed() -> bool:
    """Whether torch.func (grad, vmap, jvp, ...) is at work: its tensors have no memory that a kernel or NumPy could look at."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def refuse_transform(advice: str) -> None:
    """Raise LossError under torch.func, which cannot see into a kernel."""
    if is_transformed():
        raise LossError(
            f"torch.func cannot see into this loss, whose gradient is made by kernels in the forward pass; {advice}"
        )


def choose_backend(backend: str, student: Tensor, divergence: Divergence) -> str:
    """`numba`, `triton` or `torch`.

    Raises:
        LossError: one was asked for by name, and cannot take this device or dtype.
    """
    fits = student.device.type == "cpu" and student.dtype in (
        torch.float32,
        torch.bfloat16,
    )
    is_compilable = type(divergence).for_numba is not None or divergence.name in DIVERGENCES | MEASURES
    if backend == "numba" and fits and not is_compilable:
        raise LossError(f"{divergence.name} has no form for the numba backend; use 'torch', or 'auto'")
    if backend == "numba" and not fits:
        raise LossError(
            f"the numba backend takes float32 or bfloat16 on a CPU, not {student.dtype} on {student.device}; use 'torch'"
        )
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    half_or_single = student.dtype in (torch.float32, torch.bfloat16, torch.float16)
    if backend == "triton" and not (half_or_single and (student.is_cuda or is_interpreted)):
        raise LossError(
            f"the triton backend takes float32, bfloat16 or float16 on a GPU, not {student.dtype} on {student.device}; use "
            "'numba' or 'torch'"
        )
    if backend == "auto":
        return "numba" if fits and is_compilable else "torch"
    return backend


def check_values(ready: Prepared, vocab_size: int) -> None:
    """Raise LossError for ids outside the vocabulary and the like; only on a CPU, where looking does not wait for a device."""
    if _can_look_at(ready.token_ids_PK):
        for one in (ready, *ready.further):
            check_ranges(one, vocab_size)


def _can_look_at(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and not is_transformed()


def position_scales(student: Tensor, weights_P: Tensor | None, reduction: str) -> Tensor:
    """(P,) float64: what each position's loss is multiplied by before the sum, or by itself for `none`.

    `mean` is sum(weight * loss) / sum(weight), so that positions of weight 0 do not count; 0, not NaN, where nothing counts.
    """
    if weights_P is None:
        weights_P = torch.ones(len(student), dtype=torch.float64, device=student.device)
    else:
        weights_P = weights_P.detach().to(torch.float64)
    if reduction != "mean":
        return weights_P
    total = weights_P.sum()
    return weights_P / torch.where(total > 0, total, 1.0)


def _no_entries(student: Tensor) -> SoftTargets[Tensor]:
    """For alpha 0: the teacher is not read."""
    options: dict[str, Any] = {"device": student.device, "dtype": torch.float32}
    empty_PK = torch.empty((len(student), 0), **options)
    return SoftTargets(empty_PK.to(torch.int32), empty_PK, torch.ones(len(student), **options), "exact")
