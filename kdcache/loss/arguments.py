"""What the losses are called with, checked in one place and brought into the form that the backends take.

Shape letters: P positions (rows), K entries per position (padded), V the student's vocabulary.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from kdcache.errors import LossError
from kdcache.kernels.base import PADDING_ID, Objective, Targets, make_targets

REDUCTIONS = ("mean", "sum", "none")
BACKENDS = ("auto", "numba", "triton", "torch")
TARGET_KINDS = ("exact", "unbiased")

# Rounding of float32 logprobs adds far less than this to the mass of a support.
_LARGEST_MASS = 1.0 + 1e-3


@dataclass(frozen=True, slots=True, eq=False)
class TargetTensors:
    """What the rows are compared with, as the caller gave it: constants, no gradient flows into them.

    Attributes:
        token_ids_PK: (P, K) integers, -1 where there is no entry.
        logprobs_PK: (P, K) nats, in any float type: all backends compute with the float32 or float64 of it.
        tail_mass_P: (P,) in [0, 1].
        target_ids_P: (P,) integers, -100 where there is none; None for none at all.
        weights_P: (P,) >= 0; None for 1 everywhere.
        num_exact_P: (P,) integers: the columns before it hold exact entries, the others estimates; None where all are alike.
    """

    token_ids_PK: Tensor
    logprobs_PK: Tensor
    tail_mass_P: Tensor
    target_ids_P: Tensor | None = None
    weights_P: Tensor | None = None
    num_exact_P: Tensor | None = None

    def rows(self, start: int, stop: int) -> TargetTensors:
        """Views of rows start..stop."""
        part = slice(start, stop)
        return TargetTensors(
            self.token_ids_PK[part],
            self.logprobs_PK[part],
            self.tail_mass_P[part],
            None if self.target_ids_P is None else self.target_ids_P[part],
            None if self.weights_P is None else self.weights_P[part],
            None if self.num_exact_P is None else self.num_exact_P[part],
        )


@dataclass(frozen=True, slots=True)
class Options:
    """How a loss is asked for, beside its tensors; see `sparse_kd_loss`."""

    objective: Objective
    reduction: str
    backend: str
    targets: str


def check_options(options: Options, targets: TargetTensors) -> None:
    """Raise LossError for an option that is unknown or impossible here."""
    objective = options.objective
    for name, value, known in (
        ("reduction", options.reduction, REDUCTIONS),
        ("backend", options.backend, BACKENDS),
        ("targets", options.targets, TARGET_KINDS),
    ):
        if value not in known:
            raise LossError(f"{name} is {value!r}, but must be one of {', '.join(map(repr, known))}")
    if objective.alpha < 1 and targets.target_ids_P is None:
        raise LossError(
            f"alpha is {objective.alpha!r}, which mixes in the labels, but target_ids_P is not given; pass it, or alpha=1.0"
        )
    if objective.divergence.requirements.tail_sample:
        _check_tail_sample(options, targets)
    elif options.targets == "unbiased":
        _check_unbiased(objective)


def _check_tail_sample(options: Options, targets: TargetTensors) -> None:
    name, needs = options.objective.divergence.name, options.objective.divergence.requirements
    if targets.num_exact_P is None:
        raise LossError(
            f"{name} needs a sample of the teacher's tail beside exact entries, and num_exact_P, which tells them apart: "
            f"{needs.because}; capture with the selection 'threshold' or 'top_k_sampled'"
        )
    if options.targets != "unbiased":
        raise LossError(f"targets is {options.targets!r}, but {name} reads the estimates too; use 'unbiased'")


def _check_unbiased(objective: Objective) -> None:
    name, needs = objective.divergence.name, objective.divergence.requirements
    if not needs.unbiased:
        raise LossError(
            f"{name} cannot be computed from unbiased targets: {needs.because}; use targets='exact' with num_exact_P, which "
            "leaves the estimates out, or 'forward_kl'"
        )
    if objective.tail != "drop":
        raise LossError(
            f"tail is {objective.tail!r}, but unbiased targets hold the tail in their entries, and would count it twice; "
            "use 'drop'"
        )
    if objective.temperature != 1:
        raise LossError(
            f"temperature is {objective.temperature!r}, but unbiased targets were sampled at 1 and stand for no other; capture "
            "exact entries"
        )


def used_entries(targets: TargetTensors, options: Options) -> TargetTensors:
    """What of the entries the loss may look at: with targets `exact`, the estimates become padding.

    Divergences that need a tail sample keep both kinds, and the number that tells them apart; no other needs it then.
    """
    if targets.num_exact_P is None or options.objective.divergence.requirements.tail_sample:
        return targets
    columns_K = torch.arange(targets.token_ids_PK.shape[1], device=targets.token_ids_PK.device)
    is_exact_PK = columns_K < targets.num_exact_P[:, None]
    ids_PK = targets.token_ids_PK
    if options.targets == "exact":
        ids_PK = ids_PK.masked_fill(~is_exact_PK, PADDING_ID)
    return replace(targets, token_ids_PK=ids_PK, num_exact_P=None)


def at_temperature(targets: TargetTensors, log_z_P: Tensor | None, objective: Objective) -> TargetTensors:
    """The teacher at the objective's temperature T: logprob / T - log_z, and the tail's mass is what is then missing to 1.

    Raises:
        LossError: T is not 1 and log_z_P is not given, or it is that of another temperature (looked at on a CPU only).
    """
    temperature = objective.temperature
    if temperature == 1:
        return targets
    if log_z_P is None:
        raise LossError(
            f"temperature is {temperature!r}, but log_z_P is not given: the normaliser of a truncated teacher at another "
            "temperature cannot be recovered from its entries; capture it, or use temperature 1.0"
        )
    stored_PK = targets.token_ids_PK >= 0
    logprobs_PK = targets.logprobs_PK.detach().double() / temperature - log_z_P.detach().double()[:, None]
    logprobs_PK = logprobs_PK.masked_fill(~stored_PK, -torch.inf)
    mass_P = logprobs_PK.exp().sum(dim=1)
    if _can_look_at(mass_P) and not bool((mass_P <= _LARGEST_MASS).all()):
        row = int((~(mass_P <= _LARGEST_MASS)).int().argmax())
        raise LossError(
            f"row {row} has the mass {mass_P[row].item():.6g} on its support at temperature {temperature!r}; log_z_P must be "
            "logsumexp(logprobs / temperature) over the whole vocabulary, for this temperature"
        )
    tail_mass_P = (1 - mass_P).clamp(0, 1).float()
    return replace(targets, logprobs_PK=logprobs_PK.clamp_max(0).float(), tail_mass_P=tail_mass_P)


def check_tensors(student: Tensor, targets: TargetTensors, log_z_P: Tensor | None = None) -> None:
    """Raise LossError unless shapes and devices fit; `student` has one row per position. Looks at no values.

    Raises:
        LossError: names the tensor, its shape or device, and what was expected.
    """
    num_rows, ids_shape = len(student), tuple(targets.token_ids_PK.shape)
    if len(ids_shape) != 2 or ids_shape[0] != num_rows:
        raise LossError(
            f"token_ids_PK has the shape {ids_shape}, but {num_rows} rows of the student need ({num_rows}, entries)"
        )
    expected = {
        "token_ids_PK": ids_shape,
        "logprobs_PK": ids_shape,
        "tail_mass_P": (num_rows,),
    }
    expected |= {"target_ids_P": (num_rows,), "weights_P": (num_rows,), "num_exact_P": (num_rows,)}
    given = {name: getattr(targets, name) for name in expected} | {"log_z_P": log_z_P}
    for name, shape in (expected | {"log_z_P": (num_rows,)}).items():
        tensor = given[name]
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise LossError(f"{name} has the shape {tuple(tensor.shape)}, but must have {shape}")
        if tensor.device != student.device:
            raise LossError(f"{name} is on {tensor.device}, but the student is on {student.device}; move it there")
        if name in ("token_ids_PK", "target_ids_P", "num_exact_P") and (
            tensor.is_floating_point() or tensor.dtype == torch.bool
        ):
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


def choose_backend(backend: str, student: Tensor) -> str:
    """`numba`, `triton` or `torch`.

    Raises:
        LossError: one was asked for by name, and cannot take this device or dtype.
    """
    fits = student.device.type == "cpu" and student.dtype in (
        torch.float32,
        torch.bfloat16,
    )
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
        return "numba" if fits else "torch"
    return backend


def check_values(targets: TargetTensors, vocab_size: int) -> None:
    """Raise LossError for ids outside the vocabulary and the like; only on a CPU, where looking does not wait for a device."""
    if _can_look_at(targets.token_ids_PK):
        _to_checked(targets, vocab_size)


def _can_look_at(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and not is_transformed()


def to_kernel_targets(targets: TargetTensors, vocab_size: int, scales_P: Tensor) -> Targets:
    """The kernels' form of CPU tensors, with `scales_P` for the weights.

    Raises:
        LossError: as `make_targets`.
    """
    return replace(
        _to_checked(targets, vocab_size),
        weights_P=np.require(_to_numpy(scales_P), np.float64, ["C", "W"]),
    )


def _to_checked(targets: TargetTensors, vocab_size: int) -> Targets:
    return make_targets(
        _to_numpy(targets.token_ids_PK),
        _to_numpy(targets.logprobs_PK),
        _to_numpy(targets.tail_mass_P),
        vocab_size=vocab_size,
        target_ids_P=None if targets.target_ids_P is None else _to_numpy(targets.target_ids_P),
        weights_P=None if targets.weights_P is None else _to_numpy(targets.weights_P),
        num_exact_P=None if targets.num_exact_P is None else _to_numpy(targets.num_exact_P),
    )


def row_scales(targets: TargetTensors, reduction: str) -> Tensor:
    """(P,) float64: what each row's loss is multiplied with before the sum, or by itself for `none`.

    `mean` is sum(weight * loss) / sum(weight), so that rows of weight 0 do not count; 0, not NaN, where nothing counts.
    """
    num_rows = len(targets.token_ids_PK)
    if targets.weights_P is None:
        weights_P = torch.ones(num_rows, dtype=torch.float64, device=targets.token_ids_PK.device)
    else:
        weights_P = targets.weights_P.detach().to(torch.float64)
    if reduction != "mean":
        return weights_P
    total = weights_P.sum()
    return weights_P / torch.where(total > 0, total, 1.0)


def empty_teacher(student: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """token_ids, logprobs and tail_mass without entries, for the rows of `student`: for alpha = 0."""
    num_rows, device = len(student), student.device
    return (
        torch.empty((num_rows, 0), dtype=torch.int32, device=device),
        torch.empty((num_rows, 0), dtype=torch.float32, device=device),
        torch.ones(num_rows, dtype=torch.float32, device=device),
    )


def _to_numpy(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
