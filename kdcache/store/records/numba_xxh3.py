"""The digest of a sequence (xxh3_64) in a compiled loop: without the interpreter, and without a copy of the sequence.

`kdcache.format.schema.sequence_digest` (package xxhash) is the definition; tests compare. Only inputs of more than SHORT_BYTES
bytes are known here: xxh3 has other formulas for shorter ones, and those sequences are checked by the package. The formulas:
xxHash's specification, "XXH3 Algorithm (for larger inputs)", with seed 0 and the default secret.

Eight accumulators of 64 bits take 64 bytes, a stripe, at a time; 16 stripes are a block, after which they are scrambled. A
sequence is not in one piece: what one part leaves of a stripe is put together with the next part's beginning.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from kdcache.compiled import called_by_address, compiled, copy, inlined, pointer

SHORT_BYTES = 240
"""Sequences with this many bytes or fewer, lengths included, are not for these functions."""
SCRATCH_BYTES = 128
_SECRET = np.frombuffer(
    bytes.fromhex(
        "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221b8084674f743248ee03590e6"
        "813a264c3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931"
        "c89f7ec9d9787364eac5ac8334d3ebc3c581a0fffa1363eb170ddd51b7f0da49d316552629d4689e2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f"
        "95160428afd7fbcabb4b407e"
    ),
    np.uint8,
)
_PRIME32_1 = 0x9E3779B1
_PRIME64_1 = np.uint64(0x9E3779B185EBCA87)
_START = np.array(
    [0xC2B2AE3D, 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9,
     0x85EBCA77C2B2AE63, 0x85EBCA77, 0x27D4EB2F165667C5, 0x9E3779B1],
    np.uint64,
)  # fmt: skip
_MERGE_SECRET = np.frombuffer(_SECRET[11:75].tobytes(), np.uint64)
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
_STRIPE, _BLOCK_STRIPES = 64, 16
_AHEAD = 4096
"""Bytes that are asked for before they are needed: the processor's own prefetching ends at each page. Asking beyond a sequence,
or beyond the file, reads nothing."""

_WORD = ir.IntType(64)
_WORDS_8 = ir.VectorType(_WORD, 8)


def _all(value: int) -> Any:
    return ir.Constant(_WORDS_8, [value] * 8)


def _load(builder: Any, address: Any) -> Any:
    return builder.load(builder.inttoptr(address, _WORDS_8.as_pointer()), align=1)


def _with_stripe(builder: Any, sums: Any, data: Any, key: Any) -> Any:
    """Add a stripe to the accumulators: products of 32-bit halves, for which LLVM has one instruction."""
    swapped = ir.Constant(ir.VectorType(ir.IntType(32), 8), [1, 0, 3, 2, 5, 4, 7, 6])
    mixed = builder.xor(data, key)
    product = builder.mul(builder.and_(mixed, _all(0xFFFFFFFF)), builder.lshr(mixed, _all(32)))
    return builder.add(sums, builder.add(builder.shuffle_vector(data, data, swapped), product))


@intrinsic
def _add_stripes(typing_context, sums, data, secret, num_stripes):  # noqa: ARG001 - numba's calling convention
    # Stripes of one block, each with the secret 8 bytes further.
    def generate(context, builder, signature, arguments):  # noqa: ARG001
        sums, data, secret, num_stripes = arguments
        state = cgutils.alloca_once_value(builder, _load(builder, sums))
        with cgutils.for_range(builder, num_stripes) as loop:
            stripe = _load(builder, builder.add(data, builder.mul(loop.index, _WORD(_STRIPE))))
            key = _load(builder, builder.add(secret, builder.mul(loop.index, _WORD(8))))
            builder.store(_with_stripe(builder, builder.load(state), stripe, key), state)
        builder.store(builder.load(state), builder.inttoptr(sums, _WORDS_8.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


@intrinsic
def _add_blocks(typing_context, sums, data, secret, num_blocks):  # noqa: ARG001
    # Whole blocks, each scrambled at its end: no test between two stripes.
    def generate(context, builder, signature, arguments):  # noqa: ARG001
        sums, data, secret, num_blocks = arguments
        state = cgutils.alloca_once_value(builder, _load(builder, sums))
        pointer, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
        prefetch = builder.module.declare_intrinsic("llvm.prefetch", [pointer], kind)
        keys = [_load(builder, builder.add(secret, _WORD(8 * s))) for s in range(_BLOCK_STRIPES + 1)]
        with cgutils.for_range(builder, num_blocks) as loop:
            block = builder.add(data, builder.mul(loop.index, _WORD(_STRIPE * _BLOCK_STRIPES)))
            found = builder.load(state)
            for s in range(_BLOCK_STRIPES):
                at = builder.add(block, _WORD(_STRIPE * s))
                wanted = builder.inttoptr(builder.add(at, _WORD(_AHEAD)), pointer)
                builder.call(prefetch, [wanted, number(0), number(3), number(1)])  # to read, to keep, of data
                found = _with_stripe(builder, found, _load(builder, at), keys[s])
            found = builder.xor(builder.xor(found, builder.lshr(found, _all(47))), keys[_BLOCK_STRIPES])
            low = builder.mul(builder.and_(found, _all(0xFFFFFFFF)), _all(_PRIME32_1))
            high = builder.mul(builder.lshr(found, _all(32)), _all(_PRIME32_1))
            builder.store(builder.add(low, builder.shl(high, _all(32))), state)
        builder.store(builder.load(state), builder.inttoptr(sums, _WORDS_8.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


@inlined
def _add(sums, data, first, count):
    # `count` stripes, the first of them at index `first` of the sequence.
    secret, target = _SECRET.ctypes.data, sums.ctypes.data
    while count > 0:
        at = first % _BLOCK_STRIPES
        if at == 0 and count >= _BLOCK_STRIPES:
            num = count // _BLOCK_STRIPES * _BLOCK_STRIPES
            _add_blocks(target, data, secret, num // _BLOCK_STRIPES)  # pyright: ignore[reportCallIssue]
        else:
            num = min(count, _BLOCK_STRIPES - at)
            _add_stripes(target, data, secret + 8 * at, num)  # pyright: ignore[reportCallIssue]
            if at + num == _BLOCK_STRIPES:
                _scramble(sums)
        first, data, count = first + num, data + _STRIPE * num, count - num


@inlined
def _scramble(sums):
    secret = _SECRET.view(np.uint64)
    for i in range(8):
        mixed = sums[i] ^ (sums[i] >> np.uint64(47)) ^ secret[_BLOCK_STRIPES + i]
        sums[i] = mixed * np.uint64(_PRIME32_1)


@inlined
def _folded(a, b):
    # The two halves of the 128-bit product, one xor the other.
    low, high_a, high_b, high = (a & _LOW) * (b & _LOW), (a >> _HALF) * (b & _LOW), (a & _LOW) * (b >> _HALF), 0
    cross = (low >> _HALF) + (high_a & _LOW) + high_b
    high = (high_a >> _HALF) + (cross >> _HALF) + (a >> _HALF) * (b >> _HALF)
    return high ^ ((cross << _HALF) | (low & _LOW))


@inlined
def _last_stripe(parts, num_columns, room):
    # The sequence's last 64 bytes, gathered from its end.
    column, missing = num_columns - 1, np.int64(_STRIPE)
    while missing > 0:
        length = max(parts[2 * column + 1], 0)
        num = min(missing, length)
        copy(room.ctypes.data + missing - num, parts[2 * column] + length - num, num)  # pyright: ignore[reportCallIssue]
        missing -= num
        num = min(missing, 8)
        copy(room.ctypes.data + missing - num, parts.ctypes.data + 16 * column + 16 - num, num)  # pyright: ignore[reportCallIssue]
        missing -= num
        column -= 1


@inlined
def _digest(parts, num_columns, room, sums):
    total = np.int64(8 * num_columns)
    for c in range(num_columns):
        total += max(parts[2 * c + 1], 0)
    sums[:] = _START
    # The last stripe, whole or not, is added by itself.
    num_stripes, done, waiting = (total - 1) // _STRIPE, np.int64(0), np.int64(0)
    for part in range(2 * num_columns):
        # A length of -1, of null, is 2^64 - 1 as the digest has it.
        source = parts.ctypes.data + 8 * part + 8 if part % 2 == 0 else parts[part - 1]
        length = np.int64(8) if part % 2 == 0 else max(parts[part], 0)
        num = min(_STRIPE - waiting, length) if waiting or length < _STRIPE else np.int64(0)
        copy(room.ctypes.data + waiting, source, num)  # pyright: ignore[reportCallIssue]
        waiting, source, length = waiting + num, source + num, length - num
        if waiting == _STRIPE and done < num_stripes:
            _add(sums, room.ctypes.data, done, 1)
            done, waiting = done + 1, np.int64(0)
        num = min(length // _STRIPE, num_stripes - done)
        _add(sums, source, done, num)
        done, source, length = done + num, source + _STRIPE * num, length - _STRIPE * num
        copy(room.ctypes.data + waiting, source, length)  # pyright: ignore[reportCallIssue]
        waiting += length
    _last_stripe(parts, num_columns, room)
    _add_stripes(sums.ctypes.data, room.ctypes.data, _SECRET.ctypes.data + 121, 1)  # pyright: ignore[reportCallIssue]
    digest = np.uint64(total) * _PRIME64_1
    for i in range(4):
        digest += _folded(sums[2 * i] ^ _MERGE_SECRET[2 * i], sums[2 * i + 1] ^ _MERGE_SECRET[2 * i + 1])
    digest = (digest ^ (digest >> np.uint64(37))) * np.uint64(0x165667919E3779F9)
    return digest ^ (digest >> _HALF)


@called_by_address(numba.int64(numba.int64, numba.int64, numba.int64))
def digest_at(address, num_columns, scratch):
    """The digest of the sequence whose columns' addresses and lengths lie at `address`; `scratch` takes SCRATCH_BYTES."""
    parts = numba.carray(pointer(address), (2 * num_columns,), np.int64)
    room = numba.carray(pointer(scratch), (_STRIPE,), np.uint8)
    sums = numba.carray(pointer(scratch + _STRIPE), (8,), np.uint64)
    return np.int64(_digest(parts, num_columns, room, sums))


def sequence_digests(parts: NDArray[np.int64]) -> NDArray[np.uint64]:
    """The digests of sequences, (S,) uint64.

    Args:
        parts: (num sequences, num columns, 2) int64, address and number of bytes of each value; -1 bytes for null.
            Each sequence must have more than SHORT_BYTES bytes, 8 per column for its length included.
    """
    digests_S = np.empty(len(parts), np.uint64)
    _digests(np.ascontiguousarray(parts).reshape(len(parts), -1), digests_S)
    return digests_S


@compiled(numba.void(numba.int64[:, ::1], numba.uint64[::1]))
def _digests(parts, digests):
    room, sums = np.empty(_STRIPE, np.uint8), np.empty(8, np.uint64)
    for s in range(parts.shape[0]):
        digests[s] = _digest(parts[s], parts.shape[1] // 2, room, sums)
