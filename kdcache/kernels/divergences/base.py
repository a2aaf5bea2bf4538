"""What a divergence is: its name, its options and what it needs of the record. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from kdcache.errors import LossError

TAIL_POLICIES = ("drop", "renormalize", "bucket", "uniform")


@dataclass(frozen=True, slots=True)
class Requirements:
    """What a divergence needs of the record; everything else is refused, in these words.

    Attributes:
        tails: the tail policies under which it means what its name says.
        unbiased: may be given unbiased entries (sampled and threshold records), because it is linear in the teacher's masses;
            the others would be biased, and take exact entries with the exact mass of the tail.
        temperature: another temperature than 1 is possible, with the record's logsumexp(logprobs / T).
        tail_sample: needs exact entries and unbiased estimates of others, and is told which are which.
        target: needs the target id, as an entry of its own with the teacher's logprob of it.
        because: the reason for what is not possible, as the end of a sentence.
    """

    tails: tuple[str, ...]
    unbiased: bool
    temperature: bool
    tail_sample: bool
    because: str
    target: bool = False


_NOT_LINEAR = "it is not linear in the teacher's masses, so the whole of the tail must be one bucket of exact mass"
BUCKET_ONLY = Requirements(("bucket",), unbiased=False, temperature=True, tail_sample=False, because=_NOT_LINEAR)

Option = Any
"""A number, or one for each position, (P,), where the divergence allows it."""


@dataclass(frozen=True, slots=True)
class Divergence:
    """Base of all: the name by which it is asked for, and what it needs. Fields of the subclasses are its options, numbers.

    Options named in `per_position` may also be arrays or tensors (P,), one number for each position: `SkewKL(skew_P)`. Such a
    divergence is made for one batch.

    The formulas of ours stand in one table per backend. A divergence of another package is one file: a frozen dataclass that
    overrides `in_numpy` and `in_torch`, and `for_numba` where the compiled kernels are to run it too. It is registered under
    its name as an entry point of the group `kdcache.divergences`. Within torch.compile it is given made, not by name.

    Attributes:
        per_position: names of the options that may be (P,); its formulas are written for numbers and for columns, (P, 1).
        for_numba: what `kdcache.kernels.divergences._numba` says, as a plain function that numba can compile; None leaves a
            loss on a CPU to torch.

    Raises:
        LossError: an option outside its range.
    """

    name: ClassVar[str]
    requirements: ClassVar[Requirements] = BUCKET_ONLY
    per_position: ClassVar[tuple[str, ...]] = ()
    for_numba: ClassVar[Callable[[Any, Any], float] | None] = None

    def in_numpy(self, log_p_PK1: Any, log_q_PK1: Any) -> tuple[Any, Any]:
        """(P,) losses and (P, K+1) h of arrays: the definition, as a function of `kdcache.kernels.divergences.reference`."""
        raise NotImplementedError(f"{type(self).__name__} has no in_numpy, which defines it")

    def in_torch(self, masses: Any) -> tuple[Any, Any]:
        """(P,) losses and (P, K+1) h of `torch_formulas.Masses`; autograd can pass through the losses."""
        raise NotImplementedError(f"{type(self).__name__} has no in_torch, by which it is trained")

    @property
    def options(self) -> dict[str, Any]:
        """By name, in the order of the fields: numbers, and arrays where an option is (P,)."""
        # Not dataclasses.asdict, which torch.compile cannot trace.
        return {name: getattr(self, name) for name in self.__match_args__}

    @property
    def arrays(self) -> dict[str, Any]:
        """The options that are (P,)."""
        return {name: value for name, value in self.options.items() if not isinstance(value, (int, float))}

    def measures(self) -> dict[str, Divergence]:
        """Further functions of the same buckets whose values are worth watching; they are never part of a loss."""
        return {}

    def map(self, function: Callable[[Any], Any]) -> Self:
        """The same with `function` applied to every option that is (P,)."""
        arrays = self.arrays
        return type(self)(**{**self.options, **{name: function(array) for name, array in arrays.items()}}) if arrays else self

    def _check(self, option: str, low: float, high: float, *, ends: str = "[]") -> None:
        value = getattr(self, option)
        if isinstance(value, (int, float)):
            wrong = None if _is_within(value, low, high, ends) else repr(value)
        elif option not in self.per_position or getattr(value, "ndim", 0) not in (1, 2):
            also = ", or one for each position, (P,)" if option in self.per_position else ""
            raise LossError(f"{self.name}: {option} is {value!r}, but must be a number{also}")
        else:
            # Tensors are looked at where the losses look at values: as NumPy arrays, on a CPU.
            wrong = None if _is_tensor(value) else _first_outside(value, low, high, ends)
        if wrong is not None:
            raise LossError(f"{self.name}: {option} is {wrong}, but must be in {ends[0]}{low:g}, {high:g}{ends[1]}")


def _is_within(value: float, low: float, high: float, ends: str) -> bool:
    above = value >= low if ends[0] == "[" else value > low
    below = value <= high if ends[1] == "]" else value < high
    return above and below and math.isfinite(value)


def _is_tensor(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] == "torch"


def _first_outside(values_P: Any, low: float, high: float, ends: str) -> str | None:
    """The first of NumPy numbers outside a range, and its position."""
    above_P = values_P >= low if ends[0] == "[" else values_P > low
    below_P = values_P <= high if ends[1] == "]" else values_P < high
    inside_P = above_P & below_P & (values_P - values_P == 0)
    if inside_P.all():
        return None
    position = int(inside_P.argmin())
    return f"{values_P.ravel()[position].item()!r} at position {position}"
