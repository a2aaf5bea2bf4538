"""Packed entries decoded straight into a batch's arrays, in compiled loops with the GIL released.

`kdcache.codec.base.copy_into` of what the codec decodes is the definition; tests compare. Nothing else is checked: the
caller has checked that the stream and the logprobs, or their codes, hold all entries.

Arrays of `token_ids_PK` and the like have the positions that are kept; `offsets_P1` has all positions.
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
UNPACK_TASK = np.dtype(
    [
        (name, np.int64)
        for name in ("words", "values", "offsets", "token_ids", "logprobs", "kept", "num_words", "num_offsets", "num_kept")
    ]
    + [("num_columns", np.int64), ("num_value_bytes", np.int64)]
)
"""One sequence for the compiled loop: addresses of the arrays of `Unpacking` (kept: 0 for all positions), then their sizes.
`values` are the logprobs, or their codes."""

SETTINGS = np.dtype([(name, np.int64) for name in ("id_bits", "value_bits", "is_half", "id_lanes", "code_lanes", "levels")])
"""How a codec's entries are read: the width of an id; the bits of a logprob's code, 0 for float16; whether float16 is written;
addresses of the lanes for ids and for codes, and of the codes' levels."""

_MOST_SHUFFLED_BITS = 25
"""An id of this many bits, up to 7 bits into a byte, lies in 4 bytes."""
_TOLD = getattr(config, "CPU_FEATURES", None) or ("" if getattr(config, "CPU_NAME", None) else get_host_cpu_features())
HAS_SHUFFLES = all({"+avx2", "+f16c"} <= set(features.split(",")) for features in (_TOLD, get_host_cpu_features()))
"""Whether the compiled code may have x86's shuffle of bytes and its float16; portable loops do the same elsewhere. Asked for
where the processor has none, or numba was told to do without, LLVM would end the process."""


@dataclass(frozen=True, slots=True, eq=False)
class Unpacking:
    """One sequence for `unpack_many`; the arrays are read and written in place, so they must be exactly what is said here.

    Attributes:
        words: the packed ids as aligned uint32.
        halves_E: float16 logprobs, aligned.
        offsets_P1: int64, offsets of the positions' entries.
        kept: int64, the positions that are kept; None for all.
        token_ids_PK, logprobs_PK: int32, and float32 or float16, C-contiguous, written completely.
    """

    words: NDArray[np.uint32]
    halves_E: NDArray[np.float16]
    offsets_P1: NDArray[np.int64]
    kept: NDArray[np.int64] | None
    token_ids_PK: NDArray[np.int32]
    logprobs_PK: NDArray[np.floating]

    @classmethod
    def of(
        cls,
        stream: NDArray[np.uint8],
        halves_E: NDArray[np.float16],
        positions: tuple[NDArray[np.int64], NDArray[np.int64] | None],
        out: tuple[NDArray[np.int32], NDArray[np.floating]],
    ) -> Unpacking:
        """From a stream of whole 8-byte words, logprobs, (offsets_P1, kept) and (token_ids_PK, logprobs_PK).

        The first two are copied where they are not aligned.
        """
        return cls(_aligned(stream.view(np.uint32)), _aligned(halves_E), *positions, *out)

    def task(self) -> tuple[int, ...]:
        """The fields of UNPACK_TASK, in order."""
        arrays = [self.words, self.halves_E, self.offsets_P1, self.token_ids_PK, self.logprobs_PK]
        if self.kept is not None:
            arrays.append(self.kept)
        num_kept = len(self.offsets_P1) - 1 if self.kept is None else len(self.kept)
        if num_kept != len(self.token_ids_PK) or self.logprobs_PK.shape != self.token_ids_PK.shape:
            raise ValueError("arrays that are decoded into must be of one shape")
        interfaces = [array.__array_interface__ for array in arrays]
        if any(interface["strides"] is not None for interface in interfaces):
            raise ValueError("arrays that are decoded from or into must be C-contiguous")
        addresses = [interface["data"][0] for interface in interfaces]
        kept = addresses.pop() if self.kept is not None else 0
        return (*addresses, kept, len(self.words), len(self.offsets_P1), *self.token_ids_PK.shape, self.halves_E.nbytes)


