"""Soft targets: what the teacher said at some positions, and what its stored entries mean."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from kdcache.errors import LossError
from kdcache.format.selection import ENTRIES

ArrayT = TypeVar("ArrayT")

ARRAYS = ("token_ids_PK", "logprobs_PK", "tail_mass_P", "num_exact_P", "log_z_PL", "entropy_P", "target_logprobs_P")
"""The fields of SoftTargets that are arrays, each with one line per position."""


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class SoftTargets(Generic[ArrayT]):
    """What the teacher said at P positions, as NumPy arrays or torch tensors; every loss takes it.

    The loader makes it as `batch.teacher`. For arrays of your own use `SoftTargets.of`.

    Attributes:
        token_ids_PK: (P, K) integers in [0, vocab_size), distinct at each position; -1 without an entry.
        logprobs_PK: (P, K) nats, normalised over the teacher's whole vocabulary; float32 or float16; anything at padding.
        tail_mass_P: (P,) in [0, 1], the teacher's mass outside the exact entries.
        entries: what the entries mean. `exact`: each logprob is the token's own. `unbiased`: exp(logprob) is random, and its
            expectation is the token's probability. `mixed`: exact entries come first at each position, unbiased ones follow.
        num_exact_P: (P,) integers in [0, K], how many entries of a position are exact; may be None unless `mixed`.
        vocab_size: number of ids of the teacher; None where it is unknown.
        log_z_PL: (P, L) nats, logsumexp(l / T) over the whole vocabulary for each further temperature T, where l are the
            logprobs at temperature 1; None where none was captured.
        temperatures: the L further temperatures.
        entropy_P: (P,) nats, of the teacher's whole distribution; None where it was not captured.
        selection: kind of the cache's selection, as in its manifest; None for arrays that come from elsewhere.
        target_logprobs_P: (P,) nats, the teacher's own logprob of each target id that is not an exact entry; anything else
            elsewhere. None where it was not asked for, see `with_target_logprobs` of a loader's config.
    """

    token_ids_PK: ArrayT
    logprobs_PK: ArrayT
    tail_mass_P: ArrayT
    entries: str
    num_exact_P: ArrayT | None = None
    vocab_size: int | None = None
    log_z_PL: ArrayT | None = None
    temperatures: tuple[float, ...] = ()
    entropy_P: ArrayT | None = None
    selection: str | None = None
    target_logprobs_P: ArrayT | None = None

    @classmethod
    def of(
        cls,
        token_ids_PK: ArrayT,
        logprobs_PK: ArrayT,
        tail_mass_P: ArrayT,
        *,
        entries: str,
        num_exact_P: ArrayT | None = None,
        vocab_size: int | None = None,
        log_z: tuple[float, ArrayT] | None = None,
    ) -> SoftTargets[ArrayT]:
        """Soft targets of arrays that did not come from a loader; see the attributes.

        Args:
            token_ids_PK, logprobs_PK, tail_mass_P: all NumPy arrays, or all tensors on one device.
            entries: `exact`, `unbiased` or `mixed`; nothing in the arrays tells, and a wrong answer gives a wrong loss.
            num_exact_P: required for `mixed`.
            vocab_size: a student with fewer ids is then refused.
            log_z: a temperature other than 1, and its (P,) normalisers.

        Raises:
            LossError: an unknown meaning, or `mixed` without num_exact_P.
        """
        if entries not in ENTRIES:
            raise LossError(f"entries is {entries!r}, but must say what the entries mean: {', '.join(map(repr, ENTRIES))}")
        if (num_exact_P is None) == (entries == "mixed"):
            have = "missing" if num_exact_P is None else "given"
            raise LossError(
                f"entries is {entries!r} and num_exact_P is {have}, but only 'mixed' has it: the number of exact entries at "
                "each position, which come before the unbiased ones"
            )
        further: dict[str, Any] = {}
        if log_z is not None:
            temperature, log_z_P = log_z
            further = {"temperatures": (float(temperature),), "log_z_PL": _as_column(log_z_P)}
        return cls(token_ids_PK, logprobs_PK, tail_mass_P, entries, num_exact_P, vocab_size, **further)

    @property
    def num_positions(self) -> int:
        """P."""
        return len(self.token_ids_PK)  # pyright: ignore[reportArgumentType]

    @property
    def origin(self) -> str:
        """The selection where it is known, else the entries' meaning; for rules and messages."""
        return self.selection or self.entries

    def __repr__(self) -> str:
        ids_PK: Any = self.token_ids_PK
        size = "an unknown number of" if self.vocab_size is None else f"{self.vocab_size:,}"
        return f"SoftTargets({ids_PK.shape[0]:,} positions, up to {ids_PK.shape[1]:,} {self.entries} entries of {size} ids)"

    def log_z_at(self, temperature: float) -> ArrayT:
        """(P,) nats, the normalisers of a further temperature.

        Raises:
            LossError: they were not captured; names the temperatures that were.
        """
        for column, captured in enumerate(self.temperatures):
            if captured == temperature and self.log_z_PL is not None:
                return self.log_z_PL[:, column]  # pyright: ignore[reportIndexIssue]
        captured = ", ".join(map(str, (1.0, *self.temperatures)))
        raise LossError(
            f"temperature is {temperature!r}, but the teacher's normalisers are known for {captured}: they cannot be recovered "
            "from truncated entries; use one of these, or capture again with it among selection.temperatures"
        )

    def map(self, function: Callable[[ArrayT], Any]) -> SoftTargets[Any]:
        """The same with `function` applied to every array."""
        arrays = {name: getattr(self, name) for name in ARRAYS}
        return replace(self, **{name: None if array is None else function(array) for name, array in arrays.items()})

    def slice(self, start: int, stop: int) -> SoftTargets[ArrayT]:
        """Views of positions start..stop."""
        return self.map(lambda array: array[start:stop])  # pyright: ignore[reportIndexIssue]

    def to(self, device: Any, *, non_blocking: bool = False) -> SoftTargets[ArrayT]:
        """The tensors on a device."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))  # pyright: ignore[reportAttributeAccessIssue]


def _as_column(values_P: Any) -> Any:
    return values_P[:, None]
