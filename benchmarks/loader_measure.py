"""How readers are timed in the loader benchmark. NumPy alone: this is imported in the baselines' environment too.

A reader gives rows (see `Rows`). A pass reads them and copies each into a batch's arrays, which exist: `sequential` in the
stored order, `random` one by one in a random one, `packed` as the rows of packed batches, with labels, positions and segments
beside them. A pass goes on, from the start again if need be, until it has taken so many CPU seconds of this process, all its
threads together; the first pass of each kind is not counted. In every round the floors are measured beside the reader.

Shape letters: S sequences, N tokens, K entries per position, B rows of a batch, T tokens per row.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Row = tuple[NDArray[Any], NDArray[Any], NDArray[Any]]
"""A sequence's ids (N,), and of its entries the ids (N * K,) and logprobs (N * K,), in any shape with so many numbers."""

MODES = ("sequential", "random", "packed")
FLOORS = ("packed", "raw")
KEPT_FLOOR = "packed, map kept"
"""As the first of them, but the file is mapped once for all passes."""


@dataclass(frozen=True)
class Rows:
    """The rows of the benchmark as memory-mapped arrays, and the orders in which they are read.

    Attributes:
        starts_S1: (S+1,) where each sequence starts in the arrays.
        input_ids_N, token_ids_NK, logprobs_NK: int32, int32, float16.
        order_S: for `random`.
        batches: for `packed`: of each batch its (row, sequence) pairs.
    """

    folder: Path
    starts_S1: NDArray[np.int64]
    input_ids_N: NDArray[np.int32]
    token_ids_NK: NDArray[np.int32]
    logprobs_NK: NDArray[np.float16]
    order_S: list[int]
    batches: list[list[tuple[int, int]]]

    @classmethod
    def load(cls, folder: Path) -> Rows:
        ids, token_ids, logprobs = (
            np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("input_ids", "token_ids", "logprobs")
        )
        batches: list[list[tuple[int, int]]] = []
        plan = np.load(folder / "plan.npy").tolist() if (folder / "plan.npy").exists() else []
        for batch, row, number in plan:
            if batch == len(batches):
                batches.append([])
            batches[batch].append((row, number))
        order_S = np.load(folder / "order.npy").tolist()
        return cls(folder, np.load(folder / "starts.npy"), ids, token_ids, logprobs, order_S, batches)

    def __len__(self) -> int:
        return len(self.starts_S1) - 1

    @property
    def k(self) -> int:
        """K."""
        return self.token_ids_NK.shape[1]

    @property
    def num_tokens(self) -> int:
        """N."""
        return int(self.starts_S1[-1])

    def row(self, number: int) -> Row:
        part = slice(self.starts_S1[number], self.starts_S1[number + 1])
        return self.input_ids_N[part], self.token_ids_NK[part].reshape(-1), self.logprobs_NK[part].reshape(-1)


class Reader(Protocol):
    """What is measured."""

    def get(self, numbers: list[int]) -> Iterable[Row]:
        """These sequences; of several, by the library's way to read several at once, if it has one."""
        ...

    def scan(self) -> Iterable[Row]:
        """All sequences in their order."""
        ...


class Room:
    """One batch's arrays, (B, T) flattened; logprobs in the dtype that the reader gives."""

    def __init__(self, batch_rows: int, seq_len: int, k: int, dtype: Any) -> None:
        num_tokens = batch_rows * seq_len
        self.seq_len, self.k, self.num_tokens, self.filled = seq_len, k, num_tokens, 0
        self.input_ids, self.labels, self.positions, self.segments = (np.zeros(num_tokens, np.int32) for _ in range(4))
        self.token_ids, self.logprobs = np.empty(num_tokens * k, np.int32), np.empty(num_tokens * k, dtype)
        self._counting = np.arange(num_tokens, dtype=np.int32)

    def put(self, row: Row) -> int:
        """Copy a sequence behind the one before, or to the start where there is no room; its number of tokens."""
        input_ids, token_ids, logprobs = row
        n = len(input_ids)
        if self.filled + n > self.num_tokens:
            self.filled = 0
        start, stop, k = self.filled, self.filled + n, self.k
        self.input_ids[start:stop] = input_ids
        self.token_ids[start * k : stop * k] = token_ids.reshape(-1)
        self.logprobs[start * k : stop * k] = logprobs.reshape(-1)
        self.filled = stop
        return n

    def put_batch(self, places: list[tuple[int, int]], rows: Iterable[Row]) -> int:
        """Fill a packed batch: entries one after another, tokens where their row is."""
        self.filled, total, k = 0, 0, self.k
        self.input_ids[:], self.labels[:], self.positions[:], self.segments[:] = 0, -100, 0, 0
        last_row, column, segment = -1, 0, 0
        for (batch_row, _), (input_ids, token_ids, logprobs) in zip(places, rows, strict=True):
            if batch_row != last_row:
                last_row, column, segment = batch_row, 0, 0
            n, segment = len(input_ids), segment + 1
            start = batch_row * self.seq_len + column
            self.input_ids[start : start + n] = input_ids
            self.labels[start : start + n - 1] = input_ids[1:]
            self.positions[start : start + n] = self._counting[:n]
            self.segments[start : start + n] = segment
            self.token_ids[total * k : (total + n) * k] = token_ids.reshape(-1)
            self.logprobs[total * k : (total + n) * k] = logprobs.reshape(-1)
            column, total = column + n, total + n
        return total