def _aligned(values: NDArray[Any]) -> NDArray[Any]:
    return values if values.flags.aligned else values.copy()


def unpack_many(sequences: Sequence[Unpacking], id_bits: int) -> NDArray[np.int64]:
    """Write ids and logprobs of the kept positions, followed by padding, of several sequences.

    One call releases the GIL once: threads that release it for each sequence spend their time waiting for each other.

    Args:
        sequences: what they write is of one dtype.
        id_bits: width of an id, from 1 to 31.

    Returns:
        The largest id of each, -1 where there is none, TOO_WIDE where a position has more than K entries.
    """
    tasks = np.array([sequence.task() for sequence in sequences], UNPACK_TASK)
    largest = np.empty(len(sequences), np.int64)
    settings = Settings.of(id_bits, 0, is_half=bool(sequences) and sequences[0].logprobs_PK.dtype == np.float16)
    _unpack_many(tasks, settings.record, largest)
    return largest


@dataclass(frozen=True, slots=True, eq=False)
class Settings:
    """What the compiled loops need to know of a codec, and the arrays whose addresses that has.

    Attributes:
        record: (1,) of SETTINGS.
        arrays: what its addresses are of; kept alive while the loops run.
    """

    record: NDArray[np.void]
    arrays: tuple[NDArray[Any], ...]

    @staticmethod
    @lru_cache(maxsize=64)
    def of(id_bits: int, value_bits: int, *, is_half: bool) -> Settings:
        """For ids of 1 to 31 bits, and logprobs in float16 (value_bits 0) or codes of 4 to 8 bits, which become float32."""
        if value_bits and is_half:
            raise ValueError("levels are not float16")
        levels = level_logprobs(value_bits) if value_bits else np.zeros(0, np.float32)
        arrays = _lanes(min(id_bits, _MOST_SHUFFLED_BITS)), _lanes(value_bits or 1), levels
        addresses = [array.__array_interface__["data"][0] for array in arrays]
        return Settings(np.array([(id_bits, value_bits, is_half, *addresses)], SETTINGS), arrays)


