"""What the kernels are given, and what every backend promises."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kdcache.errors import LossError
from kdcache.kernels.divergences import TAIL_POLICIES, Divergence, ForwardKL

PADDING_ID = -1
NO_TARGET = -100

# A logprob of float32 log_softmax can come out a rounding above 0; a probability or a logit given by mistake is far above.
_LARGEST_LOGPROB = 1e-3


@dataclass(frozen=True, slots=True)
class Objective:
    """Which function of student and teacher a loss is: alpha T^2 L(teacher, student at T) + (1 - alpha) CE(target id).

    Attributes:
        tail: one of TAIL_POLICIES; what the divergence does with the teacher's mass outside the support, see `reference`.
        alpha: in [0, 1].
        divergence: L, and its options.
        temperature: T, above 0. The student's logits are divided by it; the masses must be those of the teacher at T.

    Raises:
        LossError: an unknown tail policy or one that is wrong for the divergence; an alpha outside [0, 1]; a temperature that
            is impossible, or other than 1 for a divergence without one.
    """

    tail: str = "bucket"
    alpha: float = 1.0
    divergence: Divergence = field(default_factory=ForwardKL)
    temperature: float = 1.0

    def __post_init__(self) -> None:
        name, needs = self.divergence.name, self.divergence.requirements
        if self.tail not in TAIL_POLICIES:
            raise LossError(f"tail is {self.tail!r}, but must be one of {', '.join(map(repr, TAIL_POLICIES))}")
        if not 0.0 <= self.alpha <= 1.0:
            raise LossError(f"alpha is {self.alpha!r}, but must be from 0 (target ids only) to 1 (teacher only)")
        # Not math.isfinite, which torch.compile cannot trace where numbers are symbols.
        if not 0 < self.temperature < math.inf:
            raise LossError(f"temperature is {self.temperature!r}, but must be finite and above 0")
        if self.tail not in needs.tails:
            raise LossError(
                f"{name} with tail {self.tail!r} would be wrong: {needs.because}; use {' or '.join(map(repr, needs.tails))}"
            )
        if self.temperature != 1 and not needs.temperature:
            raise LossError(f"{name} at temperature {self.temperature!r} has no meaning: {needs.because}")


@dataclass(frozen=True, slots=True, eq=False)
class KernelInputs:
    """What P positions of a student are compared with; made by `make_kernel_inputs`, which checks it once for all backends.

    All arrays are C-contiguous and writable (numba compiles read-only and strided arrays a second time).

    Attributes:
        token_ids_PK: (P, K) int32, in [0, vocab_size), distinct within a position; PADDING_ID for a missing entry.
        logprobs_PK: (P, K) float32, nats, normalised over the whole vocabulary; -inf is probability 0; ignored at padding.
        tail_mass_P: (P,) float32 in [0, 1], the teacher's mass outside the support; outside its exact entries, where there are
            others.
        target_ids_P: (P,) int32, in [0, vocab_size), or NO_TARGET.
        weights_P: (P,) float64, >= 0: the factor of each position in the sum whose gradient is wanted. A position of weight 0
            is not read: its loss and its gradient are 0 whatever its logits are, NaN included.
        vocab_size: V.
        num_exact_P: (P,) int32 in [0, K]: entries in the columns before it are exact, those from it on unbiased estimates. Read
            by divergences that need a tail sample; for all others every entry is what it is.
    """

    token_ids_PK: NDArray[np.int32]
    logprobs_PK: NDArray[np.float32]
    tail_mass_P: NDArray[np.float32]
    target_ids_P: NDArray[np.int32]
    weights_P: NDArray[np.float64]
    vocab_size: int
    num_exact_P: NDArray[np.int32]

    def slice(self, start: int, stop: int) -> KernelInputs:
        """Views of positions start..stop."""
        part = slice(start, stop)
        return KernelInputs(
            self.token_ids_PK[part],
            self.logprobs_PK[part],
            self.tail_mass_P[part],
            self.target_ids_P[part],
            self.weights_P[part],
            self.vocab_size,
            self.num_exact_P[part],
        )


@dataclass(frozen=True, slots=True, eq=False)
class Summand:
    """One function of a sum over the same logits.

    Attributes:
        inputs: what the positions are compared with. Vocabulary, target ids and weights are those of the other summands, and in
            each column so is the token id, or it is PADDING_ID: what this function does not read is in its tail.
        objective: the function, at the same temperature as the others; a divergence's options may be (P,).
        factor_P: (P,) float64, finite and at least 0: what its losses count in the sum; None for 1.
    """

    inputs: KernelInputs
    objective: Objective
    factor_P: NDArray[np.float64] | None = None

    def slice(self, start: int, stop: int) -> Summand:
        """Views of positions start..stop."""
        objective = replace(self.objective, divergence=self.objective.divergence.map(lambda option_P: option_P[start:stop]))
        factor_P = None if self.factor_P is None else self.factor_P[start:stop]
        return Summand(self.inputs.slice(start, stop), objective, factor_P)


@dataclass(frozen=True, slots=True, eq=False)
class SumOutputs:
    """Where a sum's results are written.

    Attributes:
        losses_P: (P,) float64, the sum over the summands of factor * loss.
        values_PD1: (P, D + 1) float64: the divergence of each of D summands, times the temperature's square but neither alpha
            nor the factor, and the cross entropy of the target ids in the last column, 0 where no summand has a share in it.
    """

    losses_P: NDArray[np.float64]
    values_PD1: NDArray[np.float64]


def exact_counts(inputs: KernelInputs, divergence: Divergence) -> NDArray[np.int32]:
    """(P,) `num_exact_P` where the divergence reads it, else K."""
    if divergence.requirements.tail_sample:
        return inputs.num_exact_P
    return np.full(len(inputs.token_ids_PK), inputs.token_ids_PK.shape[1], np.int32)


class KernelBackend(Protocol):
    """A module with these functions. tests/contracts/kernels.py runs the promises for every backend.

    `logits_PV` is (P, V), C-contiguous, float32, or uint16 holding the bits of bfloat16 (then every sum is still taken in
    float32 or better, and the gradient is rounded once). `losses_P` is (P,) float64, written, and not multiplied by the
    weights. The result does not depend on `num_threads`, to the bit. NaN among a position's logits makes its loss NaN, and +inf
    makes it NaN or infinite, wherever the position has any mass to compare; both put NaN into its gradient. -inf is an id that
    the student cannot give.
    """

    def position_losses(
        self,
        logits_PV: NDArray[Any],
        inputs: KernelInputs,
        objective: Objective,
        losses_P: NDArray[np.float64],
        num_threads: int = 1,
    ) -> None:
        """Write each position's loss; the logits stay as they are."""
        ...

    def position_losses_and_gradients(
        self,
        logits_PV: NDArray[Any],
        inputs: KernelInputs,
        objective: Objective,
        losses_P: NDArray[np.float64],
        num_threads: int = 1,
    ) -> None:
        """Write each position's loss, and overwrite the logits with the gradient of sum(weights_P * losses_P)."""
        ...

    def summed_losses(
        self,
        logits_PV: NDArray[Any],
        summands: Sequence[Summand],
        outputs: SumOutputs,
        num_threads: int = 1,
        *,
        want_gradient: bool,
    ) -> None:
        """As the two functions above for a sum of functions, in one pass over the logits."""
        ...


