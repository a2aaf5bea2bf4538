"""Rebuild a record from changed entries: the last step of every operation on distributions."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from kdcache.format.record import Distributions, find_targets


@dataclass(frozen=True, eq=False)
class Entries:
    """Entries of all positions, in any order.

    Attributes:
        positions_E: (E,) the position of each.
        token_ids_E: (E,) int32, distinct within a position.
        logprobs_E: (E,) float64, nats.
        is_exact_E: (E,) bool.
    """

    positions_E: NDArray[np.int64]
    token_ids_E: NDArray[np.int32]
    logprobs_E: NDArray[np.float64]
    is_exact_E: NDArray[np.bool_]

    @classmethod
    def of(cls, d: Distributions) -> Entries:
        """The entries of a record."""
        positions_E = np.repeat(np.arange(d.num_positions), d.num_entries_P)
        return cls(positions_E, d.token_ids_E, d.logprobs_E.astype(np.float64), d.is_exact_E)

    def taken(self, take_E: NDArray[np.bool_]) -> Entries:
        """The entries that a mask takes."""
        return Entries(self.positions_E[take_E], self.token_ids_E[take_E], self.logprobs_E[take_E], self.is_exact_E[take_E])


def sum_per_position(values_E: NDArray[np.float64], positions_E: NDArray[np.int64], num_positions: int) -> NDArray[np.float64]:
    """(P,) the values' sum at each position, in float64."""
    return np.bincount(positions_E, values_E, minlength=num_positions).astype(np.float64)


def rebuilt(
    d: Distributions,
    entries: Entries,
    tail_mass_P: NDArray[np.float64],
    targets: tuple[NDArray[np.int32], NDArray[np.float32]],
    *,
    has_estimates: bool,
) -> Distributions:
    """The record with other entries and tails; what belongs to the whole distribution (log_z, entropy, features) stays.

    Args:
        entries: put into the record's order here.
        targets: (P,) ids and (P,) logprobs of all targets, of which those that are not exact entries now are kept apart.
        has_estimates: whether the selection may have estimates, so that the counts of exact entries are stored.
    """
    num_positions = d.num_positions
    order_E = np.lexsort((entries.token_ids_E, -entries.logprobs_E, ~entries.is_exact_E, entries.positions_E))
    sorted_ = Entries(*(getattr(entries, name)[order_E] for name in ("positions_E", "token_ids_E", "logprobs_E", "is_exact_E")))
    counts_P = np.bincount(sorted_.positions_E, minlength=num_positions)
    num_exact_P = np.bincount(sorted_.positions_E[sorted_.is_exact_E], minlength=num_positions).astype(np.int64)
    made = replace(
        d,
        token_ids_E=sorted_.token_ids_E.astype(np.int32, copy=False),
        logprobs_E=np.minimum(sorted_.logprobs_E, 0.0).astype(np.float32),
        offsets_P1=np.concatenate([[0], np.cumsum(counts_P)]).astype(np.int64),
        tail_mass_P=np.clip(tail_mass_P, 0.0, 1.0).astype(np.float32),
        num_exact_P=num_exact_P if has_estimates else None,
    )
    return _with_targets(made, *targets)


def _with_targets(d: Distributions, target_ids_P: NDArray[np.int32], logprobs_P: NDArray[np.float32]) -> Distributions:
    has_target_P, inside_P, _ = find_targets(d, target_ids_P)
    return replace(d, outside_target_logprobs=logprobs_P[has_target_P & ~inside_P].astype(np.float32))
