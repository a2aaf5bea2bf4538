"""Mapped sequences checked and decoded into a batch, in one compiled call with the GIL released.

Each sequence's digest is taken first, which brings it into the processor's caches; then its entries are decoded from there.
A sequence that fails any check is only marked: `assemble` of its record, the definition, then says what is wrong.
"""

# pyright: reportAttributeAccessIssue=false
# Fields of records are attributes in compiled code.

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numba
import numpy as np
from numba import types
from numpy.typing import NDArray

from kdcache.codec.numba_unpack import SETTINGS, UNPACK_TASK, Settings, unpack_at
from kdcache.compiled import call, compiled, inlined, pointer
from kdcache.loader.batches._numba_tokens import TOKENS
from kdcache.loader.batches.batch import Batch
from kdcache.store.records.mapped import MAPPED_SEQUENCE, MappedSequences, SequenceFormat
from kdcache.store.records.numba_xxh3 import SCRATCH_BYTES, SHORT_BYTES, digest_at
from kdcache.store.records.sequence_table import ABOUT_SEQUENCE, VALUE

WHOLE, UNFIT, UNCHECKED = range(3)
"""A sequence is in the batch; fails a check; is in the batch, but too short for the compiled digest."""

CACHE = np.dtype(
    [(name, np.int64) for name in ("num_columns", "fixed", "verify", "vocab_size")]
    + [(name, np.int64) for name in ("input_ids", "supervised", "num_entries", "stream", "logprobs", "tail")]
    + [("digest", np.int64), ("unpack", np.int64)]
)
"""What the compiled loop knows of a cache: sizes (fixed: -1 where the number of entries varies), which column is which, and the
addresses of two functions."""

SCALARS = np.dtype([("column", np.int64), ("target", np.int64), ("per_position", np.int64)])
"""A column of float16 besides the entries; the address in the batch that it goes to, 0 for none; values per position."""

_KEY_BYTES = 16
_SINGLES = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)
"""float32 of each float16, by its bits."""


@lru_cache(maxsize=64)
def _cache(form: SequenceFormat) -> NDArray[np.void]:
    """(1,) of CACHE."""
    entries = form.entries
    names = "input_ids", "supervised", "num_entries", entries.stream, entries.logprobs, entries.tail
    sizes = len(form.names), -1 if form.fixed is None else form.fixed, form.verify, entries.vocab_size
    return np.array([(*sizes, *map(form.names.index, names), digest_at.address, unpack_at.address)], CACHE)


def read_entries(mapped: MappedSequences, batch: Batch, tokens: NDArray[np.void]) -> NDArray[np.int64]:
    """Write entries, tail masses and what the selection keeps besides them, at all positions of some sequences.

    Args:
        mapped: the sequences.
        batch: to be written.
        tokens: of `_numba_tokens.TOKENS`, one for each sequence: `position` says where its positions go, and the addresses
            `input_ids` and `supervised` are written.

    Returns:
        WHOLE, UNFIT or UNCHECKED for each. At the positions of a sequence that is UNFIT anything may have been written.
    """
    status = np.empty(len(tokens), np.int64)
    entries, teacher = mapped.format.entries, batch.teacher
    settings = Settings.of(entries.id_bits, entries.value_bits, is_half=teacher.logprobs_PK.dtype == np.float16)
    scalars = np.zeros(2, SCALARS)
    for i, (name, values) in enumerate((("log_z", teacher.log_z_PL), ("entropy", teacher.entropy_P))):
        if values is not None:
            per_position = 1 if values.ndim == 1 else values.shape[1]
            scalars[i] = mapped.format.names.index(name), _address(values), per_position
    _read_entries(
        (mapped.table, *_EMPTY),
        _cache(mapped.format),
        settings.record,
        (entries.masses, scalars),
        (teacher.token_ids_PK, _address(teacher.logprobs_PK), teacher.tail_mass_P),
        (tokens, status),
    )
    return status


def _address(values: NDArray[np.generic]) -> int:
    return values.__array_interface__["data"][0]


@inlined
def _same_key(left, right):
    return (numba.carray(pointer(left), (_KEY_BYTES,), np.uint8) == numba.carray(pointer(right), (_KEY_BYTES,), np.uint8)).all()


@inlined
def _fill_offsets(counts, num_positions, fixed, offsets):
    # Where each position's entries start, from the value of the column num_entries; False where that is not known.
    offsets[0] = 0
    if counts.num_bytes < 0:
        for p in range(num_positions):
            offsets[p + 1] = offsets[p] + fixed
        return fixed >= 0
    if counts.num_bytes != 2 * num_positions:
        return False
    found = numba.carray(pointer(counts.address), (num_positions,), np.uint16)
    for p in range(num_positions):
        offsets[p + 1] = offsets[p] + np.int64(found[p])
    return True


@inlined
def _stream_bytes(count, bits):
    return (count * bits + 63) // 64 * 8


@inlined
def _entries_fit(stream, logprobs, num_entries, settings):
    # Whether the values of these two columns hold this many entries, aligned as they are read.
    bits = settings.value_bits
    logprob_bytes = _stream_bytes(num_entries, bits) if bits else 2 * num_entries
    if stream.num_bytes != _stream_bytes(num_entries, settings.id_bits) or logprobs.num_bytes != logprob_bytes:
        return False
    return stream.address % 4 == 0 and (bits == 0 or bits == 8 or logprobs.address % 4 == 0)