def make_kernel_inputs(
    token_ids_PK: ArrayLike,
    logprobs_PK: ArrayLike,
    tail_mass_P: ArrayLike,
    *,
    vocab_size: int,
    target_ids_P: ArrayLike | None = None,
    weights_P: ArrayLike | None = None,
    num_exact_P: ArrayLike | None = None,
) -> KernelInputs:
    """Arrays with the right dtypes and layout, checked. None stands for NO_TARGET, weights of 1, and K exact entries.

    Raises:
        LossError: shapes that do not fit together; an id or target id outside the student's vocabulary; an id twice in a
            position; a logprob above 0; a tail mass outside [0, 1]; a negative or NaN weight; a number of exact entries outside
            [0, K]. The message names the position.
    """
    ids_PK = np.asarray(token_ids_PK)
    if ids_PK.ndim != 2:
        raise LossError(f"token_ids must have the shape (positions, entries), but has {ids_PK.shape}")
    num_positions, num_entries = ids_PK.shape
    target_ids_P = np.full(num_positions, NO_TARGET, np.int32) if target_ids_P is None else np.asarray(target_ids_P)
    weights_P = np.ones(num_positions) if weights_P is None else np.asarray(weights_P)
    num_exact_P = np.full(num_positions, num_entries, np.int32) if num_exact_P is None else np.asarray(num_exact_P)
    logprobs_PK, tail_mass_P = np.asarray(logprobs_PK), np.asarray(tail_mass_P)
    _check_shape("logprobs", logprobs_PK, ids_PK.shape)
    given_P = {"tail_mass": tail_mass_P, "target_ids": target_ids_P, "weights": weights_P, "num_exact": num_exact_P}
    for name, array_P in given_P.items():
        _check_shape(name, array_P, (num_positions,))
    # Ranges before the cast: an int64 id of 2**32 would become 0.
    _check_ids(ids_PK, vocab_size)
    _check_values(ids_PK, logprobs_PK, tail_mass_P, weights_P)
    _refuse(
        (target_ids_P != NO_TARGET) & ((target_ids_P < 0) | (target_ids_P >= vocab_size)),
        target_ids_P,
        "target id",
        _outside(vocab_size),
    )
    too_many_P = (num_exact_P < 0) | (num_exact_P > num_entries)
    _refuse(too_many_P, num_exact_P, "number of exact entries", f"but there are {num_entries} columns")
    return KernelInputs(
        np.require(ids_PK, np.int32, ["C", "W"]),
        np.require(logprobs_PK, np.float32, ["C", "W"]),
        np.require(tail_mass_P, np.float32, ["C", "W"]),
        np.require(target_ids_P, np.int32, ["C", "W"]),
        np.require(weights_P, np.float64, ["C", "W"]),
        vocab_size,
        np.require(num_exact_P, np.int32, ["C", "W"]),
    )


