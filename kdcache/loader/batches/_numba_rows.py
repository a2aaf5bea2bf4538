"""Rows of mapped record batches checked and decoded into a batch, in one compiled call with the GIL released.

Each row's digest is taken first, which brings the row into the processor's caches, and then its entries are decoded from there.
Whatever is not as it must be only marks the row: `assemble` of its record, the definition, then says what it is.

Shape letters: as in batch.py; R rows, C columns of the digest.
"""

from __future__ import annotations

from functools import lru_cache

import numba
import numpy as np
from numba import types
from numpy.typing import NDArray

from kdcache.codec._numba_into import NUM_ADDRESSES, Settings, unpack_at
from kdcache.codec.base import EntryFormat
from kdcache.compiled import call, compiled, inlined, pointer
from kdcache.loader.batches.batch import Batch
from kdcache.store.records.mapped import MappedRows, RowFormat
from kdcache.store.records.numba_xxh3 import SCRATCH_BYTES, SHORT_BYTES, digest_at
from kdcache.store.records.sequence_table import NUM_OF_ROW, NUM_POSITIONS, NUM_TOKENS, ROW_BYTES, ROW_DIGEST

WHOLE, UNFIT, UNCHECKED = range(3)
"""Of a row: in the batch; not as it must be; in the batch, but too short for the compiled digest."""
_KEY_BYTES = 16
_SINGLES = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)
"""float32 of each float16, by its bits."""


@lru_cache(maxsize=64)
def _about(rows: RowFormat, entries: EntryFormat) -> NDArray[np.int64]:
    """What the compiled loop needs to know of a cache."""
    columns = [_column(rows, name) for name in ("input_ids", "supervised", "num_entries", entries.stream, entries.logprobs)]
    fixed = -1 if rows.fixed is None else rows.fixed
    about = [len(rows.names), fixed, rows.verify, entries.vocab_size, *columns, _column(rows, entries.tail)]
    return np.array([*about, digest_at.address, unpack_at.address], np.int64)


def _column(rows: RowFormat, name: str) -> int:
    """Where a column's address stands in a row's line."""
    return 2 * rows.names.index(name)


def read_rows(mapped: MappedRows, entries: EntryFormat, batch: Batch, tokens_RC: NDArray[np.int64]) -> NDArray[np.int64]:
    """Write entries, tail masses and what the selection keeps beside them of the rows' positions, all that they have.

    Args:
        mapped: R rows.
        entries: how they are to be read; one object per cache.
        batch: to be written.
        tokens_RC: (R, 8) int64 of `_numba_tokens.fill_tokens`: its last column says where the positions go, and the addresses
            of ids and flags in its first two are written.

    Returns:
        (R,) WHOLE, UNFIT or UNCHECKED; of a row that is UNFIT anything may be written in its positions.
    """
    status_R = np.empty(len(tokens_RC), np.int64)
    teacher = batch.teacher
    settings = Settings.of(entries.id_bits, entries.value_bits, is_half=teacher.logprobs_PK.dtype == np.float16)
    floats = np.zeros((2, 3), np.int64)
    for line, (name, values) in zip(floats, (("log_z", teacher.log_z_PL), ("entropy", teacher.entropy_P)), strict=True):
        if values is not None:
            line[:] = _column(mapped.format, name), _address(values), 1 if values.ndim == 1 else values.shape[1]
    _read_rows(
        mapped.places_RJ,
        _about(mapped.format, entries),
        settings.numbers,
        (entries.masses, floats),
        (teacher.token_ids_PK, _address(teacher.logprobs_PK), teacher.tail_mass_P),
        (tokens_RC, status_R),
    )
    return status_R


def _address(values: NDArray[np.generic]) -> int:
    return values.__array_interface__["data"][0]


@inlined
def _is_whole(line, num_columns, address, scratch):
    found = call(address, line.ctypes.data, num_columns, scratch.ctypes.data)  # pyright: ignore[reportCallIssue]
    return found == line[2 * num_columns + ROW_DIGEST]


@inlined
def _same_key(left, right):
    return (numba.carray(pointer(left), (_KEY_BYTES,), np.uint8) == numba.carray(pointer(right), (_KEY_BYTES,), np.uint8)).all()


@inlined
def _fill_offsets(line, column, num_positions, fixed, offsets):
    # Where each position's entries start; False where that is not known.
    offsets[0] = 0
    if line[column + 1] < 0:
        for p in range(num_positions):
            offsets[p + 1] = offsets[p] + fixed
        return fixed >= 0
    if line[column + 1] != 2 * num_positions:
        return False
    counts = numba.carray(pointer(line[column]), (num_positions,), np.uint16)
    for p in range(num_positions):
        offsets[p + 1] = offsets[p] + np.int64(counts[p])
    return True


