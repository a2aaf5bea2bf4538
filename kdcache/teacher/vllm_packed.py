"""How the vLLM teacher and the extension of the engine's worker talk: plain values and bytes, no object per token.

A group of sequences is one buffer of P rows, one per supervised position, sequence after sequence. With each request goes where
its rows start and, for each of its tokens, what the row is about; back comes the whole buffer, with a mark at each row that was
written. Pure functions; neither torch nor vLLM.

Shape letters: N tokens of a sequence, P rows (supervised positions) of a group, K entries per position.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kdcache.errors import TeacherError
from kdcache.format.record import Distributions, TokenSequence
from kdcache.teacher.base import answer, no_positions

NOT_SUPERVISED = -2
"""In a request's targets: no row for this position. NO_TARGET: a row, but nothing follows."""

ROW, TARGETS = "kdcache_row", "kdcache_targets"
"""Keys of a request's extra arguments."""


def pack_requests(sequences: Sequence[TokenSequence]) -> list[dict[str, Any]]:
    """The extra arguments of each sequence's request."""
    packed, row = [], 0
    for sequence in sequences:
        targets_N = np.full(sequence.num_tokens, NOT_SUPERVISED, np.int32)
        targets_N[sequence.supervised_N] = sequence.target_ids_P
        packed.append({ROW: row, TARGETS: targets_N.tobytes()})
        row += len(sequence.positions_P)
    return packed


class Wanted(NamedTuple):
    """Of one request: the buffer's rows of its positions, and their targets."""

    rows_N: NDArray[np.int64]
    targets_N: NDArray[np.int32]


def unpack_request(extra_args: Mapping[str, Any]) -> Wanted:
    """Inverse of `pack_requests`, in the worker. rows_N is a row before the first where a position has none."""
    targets_N = np.frombuffer(extra_args[TARGETS], np.int32)
    return Wanted(int(extra_args[ROW]) + np.cumsum(targets_N != NOT_SUPERVISED) - 1, targets_N)


@dataclass(frozen=True, slots=True, eq=False)
class Buffer:
    """The rows of a group, in the worker and then in the teacher.

    Attributes:
        token_ids_PK: int32.
        logprobs_PK: float32, nats.
        target_logprobs_P: float32, nats; means nothing where there is no target.
        filled_P: bool, whether the row was written.
    """

    token_ids_PK: NDArray[np.int32]
    logprobs_PK: NDArray[np.float32]
    target_logprobs_P: NDArray[np.float32]
    filled_P: NDArray[np.bool_]

    @classmethod
    def empty(cls, num_rows: int, k: int) -> Buffer:
        """With no row written."""
        shape = (num_rows, k)
        return cls(
            np.empty(shape, np.int32), np.empty(shape, np.float32), np.empty(num_rows, np.float32), np.zeros(num_rows, np.bool_)
        )

    def write(self, rows_C: NDArray[np.int64], found: Sequence[NDArray[Any]]) -> None:
        """Token ids, logprobs and target logprobs of some rows; a row that is written twice keeps what came last."""
        self.token_ids_PK[rows_C], self.logprobs_PK[rows_C], self.target_logprobs_P[rows_C] = found
        self.filled_P[rows_C] = True

    def pack(self) -> list[Any]:
        """Shape and bytes, which cross any process boundary."""
        arrays = (self.token_ids_PK, self.logprobs_PK, self.target_logprobs_P, self.filled_P)
        return [*self.token_ids_PK.shape, *(array.tobytes() for array in arrays)]

    @classmethod
    def unpack(cls, packed: Sequence[Any]) -> Buffer:
        """Inverse of `pack`; read-only views."""
        num_rows, k, ids, logprobs, targets, filled = packed
        return cls(
            np.frombuffer(ids, np.int32).reshape(num_rows, k),
            np.frombuffer(logprobs, np.float32).reshape(num_rows, k),
            np.frombuffer(targets, np.float32),
            np.frombuffer(filled, np.bool_),
        )


def read_buffer(sequences: Sequence[TokenSequence], buffer: Buffer) -> Iterator[Distributions]:
    """The answers to the sequences of a group, in order.

    Raises:
        TeacherError: a position without a row, or one with NaN.
    """
    end = 0
    for sequence in sequences:
        start, end = end, end + len(sequence.positions_P)
        rows = slice(start, end)
        if not buffer.filled_P[rows].all():
            missing = sequence.positions_P[~buffer.filled_P[rows]]
            raise TeacherError(
                f"{sequence.source}: the engine's worker never computed {len(missing)} of {end - start} positions, the first "
                f"of them {int(missing[0])}; set teacher.route to public"
            )
        if start == end:
            yield no_positions()
        else:
            yield answer(sequence, buffer.token_ids_PK[rows], buffer.logprobs_PK[rows], buffer.target_logprobs_P[rows])