@lru_cache(maxsize=32)
def _lanes(width: int) -> NDArray[np.uint8]:
    """(64,) for `_shuffle_groups`, of a width of at most 25 bits: which 4 bytes each of 8 ids lies in (of the first 16 bytes
    for the first four ids, of those from byte 4 w / 8 on for the others), and by how many bits to shift them (uint32)."""
    bits = np.arange(8) * width
    bits[4:] -= 4 * width // 8 * 8
    lanes = (bits // 8)[:, None] + np.arange(4)
    return np.concatenate([lanes.astype(np.uint8).reshape(-1), (bits % 8).astype(np.uint32).view(np.uint8)])


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

        order = builder.load(_vector(builder, lanes, _BYTE, 32), align=1)
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
            found = builder.call(shuffle, [builder.shuffle_vector(*halves, joined), order])
            ids = builder.and_(builder.lshr(builder.bitcast(found, words_8), shifts), mask)
            to = builder.add(target, builder.mul(loop.index, target.type(32)))
            builder.store(ids, _vector(builder, to, _WORD, 8), align=4)
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
            to = builder.add(target, builder.mul(loop.index, target.type(64)))
            values = builder.fpext(builder.load(_vector(builder, at, ir.HalfType(), 16), align=2), singles)
            builder.store(values, _vector(builder, to, ir.FloatType(), 16), align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), generate


@inlined
def _unpack_inner(words, width, start, ids):
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
    # The same where the last id ends in the stream's last word, after which nothing may be read.
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
def _widen_any(halves, start, bits, values):
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
    largest = max(largest, _unpack_inner(words, width, start + done, ids[done:middle]))
    return max(largest, _unpack_last(words, width, start + middle, ids[middle:]))


@inlined
def _widen_run(halves, start, logprobs):
    done = 0
    if HAS_SHUFFLES:
        done = logprobs.shape[0] // 16 * 16
        _widen_groups(halves.ctypes.data + 2 * start, done // 16, logprobs.ctypes.data)  # pyright: ignore[reportCallIssue]
    _widen_any(halves, start + done, logprobs.view(np.uint32)[done:], logprobs[done:])


@inlined
def _read_codes(source, num_bytes, settings, start, logprobs):
    bits = settings.value_bits
    levels = numba.carray(pointer(settings.levels), (1 << bits,), np.float32)
    if bits == 8:
        codes = numba.carray(pointer(source + start), (logprobs.shape[0],), np.uint8)
        for k in range(logprobs.shape[0]):
            logprobs[k] = levels[codes[k]]
        return
    words, found = numba.carray(pointer(source), (num_bytes // 4,), np.uint32), logprobs.view(np.int32)
    _unpack_run(words, bits, settings.code_lanes, start, found)
    for k in range(logprobs.shape[0]):
        logprobs[k] = levels[np.uint32(found[k])]


@inlined
def _read_logprobs(source, num_bytes, settings, start, count, target):
    # `count` logprobs from the one with index `start` on, to an address.
    if settings.value_bits:
        _read_codes(source, num_bytes, settings, start, numba.carray(pointer(target), (count,), np.float32))
    elif settings.is_half:
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
def _unpack_positions(words, offsets, kept, ids, task, settings):
    # `kept` is empty for all positions. Gives the largest id, -1 for none.
    largest, num_columns, is_half = np.int64(-1), ids.shape[1], settings.is_half
    flat_ids, is_all, item_bytes = ids.reshape(-1), kept.shape[0] == 0, 2 if is_half else 4
    num_kept, done = task.num_kept, 0
    while done < num_kept:
        p = done if is_all else kept[done]
        start, stop, begun = offsets[p], offsets[p + 1], done
        if stop - start > num_columns:
            return TOO_WIDE
        done += 1
        # Full positions, one after another here and there, are one long run.
        while (
            stop - start == (done - begun) * num_columns
            and done < num_kept
            and (is_all or kept[done] == p + 1)
            and offsets[p + 2] - stop == num_columns
        ):
            p += 1
            stop = offsets[p + 1]
            done += 1
        first, end = begun * num_columns, begun * num_columns + stop - start
        if stop > start:
            found = _unpack_run(words, settings.id_bits, settings.id_lanes, start, flat_ids[first:end])
            largest = max(largest, np.int64(found))
            target = task.logprobs + item_bytes * first
            _read_logprobs(task.values, task.num_value_bytes, settings, start, stop - start, target)
        _pad(flat_ids, task.logprobs, is_half, end, done * num_columns)
    return largest


@inlined
def _unpack_one(task, settings):
    words = numba.carray(pointer(task.words), (task.num_words,), np.uint32)
    offsets = numba.carray(pointer(task.offsets), (task.num_offsets,), np.int64)
    kept = numba.carray(pointer(task.kept), (task.num_kept if task.kept else 0,), np.int64)
    ids = numba.carray(pointer(task.token_ids), (task.num_kept, task.num_columns), np.int32)
    return _unpack_positions(words, offsets, kept, ids, task, settings)


@compiled(numba.void(numba.from_dtype(UNPACK_TASK)[::1], numba.from_dtype(SETTINGS)[::1], numba.int64[::1]))
def _unpack_many(tasks, settings, largest):
    for s in range(tasks.shape[0]):
        largest[s] = _unpack_one(tasks[s], settings[0])


@called_by_address(numba.int64(numba.int64, numba.int64, numba.int64))
def unpack_at(task, settings, _):
    """`unpack_many` of one sequence: addresses of an UNPACK_TASK and of SETTINGS."""
    return _unpack_one(numba.carray(pointer(task), (1,), UNPACK_TASK)[0], numba.carray(pointer(settings), (1,), SETTINGS)[0])