@inlined
def _read_masses(value, masses, target):
    # A float16 or a byte for each position.
    num_positions = target.shape[0]
    if masses.shape[0] == 256:
        if value.num_bytes != num_positions:
            return False
        codes = numba.carray(pointer(value.address), (num_positions,), np.uint8)
        for p in range(num_positions):
            target[p] = masses[codes[p]]
        return True
    if value.num_bytes != 2 * num_positions:
        return False
    halves = numba.carray(pointer(value.address), (num_positions,), np.uint16)
    for p in range(num_positions):
        target[p] = masses[halves[p]]
    return True


@inlined
def _read_scalars(values, scalars, first, num_positions):
    # The columns of float16 that the batch has room for.
    for i in range(scalars.shape[0]):
        if scalars[i].target == 0:
            continue
        value, per_position = values[scalars[i].column], scalars[i].per_position
        count = num_positions * per_position
        if value.num_bytes != 2 * count:
            return False
        halves = numba.carray(pointer(value.address), (count,), np.uint16)
        target = numba.carray(pointer(scalars[i].target + 4 * first * per_position), (count,), np.float32)
        for j in range(count):
            target[j] = _SINGLES[halves[j]]
    return True


def _array(dtype: np.dtype[Any]) -> Any:
    return numba.from_dtype(dtype)[::1]


# Records of other files get here as types of arguments, which compiled code is kept under on disk: see `kdcache.compiled`.
_EMPTY = np.empty(0, ABOUT_SEQUENCE), np.empty(0, VALUE), np.empty(0, UNPACK_TASK)
_SEQUENCES = types.Tuple(tuple(_array(dtype) for dtype in (MAPPED_SEQUENCE, ABOUT_SEQUENCE, VALUE, UNPACK_TASK)))
_TABLES = types.Tuple((types.Array(types.float32, 1, "C", readonly=True), _array(SCALARS)))
_OUT = types.Tuple((numba.int32[:, ::1], numba.int64, numba.float32[::1]))
_FOUND = types.Tuple((_array(TOKENS), numba.int64[::1]))


@compiled(numba.void(_SEQUENCES, _array(CACHE), _array(SETTINGS), _TABLES, _OUT, _FOUND))
def _read_entries(sequences, caches, all_settings, tables, out, found):
    mapped, abouts, kind, tasks = sequences
    cache, settings = caches[0], all_settings[0]
    masses, scalars = tables
    ids_out, logprobs_out, masses_out = out
    tokens, status = found
    task, scratch = np.empty(1, tasks.dtype), np.empty(SCRATCH_BYTES // 8, np.int64)
    num_columns_out, item_bytes = ids_out.shape[1], 2 if settings.is_half else 4
    most_positions = np.int64(0)
    for s in range(mapped.shape[0]):
        most_positions = max(most_positions, mapped[s].num_positions)
    offsets = np.empty(most_positions + 1, np.int64)
    for s in range(mapped.shape[0]):
        line, num_positions, first = mapped[s].line, mapped[s].num_positions, tokens[s].position
        about = numba.carray(pointer(line), (1,), abouts.dtype)[0]
        values = numba.carray(pointer(line + abouts.itemsize), (cache.num_columns,), kind.dtype)
        status[s] = UNFIT
        if about.num_tokens != mapped[s].num_tokens or about.num_positions != num_positions:
            continue
        if not _same_key(values[0].address, mapped[s].key):
            continue
        is_short = about.digested_bytes <= SHORT_BYTES
        if cache.verify and not is_short:
            digest = call(cache.digest, line + abouts.itemsize, cache.num_columns, scratch.ctypes.data)  # pyright: ignore[reportCallIssue]
            if np.uint64(digest) != about.digest:
                continue
        if not _fill_offsets(values[cache.num_entries], num_positions, cache.fixed, offsets):
            continue
        stream, logprobs = values[cache.stream], values[cache.logprobs]
        if not _entries_fit(stream, logprobs, offsets[num_positions], settings):
            continue
        task[0].words, task[0].num_words = stream.address, stream.num_bytes // 4
        task[0].values, task[0].num_value_bytes = logprobs.address, logprobs.num_bytes
        task[0].offsets, task[0].num_offsets = offsets.ctypes.data, num_positions + 1
        task[0].kept, task[0].num_kept, task[0].num_columns = 0, num_positions, num_columns_out
        task[0].token_ids = ids_out.ctypes.data + 4 * first * num_columns_out
        task[0].logprobs = logprobs_out + item_bytes * first * num_columns_out
        largest = call(cache.unpack, task.ctypes.data, all_settings.ctypes.data, 0)  # pyright: ignore[reportCallIssue]
        if largest < -1 or largest >= cache.vocab_size:
            continue
        if not _read_masses(values[cache.tail], masses, masses_out[first : first + num_positions]):
            continue
        if not _read_scalars(values, scalars, first, num_positions):
            continue
        tokens[s].input_ids, tokens[s].supervised = values[cache.input_ids].address, values[cache.supervised].address
        status[s] = UNCHECKED if cache.verify and is_short else WHOLE