@inlined
def _stream_bytes(count, bits):
    return (count * bits + 63) // 64 * 8


@inlined
def _read_masses(line, column, masses, target):
    # One of a float16 or of a byte for each position.
    num_positions = target.shape[0]
    if masses.shape[0] == 256:
        if line[column + 1] != num_positions:
            return False
        codes = numba.carray(pointer(line[column]), (num_positions,), np.uint8)
        for p in range(num_positions):
            target[p] = masses[codes[p]]
        return True
    if line[column + 1] != 2 * num_positions:
        return False
    halves = numba.carray(pointer(line[column]), (num_positions,), np.uint16)
    for p in range(num_positions):
        target[p] = masses[halves[p]]
    return True


@inlined
def _read_floats(line, floats, first, num_positions):
    # The columns of float16 beside the entries that the batch has room for.
    for f in range(floats.shape[0]):
        column, target, per_position = floats[f, 0], floats[f, 1], floats[f, 2]
        if target == 0:
            continue
        count = num_positions * per_position
        if line[column + 1] != 2 * count:
            return False
        halves = numba.carray(pointer(line[column]), (count,), np.uint16)
        values = numba.carray(pointer(target + 4 * first * per_position), (count,), np.float32)
        for i in range(count):
            values[i] = _SINGLES[halves[i]]
    return True


_OUT = types.Tuple((numba.int32[:, ::1], numba.int64, numba.float32[::1]))
_TABLES = types.Tuple((types.Array(types.float32, 1, "C", readonly=True), numba.int64[:, ::1]))
_FOUND = types.Tuple((numba.int64[:, ::1], numba.int64[::1]))


@compiled(numba.void(numba.int64[:, ::1], numba.int64[::1], numba.int64[::1], _TABLES, _OUT, _FOUND))
def _read_rows(rows, about, settings, tables, out, found):
    num_columns, fixed, verify, vocab_size = about[0], about[1], about[2], about[3]
    ids_column, flags_column, counts_column, stream, logprobs, tail = about[4], about[5], about[6], about[7], about[8], about[9]
    masses, floats = tables
    ids_out, logprobs_out, masses_out = out
    tokens, status = found
    job, scratch = np.empty(NUM_ADDRESSES, np.int64), np.empty(SCRATCH_BYTES // 8, np.int64)
    num_columns_out, item_bytes = ids_out.shape[1], 2 if settings[2] else 4
    most_positions = np.int64(0)
    for r in range(rows.shape[0]):
        most_positions = max(most_positions, rows[r, 3])
    offsets = np.empty(most_positions + 1, np.int64)
    for r in range(rows.shape[0]):
        num_positions, first = rows[r, 3], tokens[r, 7]
        line = numba.carray(pointer(rows[r, 0]), (2 * num_columns + NUM_OF_ROW,), np.int64)
        own = line[2 * num_columns :]
        status[r] = UNFIT
        if own[NUM_TOKENS] != rows[r, 2] or own[NUM_POSITIONS] != num_positions or not _same_key(line[0], rows[r, 1]):
            continue
        is_short = own[ROW_BYTES] <= SHORT_BYTES
        if verify and not is_short and not _is_whole(line, num_columns, about[10], scratch):
            continue
        if not _fill_offsets(line, counts_column, num_positions, fixed, offsets):
            continue
        num_entries, bits = offsets[num_positions], settings[1]
        logprob_bytes = _stream_bytes(num_entries, bits) if bits else 2 * num_entries
        if line[stream + 1] != _stream_bytes(num_entries, settings[0]) or line[logprobs + 1] != logprob_bytes:
            continue
        if line[stream] % 4 or (bits and bits < 8 and line[logprobs] % 4):
            continue
        job[0], job[1], job[2], job[5] = line[stream], line[logprobs], offsets.ctypes.data, 0
        job[3] = ids_out.ctypes.data + 4 * first * num_columns_out
        job[4] = logprobs_out + item_bytes * first * num_columns_out
        job[6], job[7], job[8], job[9] = line[stream + 1] // 4, num_positions + 1, num_positions, num_columns_out
        job[10] = logprob_bytes
        largest = call(about[11], job.ctypes.data, settings.ctypes.data, settings.shape[0])  # pyright: ignore[reportCallIssue]
        if largest < -1 or largest >= vocab_size:
            continue
        if not _read_masses(line, tail, masses, masses_out[first : first + num_positions]):
            continue
        if not _read_floats(line, floats, first, num_positions):
            continue
        tokens[r, 0], tokens[r, 1] = line[ids_column], line[flags_column]
        status[r] = UNCHECKED if verify and is_short else WHOLE
