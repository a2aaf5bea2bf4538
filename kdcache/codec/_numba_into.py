"""Packed entries decoded straight into a batch's rows, in compiled loops with the GIL released.

`kdcache.codec.base.copy_into` of what the codec decodes is the definition; tests compare. Nothing else is checked: the
caller has checked that the stream and the logprobs, or their codes, hold all entries.

Shape letters: P positions, Q positions that are kept, K entries per position (padded), E entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils, config
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic
from numpy.typing import NDArray

from kdcache.codec.levels import level_logprobs
from kdcache.compiled import called_by_address, compiled, copy, inlined, pointer
from kdcache.format.record import PADDING_ID

TOO_WIDE = -2
NUM_ADDRESSES = 11
_MOST_SHUFFLED_BITS = 25
"""An id of so many bits, up to 7 bits into a byte, lies in 4 bytes."""
_TOLD = getattr(config, "CPU_FEATURES", None) or ("" if getattr(config, "CPU_NAME", None) else get_host_cpu_features())
HAS_SHUFFLES = all({"+avx2", "+f16c"} <= set(features.split(",")) for features in (_TOLD, get_host_cpu_features()))
"""Whether the compiled code may have x86's shuffle of bytes and its float16; portable loops do the same elsewhere. Asked for
where the processor has none, or numba was told to do without, LLVM would end the process."""


@dataclass(frozen=True, slots=True, eq=False)
class Unpacking:
    """One sequence for `unpack_many`; the arrays are read and written where they are, so they must be what is said here.

    Attributes:
        words: the packed ids as aligned uint32.
        halves_E: (E,) float16 logprobs, aligned.
        offsets_P1, kept_Q: (P+1,) offsets of the positions' entries, and (Q,) the positions that are kept, None for all; int64.
        token_ids_QK, logprobs_QK: int32, and float32 or float16, C-contiguous, to be written.
    """

    words: NDArray[np.uint32]
    halves_E: NDArray[np.float16]
    offsets_P1: NDArray[np.int64]
    kept_Q: NDArray[np.int64] | None
    token_ids_QK: NDArray[np.int32]
    logprobs_QK: NDArray[np.floating]

    @classmethod
    def of(
        cls,
        stream: NDArray[np.uint8],
        halves_E: NDArray[np.float16],
        rows: tuple[NDArray[np.int64], NDArray[np.int64] | None],
        out: tuple[NDArray[np.int32], NDArray[np.floating]],
    ) -> Unpacking:
        """Of a stream of whole 8-byte words, logprobs, (offsets_P1, kept_Q) and (token_ids_QK, logprobs_QK); the first two are
        copied where they are not aligned."""
        return cls(_aligned(stream.view(np.uint32)), _aligned(halves_E), *rows, *out)

    def addresses(self) -> list[int]:
        """A row of the table that the compiled loop takes: addresses of the arrays, and their sizes."""
        arrays = [self.words, self.halves_E, self.offsets_P1, self.token_ids_QK, self.logprobs_QK]
        if self.kept_Q is not None:
            arrays.append(self.kept_Q)
        num_kept = len(self.offsets_P1) - 1 if self.kept_Q is None else len(self.kept_Q)
        if num_kept != len(self.token_ids_QK) or self.logprobs_QK.shape != self.token_ids_QK.shape:
            raise ValueError("arrays that are decoded into must be of one shape")
        interfaces = [array.__array_interface__ for array in arrays]
        if any(interface["strides"] is not None for interface in interfaces):
            raise ValueError("arrays that are decoded from or into must be C-contiguous")
        places = [interface["data"][0] for interface in interfaces]
        kept = places.pop() if self.kept_Q is not None else 0
        sizes = len(self.words), len(self.offsets_P1), *self.token_ids_QK.shape, self.halves_E.nbytes
        return [*places, kept, *sizes]


def _aligned(values: NDArray[Any]) -> NDArray[Any]:
    return values if values.flags.aligned else values.copy()


def unpack_many(jobs: Sequence[Unpacking], id_bits: int) -> NDArray[np.int64]:
    """Write ids and logprobs of the kept positions, padding behind them, of several sequences in one call, so that the GIL is
    let go of once: threads that take turns for each of them spend their time waiting for each other.

    Args:
        jobs: R sequences; what they write is of one dtype.
        id_bits: width of an id, from 1 to 31.

    Returns:
        (R,) the largest id of each, -1 where there is none, TOO_WIDE where a position has more than K entries.
    """
    table_RC = np.array([job.addresses() for job in jobs], np.int64).reshape(len(jobs), NUM_ADDRESSES)
    largest_R = np.empty(len(jobs), np.int64)
    settings = Settings.of(id_bits, 0, is_half=bool(jobs) and jobs[0].logprobs_QK.dtype == np.float16)
    _unpack_many(table_RC, settings.numbers, largest_R)
    return largest_R


@dataclass(frozen=True, slots=True, eq=False)
class Settings:
    """What the compiled loops need to know of a codec; kept alive while they run.

    Attributes:
        numbers: width of an id; bits of a logprob's code, 0 for float16; whether float16 is written; addresses of the lanes for
            ids and for codes and of the codes' levels.
        arrays: what the addresses are of.
    """

    numbers: NDArray[np.int64]
    arrays: tuple[NDArray[Any], ...]

    @staticmethod
    @lru_cache(maxsize=64)
    def of(id_bits: int, value_bits: int, *, is_half: bool) -> Settings:
        """For ids of 1 to 31 bits, and logprobs in float16 (value_bits 0) or codes of 4 to 8 bits, which become float32."""
        if value_bits and is_half:
            raise ValueError("levels are no float16")
        arrays = _lanes(min(id_bits, _MOST_SHUFFLED_BITS)), _lanes(value_bits or 1), level_logprobs(value_bits or 4)
        addresses = [array.__array_interface__["data"][0] for array in arrays]
        return Settings(np.array([id_bits, value_bits, is_half, *addresses], np.int64), arrays)


@lru_cache(maxsize=32)
def _lanes(width: int) -> NDArray[np.uint8]:
    """(64,) for `_shuffle_groups`, of a width of at most 25 bits: which 4 bytes each of 8 ids lies in (of the first 16 bytes
    for the first four ids, of those from byte 4 w / 8 on for the others), and by how many bits to shift them (uint32)."""
    bits = np.arange(8) * width
    bits[4:] -= 4 * width // 8 * 8
    places = (bits // 8)[:, None] + np.arange(4)
    return np.concatenate([places.astype(np.uint8).reshape(-1), (bits % 8).astype(np.uint32).view(np.uint8)])


_BYTE, _WORD = ir.IntType(8), ir.IntType(32)


def _vector(builder: Any, address: Any, kind: Any, count: int) -> Any:
    """Pointer to a vector."""
    return builder.inttoptr(address, ir.VectorType(kind, count).as_pointer())


@intrinsic
def _shuffle_groups(typing_context, source, num_groups, width, offset, lanes, target):  # noqa: ARG001
    # Groups of 8 ids: the bytes of each are brought into a lane of 32 bits by one instruction (AVX2's byte shuffle), shifted by
    # as many bits as its lane asks for, and masked. Gives the largest id.
    def generate(context, builder, signature, arguments):  # noqa: ARG001 - numba's calling convention
        source, num_groups, width, offset, lanes, target = arguments
        bytes_32, words_8 = ir.VectorType(_BYTE, 32), ir.VectorType(_WORD, 8)
        ones = [ir.Constant(_WORD, n) for n in range(32)]

        def splat(value):
            one = builder.insert_element(ir.Constant(words_8, ir.Undefined), value, ones[0])
            return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(_WORD, 8), [0] * 8))

        places = builder.load(_vector(builder, lanes, _BYTE, 32), align=1)
        shifts = builder.load(_vector(builder, builder.add(lanes, lanes.type(32)), _WORD, 8), align=1)
        shifts = builder.add(shifts, splat(builder.trunc(offset, _WORD)))
        mask = splat(builder.trunc(builder.sub(builder.shl(width.type(1), width), width.type(1)), _WORD))
        second = builder.lshr(width, width.type(1))
        largest = cgutils.alloca_once_value(builder, ir.Constant(words_8, [0] * 8))
        shuffle = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(bytes_32, [bytes_32, bytes_32]), "llvm.x86.avx2.pshuf.b"
        )
        joined = ir.Constant(ir.VectorType(_WORD, 32), list(range(32)))
        with cgutils.for_range(builder, num_groups) as loop:
            first = builder.add(source, builder.mul(loop.index, width))
            halves = [builder.load(_vector(builder, at, _BYTE, 16), align=1) for at in (first, builder.add(first, second))]
            found = builder.call(shuffle, [builder.shuffle_vector(*halves, joined), places])
            ids = builder.and_(builder.lshr(builder.bitcast(found, words_8), shifts), mask)
            place = builder.add(target, builder.mul(loop.index, target.type(32)))
            builder.store(ids, _vector(builder, place, _WORD, 8), align=4)
            before = builder.load(largest)
            builder.store(builder.select(builder.icmp_unsigned(">", ids, before), ids, before), largest)
        found, best = builder.load(largest), ir.Constant(_WORD, 0)
        for lane in range(8):
            one = builder.extract_element(found, ones[lane])
            best = builder.select(builder.icmp_unsigned(">", one, best), one, best)
        return best

    return types.uint32(*[types.int64] * 6), generate


@intrinsic
def _widen_groups(typing_context, source, num_groups, target):  # noqa: ARG001
    # Groups of 16 float16 to float32: exact, an instruction of processors that have AVX2 (F16C); a C function elsewhere.
    def generate(context, builder, signature, arguments):  # noqa: ARG001 - numba's calling convention
        source, num_groups, target = arguments
        singles = ir.VectorType(ir.FloatType(), 16)
        with cgutils.for_range(builder, num_groups) as loop:
            at = builder.add(source, builder.mul(loop.index, source.type(32)))
            place = builder.add(target, builder.mul(loop.index, target.type(64)))
            values = builder.fpext(builder.load(_vector(builder, at, ir.HalfType(), 16), align=2), singles)
            builder.store(values, _vector(builder, place, ir.FloatType(), 16), align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), generate


@inlined
def _unpack_row(words, width, start, ids):
    # 64-bit arithmetic on 32-bit words is what LLVM turns into gathers: 41 ns for 64 entries of 18 bits, against 71 for the
    # loop over 64-bit words and 45 for one compiled for the width (one core, AVX-512).
    mask = np.uint32((np.uint64(1) << np.uint64(width)) - np.uint64(1))
    largest = np.uint32(0)
    first = np.uint64(start) * np.uint64(width)
    for k in range(ids.shape[0]):
        bit = first + np.uint64(k) * np.uint64(width)
        word, shift = bit >> np.uint64(5), bit & np.uint64(31)
        value = (np.uint64(words[word]) | (np.uint64(words[word + np.uint64(1)]) << np.uint64(32))) >> shift
        largest = max(largest, np.uint32(value) & mask)
        ids[k] = np.int32(np.uint32(value) & mask)
    return largest


@inlined
def _unpack_last(words, width, start, ids):
    # The same where the last id ends in the stream's last word, behind which nothing may be read.
    mask = np.uint32((np.uint64(1) << np.uint64(width)) - np.uint64(1))
    largest, last = np.uint32(0), words.shape[0] - 1
    for k in range(ids.shape[0]):
        bit = np.uint64(start + k) * np.uint64(width)
        word, shift = np.int64(bit >> np.uint64(5)), bit & np.uint64(31)
        value = (np.uint64(words[word]) | (np.uint64(words[min(word + 1, last)]) << np.uint64(32))) >> shift
        largest = max(largest, np.uint32(value) & mask)
        ids[k] = np.int32(np.uint32(value) & mask)
    return largest


@inlined
def _widen_row(halves, start, bits, values):
    # float16 to float32 exactly. Normal numbers by moving their bits; subnormal ones as integers times 2^-24, since arithmetic
    # on subnormal float32 is slow on some processors and zero where they are flushed.
    first = np.uint64(start)  # unsigned, or numba looks at each index for a negative one: six times slower
    for k in range(bits.shape[0]):
        size = np.uint32(halves[first + np.uint64(k)]) & np.uint32(0x7FFF)
        bits[k] = (size << np.uint32(13)) + np.uint32(0x38000000)
    for k in range(bits.shape[0]):
        half = np.uint32(halves[first + np.uint64(k)])
        size = half & np.uint32(0x7FFF)
        value = values[k]
        value = np.float32(np.int32(size)) * np.float32(2.0**-24) if size < np.uint32(0x400) else value
        value = np.float32(np.inf) if size == np.uint32(0x7C00) else value
        value = np.float32(np.nan) if size > np.uint32(0x7C00) else value
        values[k] = -value if half & np.uint32(0x8000) else value


@inlined
def _unpack_run(words, width, lanes, start, ids):
    # Entries from `start` on, as many as `ids` holds; the largest of them. Lanes by their address.
    count, done, largest = ids.shape[0], 0, np.uint32(0)
    bit = start * width
    if HAS_SHUFFLES and width + (bit & 7) <= _MOST_SHUFFLED_BITS:
        # A group is 8 ids, `width` bytes; two times 16 bytes are read for it, the second from byte 4 w / 8 on.
        room = words.shape[0] * 4 - (bit >> 3) - (4 * width // 8) - 16
        num_groups = max(0, min(count // 8, room // width + 1)) if room >= 0 else 0
        source = words.ctypes.data + (bit >> 3)
        largest = _shuffle_groups(source, num_groups, width, bit & 7, lanes, ids.ctypes.data)  # pyright: ignore[reportCallIssue]
        done = num_groups * 8
    num_safe = (words.shape[0] - 1) * 32 // width - start  # entries in front of the last word
    middle = max(done, min(count, num_safe))
    largest = max(largest, _unpack_row(words, width, start + done, ids[done:middle]))
    return max(largest, _unpack_last(words, width, start + middle, ids[middle:]))


@inlined
def _widen_run(halves, start, logprobs):
    done = 0
    if HAS_SHUFFLES:
        done = logprobs.shape[0] // 16 * 16
        _widen_groups(halves.ctypes.data + 2 * start, done // 16, logprobs.ctypes.data)  # pyright: ignore[reportCallIssue]
    _widen_row(halves, start + done, logprobs.view(np.uint32)[done:], logprobs[done:])


@inlined
def _read_codes(source, num_bytes, bits, tables, start, logprobs):
    # Levels of codes of some bits; `tables` are the addresses of the lanes and of the levels.
    levels = numba.carray(pointer(tables[1]), (1 << bits,), np.float32)
    if bits == 8:
        codes = numba.carray(pointer(source + start), (logprobs.shape[0],), np.uint8)
        for k in range(logprobs.shape[0]):
            logprobs[k] = levels[codes[k]]
        return
    words, found = numba.carray(pointer(source), (num_bytes // 4,), np.uint32), logprobs.view(np.int32)
    _unpack_run(words, bits, tables[0], start, found)
    for k in range(logprobs.shape[0]):
        logprobs[k] = levels[np.uint32(found[k])]


@inlined
def _read_logprobs(source, num_bytes, settings, start, count, target):
    # `count` logprobs from number `start` on, to an address.
    if settings[1]:
        _read_codes(source, num_bytes, settings[1], settings[4:6], start, numba.carray(pointer(target), (count,), np.float32))
    elif settings[2]:
        copy(target, source + 2 * start, 2 * count)  # pyright: ignore[reportCallIssue]
    else:
        halves = numba.carray(pointer(source), (num_bytes // 2,), np.uint16)
        _widen_run(halves, start, numba.carray(pointer(target), (count,), np.float32))


@inlined
def _pad(ids, logprobs, is_half, first, end):
    ids[first:end] = PADDING_ID
    if is_half:
        numba.carray(pointer(logprobs), (end,), np.uint16)[first:end] = np.uint16(0xFC00)
    else:
        numba.carray(pointer(logprobs), (end,), np.float32)[first:end] = -np.inf


@inlined
def _unpack_rows(words, values, settings, offsets, kept, num_rows, ids, logprobs):
    # `values` are address and bytes of the logprobs or codes, `logprobs` the address to write to, `kept` empty for all rows.
    largest, num_columns, is_half = np.int64(-1), ids.shape[1], settings[2]
    flat_ids, is_all, item_bytes = ids.reshape(-1), kept.shape[0] == 0, 2 if is_half else 4
    q = 0
    while q < num_rows:
        p = q if is_all else kept[q]
        start, stop, row = offsets[p], offsets[p + 1], q
        if stop - start > num_columns:
            return TOO_WIDE
        q += 1
        # Full rows, one behind the other here and there, are one long row.
        while (
            stop - start == (q - row) * num_columns
            and q < num_rows
            and (is_all or kept[q] == p + 1)
            and offsets[p + 2] - stop == num_columns
        ):
            p += 1
            stop = offsets[p + 1]
            q += 1
        first, end = row * num_columns, row * num_columns + stop - start
        if stop > start:
            found = _unpack_run(words, settings[0], settings[3], start, flat_ids[first:end])
            largest = max(largest, np.int64(found))
            _read_logprobs(values[0], values[1], settings, start, stop - start, logprobs + item_bytes * first)
        _pad(flat_ids, logprobs, is_half, end, q * num_columns)
    return largest


@inlined
def _unpack_one(row, settings):
    # A row of addresses and sizes, see Unpacking.
    num_kept, num_columns = row[8], row[9]
    words = numba.carray(pointer(row[0]), (row[6],), np.uint32)
    offsets = numba.carray(pointer(row[2]), (row[7],), np.int64)
    kept = numba.carray(pointer(row[5]), (num_kept if row[5] else 0,), np.int64)
    ids = numba.carray(pointer(row[3]), (num_kept, num_columns), np.int32)
    values = row[1], row[10]
    return _unpack_rows(words, values, settings, offsets, kept, num_kept, ids, row[4])


@compiled(numba.void(numba.int64[:, ::1], numba.int64[::1], numba.int64[::1]))
def _unpack_many(table, settings, largest):
    for r in range(table.shape[0]):
        largest[r] = _unpack_one(table[r], settings)


@called_by_address(numba.int64(numba.int64, numba.int64, numba.int64))
def unpack_at(row, settings, num_settings):
    """`unpack_many` of one sequence, whose NUM_ADDRESSES numbers lie at an address, with Settings.numbers at another."""
    numbers = numba.carray(pointer(settings), (num_settings,), np.int64)
    return _unpack_one(numba.carray(pointer(row), (NUM_ADDRESSES,), np.int64), numbers)
