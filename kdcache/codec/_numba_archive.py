"""The stream of `archive` in compiled loops, GIL released; `archive_reference.py` holds the definition it is tested against.

Encoding and decoding are one walk through the record: `_bit` codes the bit that it is given, or finds it. A coder is a tuple:
low end (encoding) or offset of the code in the range (decoding), range, place in the stream, whether it decodes.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from kdcache.codec._numba_compile import compiled
from kdcache.codec.archive_model import (
    CLASS_TREE_BITS,
    DELTAS,
    EXACTS,
    LEAST_P,
    MOST_ASKED,
    MOST_LEARNED_LENGTH,
    MOST_TREE_BITS,
    NEW_NODE,
    NUM_CLASSES,
    NUM_CONTEXTS,
    NUM_LENGTHS,
    NUMBER_STRIDE,
    OUTSIDES,
    RATES,
    SHARES,
    TAILS,
)

U16, U24, U32 = np.uint64(16), np.uint64(24), np.uint64(32)
FULL, SMALL = np.uint64(2**64 - 1), np.uint64(2**32)
HALF = 1 << 15
inlined = njit(nogil=True, error_model="numpy", forceinline=True)
shared = njit(nogil=True, error_model="numpy")


@inlined
def _word(stream, pos):
    word = np.uint64(0)
    for i in range(4):
        byte = np.uint64(stream[pos + i]) if pos + i < stream.shape[0] else np.uint64(0)
        word = (word << np.uint64(8)) | byte
    return word


@inlined
def _put(stream, pos, low):
    for i in range(4):
        stream[pos + i] = np.uint8((low >> (np.uint64(56) - np.uint64(8 * i))) & np.uint64(255))


@inlined
def _carry(stream, pos):
    place = pos - 1
    while stream[place] == 255:
        stream[place] = np.uint8(0)
        place -= 1
    stream[place] += np.uint8(1)


@inlined
def _bit(stream, coder, p, bit):
    """Code `bit`, or find it. p: of 2^16, that it is 1."""
    low, size, pos, is_decoding = coder
    p = min(max(p, LEAST_P), 65536 - LEAST_P)
    bound = (size >> U16) * np.uint64(p)
    if is_decoding:
        bit = np.int64(low < bound)
    # Without branches: which way a bit falls is what no processor can foretell.
    above = np.uint64(bit) - np.uint64(1)
    size = (bound & ~above) | ((size - bound) & above)
    if is_decoding:
        low -= bound & above
    else:
        low += bound & above
        if low < (bound & above):
            _carry(stream, pos)
    if size < SMALL:
        if is_decoding:
            low = (low << U32) | _word(stream, pos)
        else:
            _put(stream, pos, low)
            low <<= U32
        size <<= U32
        pos += 4
    return bit, (low, size, pos, is_decoding)


@inlined
def _learn(nodes, at, bit):
    at = np.uint64(at)
    state = np.int64(nodes[at])
    p, asked = state >> 10, state & 1023
    p += (((-bit & 4194303) - p) * RATES[np.uint64(asked)]) >> 16
    nodes[at] = (p << 10) | min(asked + 1, MOST_ASKED)


@inlined
def _learned_bit(stream, coder, nodes, at, bit):
    bit, coder = _bit(stream, coder, np.int64(nodes[np.uint64(at)]) >> 16, bit)
    _learn(nodes, at, bit)
    return bit, coder


@shared
def _number(stream, coder, nodes, context, value):
    """A number below 2^31: its length in unary, then its bits behind the leading one."""
    first = context * NUMBER_STRIDE
    length = 0
    while length < NUM_LENGTHS - 1:
        more, coder = _learned_bit(stream, coder, nodes, first + length, np.int64(value >> length != 0))
        if not more:
            break
        length += 1
    found, prefix = np.int64(min(length, 1)), 1
    for i in range(length - 2, -1, -1):
        bit = (value >> i) & 1
        if prefix < 8 and length <= MOST_LEARNED_LENGTH:
            bit, coder = _learned_bit(stream, coder, nodes, first + NUM_LENGTHS + 8 * (length - 1) + prefix, bit)
        else:
            bit, coder = _bit(stream, coder, HALF, bit)
        prefix = 2 * prefix + bit
        found = 2 * found + bit
    return found, coder


@shared
def _codes(stream, coder, nodes, codes, about):
    """Rising codes of one kind of entries, as differences. about: kind, the largest code."""
    kind, most = about
    before, step_before = np.int64(0), np.int64(0)
    for e in range(codes.shape[0]):
        rank = e if e < 2 else (2 if e < 4 else (3 if e < 8 else (4 if e < 16 else (5 if e < 32 else 6))))
        last = step_before if step_before < 2 else (2 if step_before < 4 else (3 if step_before < 10 else 4))
        step, coder = _number(stream, coder, nodes, DELTAS + (kind * 7 + rank) * 5 + last, np.int64(codes[e]) - before)
        before, step_before = before + step, step
        if before > most:
            return False, coder
        codes[e] = before
    return True, coder


@inlined
def _prediction(trees, node, kind):
    """Of 2^16, that the next bit of an id is 1; node 0 stands for bits that are even."""
    all_entries, classes = trees
    if node == 0:
        return np.int64(HALF)
    p = np.int64(all_entries[node]) >> 16
    if node < 1 << CLASS_TREE_BITS:
        state = np.int64(classes[kind, node])
        p += (((state >> 16) - p) * SHARES[state & 1023]) >> 10
    return p


@inlined
def _learn_ids(trees, node, kind, counts):
    all_entries, classes = trees
    if node == 0:
        return
    for bit in range(2):
        for _ in range(counts[bit]):
            _learn(all_entries, node, bit)
            if node < 1 << CLASS_TREE_BITS:
                _learn(classes[kind], node, bit)


@inlined
def _split(stream, coder, ids, powers, about):
    """How many of the sorted ids have a 1 at this bit: asked of one after another until one has, and with it the rest."""
    p, bit_place = about
    num_ids = ids.shape[0]
    power = np.int64(65536)
    for j in range(1, num_ids + 1):
        power = (power * p) >> 16
        powers[j] = power
    for i in range(num_ids):
        is_right, coder = _bit(stream, coder, powers[num_ids - i], np.int64(ids[i] >> bit_place) & 1)
        if is_right:
            return num_ids - i, coder
    return 0, coder


@inlined
def _one_id(stream, coder, trees, found, about):
    """The bits of one id from a place down. about: place, node, class; found: the id, or its leading bits where they are
    decoded."""
    place, node, kind = about
    all_entries, classes = trees
    found_bits = found >> (place + 1)
    while node and place >= 0 and node < 1 << CLASS_TREE_BITS:
        bit, coder = _bit(stream, coder, _prediction(trees, node, kind), (found >> place) & 1)
        _learn(all_entries, node, bit)
        _learn(classes[kind], node, bit)
        found_bits, node, place = 2 * found_bits + bit, 2 * node + bit, place - 1
    while node and place >= 0 and node < all_entries.shape[0]:
        bit, coder = _learned_bit(stream, coder, all_entries, node, (found >> place) & 1)
        found_bits, node, place = 2 * found_bits + bit, 2 * node + bit, place - 1
    while place >= 0:
        bit, coder = _bit(stream, coder, HALF, (found >> place) & 1)
        found_bits, place = 2 * found_bits + bit, place - 1
    return found_bits, coder


@shared
def _ids(stream, coder, trees, ids, scratch, about):
    """A set of ids, rising: from the leading bit down, how many have a 1 there. about: bits of an id, class.

    Returns:
        Whether they are distinct, coder.
    """
    width, kind = about
    stack, powers = scratch
    depth = 0
    stack[0, 0], stack[0, 1], stack[0, 2], stack[0, 3], stack[0, 4] = 0, ids.shape[0], width - 1, 1, 0
    while depth >= 0:
        start, end, place, node, prefix = stack[depth, 0], stack[depth, 1], stack[depth, 2], stack[depth, 3], stack[depth, 4]
        depth -= 1
        if place < 0:
            if end - start > 1:
                return False, coder
            ids[start] = prefix
            continue
        if width - 1 - place >= MOST_TREE_BITS:
            node = 0
        if end - start == 1:
            known = prefix << (place + 1) if coder[3] else np.int64(ids[start])
            ids[start], coder = _one_id(stream, coder, trees, known, (place, node, kind))
            continue
        p = _prediction(trees, node, kind)
        num_right, coder = _split(stream, coder, ids[start:end], powers, (p, place))
        middle = end - num_right
        _learn_ids(trees, node, kind, (middle - start, num_right))
        for side in range(1, -1, -1):
            first, last = (middle, end) if side else (start, middle)
            if first < last:
                depth += 1
                stack[depth, 0], stack[depth, 1], stack[depth, 2] = first, last, place - 1
                stack[depth, 3], stack[depth, 4] = 2 * node + side, 2 * prefix + side
    return True, coder


@shared
def _supports(stream, coder, models, entries, about):
    """The ids of one kind of entries, in groups of equal code. about: bits of an id, whether estimates, code of one draw."""
    trees, scratch = models
    ids, codes = entries
    width, is_estimate, single = about
    start = 0
    for e in range(1, codes.shape[0] + 1):
        if e < codes.shape[0] and codes[e] == codes[start]:
            continue
        kind = 0 if start == 0 else (1 if start < 4 else (2 if start < 16 else 3))
        if is_estimate:
            kind = 5 if codes[start] == single else 4
        are_distinct, coder = _ids(stream, coder, trees, ids[start:e], scratch, (width, kind))
        if not are_distinct:
            return False, coder
        start = e
    return True, coder


@shared
def _position(stream, coder, models, entries, about):
    """One position's entries. entries: ids, codes, number of exact ones; gives the number of exact ones, -1 for a corrupt
    stream."""
    numbers, trees, scratch = models
    ids, codes, num_exact = entries
    width, most_code, num_draws, stores_exact = about
    if stores_exact:
        num_exact, coder = _number(stream, coder, numbers, EXACTS + min(len(ids), 31), num_exact)
        if num_exact > len(ids):
            return -1, coder
    exact, others = codes[:num_exact], codes[num_exact:]
    is_sound, coder = _codes(stream, coder, numbers, exact, (np.int64(0), most_code))
    if is_sound and num_draws:
        is_sound, coder = _codes(stream, coder, numbers, others, (np.int64(1), num_draws - 1))
    if is_sound:
        is_sound, coder = _supports(
            stream, coder, (trees, scratch), (ids[:num_exact], exact), (width, np.int64(0), np.int64(0))
        )
    if is_sound:
        single = max(num_draws - 1, 0)
        is_sound, coder = _supports(stream, coder, (trees, scratch), (ids[num_exact:], others), (width, np.int64(1), single))
    return num_exact if is_sound else -1, coder


@shared
def _walk(stream, coder, arrays, about):
    """The whole record. Gives the number of outside targets, -1 for a corrupt stream, and the coder."""
    offsets, num_exact, ids, codes, tails, outside = arrays
    width, most_code, num_draws, stores_exact, most_tail, most_outside, num_outside, check = about
    numbers = np.full(NUM_CONTEXTS * NUMBER_STRIDE, NEW_NODE, np.uint32)
    tree_bits = min(width, MOST_TREE_BITS)
    trees = (np.full(1 << tree_bits, NEW_NODE, np.uint32), np.full((NUM_CLASSES, 1 << CLASS_TREE_BITS), NEW_NODE, np.uint32))
    most_entries = 0
    for p in range(num_exact.shape[0]):
        most_entries = max(most_entries, offsets[p + 1] - offsets[p])
    scratch = (np.empty((64, 5), np.int64), np.empty(most_entries + 1, np.int64))
    for p in range(num_exact.shape[0]):
        start, end = offsets[p], offsets[p + 1]
        entries = (ids[start:end], codes[start:end], num_exact[p])
        exact, coder = _position(stream, coder, (numbers, trees, scratch), entries, (width, most_code, num_draws, stores_exact))
        if exact < 0:
            return -1, coder
        num_exact[p] = exact
        if most_tail:
            context = min(end - start - exact, 63) if stores_exact else 0
            if not stores_exact and exact:
                context = min((np.int64(codes[start]) * 64) // (most_code + 1), 63)
            tails[p], coder = _number(stream, coder, numbers, TAILS + context, np.int64(tails[p]))
            if tails[p] > most_tail:
                return -1, coder
    num_outside, coder = _number(stream, coder, numbers, OUTSIDES + 1, num_outside)
    if num_outside > num_exact.shape[0]:
        return -1, coder
    for m in range(num_outside):
        outside[m], coder = _number(stream, coder, numbers, OUTSIDES, np.int64(outside[m]))
        if outside[m] > most_outside:
            return -1, coder
    for i in range(16):
        bit, coder = _bit(stream, coder, HALF, (check >> i) & 1)
        if bit != (check >> i) & 1:
            return -1, coder
    return num_outside, coder


_INTS = "int32[::1]"
_ARRAYS = f"Tuple((int64[::1], int64[::1], {_INTS}, {_INTS}, {_INTS}, {_INTS}))"
_ABOUT = "UniTuple(int64, 8)"


@compiled(f"UniTuple(int64, 2)(uint8[::1], {_ARRAYS}, {_ABOUT})")
def decode_stream(stream, arrays, about):
    """Fill arrays from the stream; gives the number of outside targets, -1 for a corrupt stream, and how many bytes were
    read."""
    low = (_word(stream, 0) << U32) | _word(stream, 4)
    num_outside, coder = _walk(stream, (low, FULL, np.int64(8), np.bool_(True)), arrays, about)
    return np.int64(num_outside), coder[2]


@compiled(f"int64(uint8[::1], {_ARRAYS}, {_ABOUT})")
def encode_stream(stream, arrays, about):
    """Write the stream, which must have room; gives how many bytes were written, -1 for a record that cannot be."""
    num_outside, coder = _walk(stream, (np.uint64(0), FULL, np.int64(0), np.bool_(False)), arrays, about)
    low, pos = coder[0], coder[2]
    _put(stream, pos, low)
    _put(stream, pos + 4, low << U32)
    return pos + 8 if num_outside >= 0 else np.int64(-1)