def steps(mode: str, reader: Reader, rows: Rows, room: Room) -> Iterator[int]:
    """Once through the rows; after each step the number of tokens that it copied."""
    if mode == "sequential":
        for row in reader.scan():
            yield room.put(row)
    elif mode == "random":
        for number in rows.order_S:
            for row in reader.get([number]):
                yield room.put(row)
    else:
        for places in rows.batches:
            yield room.put_batch(places, reader.get([number for _, number in places]))


def mapped(name: str, rows: Rows) -> NDArray[np.uint8]:
    """A floor's file. A plain view: a memmap's own slices take microseconds each."""
    return np.asarray(np.memmap(rows.folder / f"{name}.bin", np.uint8, "r")).view(np.ndarray)


def floor_steps(name: str, rows: Rows, room: NDArray[np.uint8], data: NDArray[np.uint8] | None = None) -> Iterator[int]:
    """Bytes of each sequence, in random order, copied from a memory map into one batch's room: nothing decoded or checked.

    The file is mapped here, unless it is given mapped.
    """
    data = mapped(name, rows) if data is None else data
    starts, tokens = np.load(rows.folder / f"{name}_starts.npy").tolist(), np.diff(rows.starts_S1).tolist()
    filled = 0
    for number in rows.order_S:
        n = starts[number + 1] - starts[number]
        if filled + n > len(room):
            filled = 0
        room[filled : filled + n] = data[starts[number] : starts[number + 1]]
        filled += n
        yield tokens[number]


def one_pass(once: Callable[[], Iterator[int]], seconds: float) -> dict[str, float]:
    """Tokens, CPU and wall seconds of a pass."""
    tokens, wall, start = 0, time.perf_counter(), time.process_time()
    while time.process_time() - start < seconds:
        for num_tokens in once():
            tokens += num_tokens
            if time.process_time() - start >= seconds:
                break
    return {
        "tokens": tokens,
        "cpu_seconds": time.process_time() - start,
        "wall_seconds": time.perf_counter() - wall,
    }


def measure(modes: dict[str, Callable[[], Iterator[int]]], rows: Rows, seconds: float, rounds: int) -> dict[str, Any]:
    """Passes of every mode and floor in every round."""
    room = np.empty(2**13 * (6 * rows.k + 4), np.uint8)
    floors = {f"floor {name}": (lambda name=name: floor_steps(name, rows, room)) for name in FLOORS}
    kept = mapped("packed", rows)
    floors[f"floor {KEPT_FLOOR}"] = lambda: floor_steps("packed", rows, room, kept)
    passes: dict[str, list[dict[str, float]]] = {name: [] for name in modes | floors}
    for number in range(rounds + 1):
        for name, once in (modes | floors).items():
            result = one_pass(once, seconds / 4 if name in floors else seconds)
            if number:
                passes[name].append(result)
    return passes


def check(reader: Reader, rows: Rows) -> None:
    """Raise unless a reader gives the rows, values and numbers of entries alike."""
    some = sorted({0, 1, len(rows) // 2, len(rows) - 1})
    found = list(zip(some, reader.get(some), strict=True)) + list(zip(range(3), reader.scan(), strict=False))
    for number, row in found:
        for got, expected in zip(row, rows.row(number), strict=True):
            if not np.array_equal(np.asarray(got).reshape(-1), expected):
                raise ValueError(f"sequence {number} is not what was written")


def num_bytes(folder: Path) -> int:
    """Of all files of a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def use_one_core() -> None:
    """From now on, where the system can: a library's own threads then do not spin beside each other."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