def _outside(vocab_size: int) -> str:
    return (
        f"which is outside the student's vocabulary of {vocab_size}; was the cache made with another tokenizer? Ids that "
        "no token uses (padding of the teacher's embeddings) are left out by kdcache.loss.padding.entries_within"
    )


def _check_shape(name: str, array: NDArray[Any], expected: tuple[int, ...]) -> None:
    if array.shape != expected:
        raise LossError(f"{name} has the shape {array.shape}, but token_ids make it {expected}")


def _check_ids(ids_PK: NDArray[Any], vocab_size: int) -> None:
    if ids_PK.size == 0:
        return
    if ids_PK.min() < PADDING_ID or ids_PK.max() >= vocab_size:
        _refuse((ids_PK < PADDING_ID) | (ids_PK >= vocab_size), ids_PK, "token id", _outside(vocab_size))
    sorted_PK = np.sort(ids_PK, axis=1)
    twice_PK = (sorted_PK[:, 1:] == sorted_PK[:, :-1]) & (sorted_PK[:, 1:] != PADDING_ID)
    _refuse(twice_PK, sorted_PK[:, 1:], "token id", "twice; entries of one position must be distinct")


def _check_values(ids_PK: NDArray[Any], logprobs_PK: NDArray[Any], tail_mass_P: NDArray[Any], weights_P: NDArray[Any]) -> None:
    if logprobs_PK.size and logprobs_PK.max() > _LARGEST_LOGPROB:
        too_large_PK = (logprobs_PK > _LARGEST_LOGPROB) & (ids_PK != PADDING_ID)
        _refuse(too_large_PK, logprobs_PK, "logprob", "above 0; logprobs are natural logs of probabilities")
    _refuse(~((tail_mass_P >= 0) & (tail_mass_P <= 1)), tail_mass_P, "tail mass", "outside [0, 1]")
    _refuse(~((weights_P >= 0) & (weights_P < np.inf)), weights_P, "weight", "but weights must be finite and at least 0")


def _refuse(bad: NDArray[np.bool_], values: NDArray[Any], noun: str, why: str) -> None:
    if bad.any():
        index = np.unravel_index(int(np.argmax(bad)), bad.shape)
        raise LossError(f"position {int(index[0])} has the {noun} {values[index].item()!r}, {why}")
