"""Encoding the stream of `archive` in compiled loops, GIL released; `reference.py` holds the definition.

A coder is a tuple: low end of the range, range, offset in the stream, which must have room.
"""

from __future__ import annotations

import numpy as np

from kdcache.codec.archive.model import (
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
    OUTSIDES,
    RATES,
    SHARES,
    TAILS,
    VALUE_STRIDE,
)
from kdcache.compiled import called, compiled, inlined

U16, U32 = np.uint64(16), np.uint64(32)
FULL, SMALL = np.uint64(2**64 - 1), np.uint64(2**32)
HALF = 1 << 15


@inlined
def _put(stream, pos, low):
    for i in range(4):
        stream[pos + i] = np.uint8((low >> (np.uint64(56) - np.uint64(8 * i))) & np.uint64(255))


@inlined
def _carry(stream, pos):
    at = pos - 1
    while stream[at] == 255:
        stream[at] = np.uint8(0)
        at -= 1
    stream[at] += np.uint8(1)


@inlined
def _bit(stream, coder, p, bit):
    # p: of 2^16, that it is 1.
    low, size, pos = coder
    bound = (size >> U16) * np.uint64(min(max(p, LEAST_P), 65536 - LEAST_P))
    # Without branches: which way a bit falls is what no processor can foretell.
    above = np.uint64(bit) - np.uint64(1)
    size = (bound & ~above) | ((size - bound) & above)
    low += bound & above
    if low < (bound & above):
        _carry(stream, pos)
    if size < SMALL:
        _put(stream, pos, low)
        low, size, pos = low << U32, size << U32, pos + 4
    return low, size, pos


@inlined
def _learn(nodes, at, bit):
    at = np.uint64(at)
    state = np.int64(nodes[at])
    p, asked = state >> 10, state & 1023
    p += (((-bit & 4194303) - p) * RATES[np.uint64(asked)]) >> 16
    nodes[at] = (p << 10) | min(asked + 1, MOST_ASKED)


@inlined
def _learned_bit(stream, coder, nodes, at, bit):
    coder = _bit(stream, coder, np.int64(nodes[np.uint64(at)]) >> 16, bit)
    _learn(nodes, at, bit)
    return coder


@called
def _value(stream, coder, nodes, context, value):
    """A number below 2^31: its length in unary, then its bits after the leading one."""
    first, length = context * VALUE_STRIDE, 0
    while length < NUM_LENGTHS - 1:
        more = np.int64(value >> length != 0)
        coder = _learned_bit(stream, coder, nodes, first + length, more)
        if not more:
            break
        length += 1
    for i in range(length - 2, -1, -1):
        prefix, bit = value >> (i + 1), (value >> i) & 1
        if prefix < 8 and length <= MOST_LEARNED_LENGTH:
            coder = _learned_bit(stream, coder, nodes, first + NUM_LENGTHS + 8 * (length - 1) + prefix, bit)
        else:
            coder = _bit(stream, coder, HALF, bit)
    return coder


@called
def _codes(stream, coder, nodes, codes, kind):
    """Rising codes of one kind of entries, as differences."""
    before, step = np.int64(0), np.int64(0)
    for e in range(codes.shape[0]):
        rank = e if e < 2 else (2 if e < 4 else (3 if e < 8 else (4 if e < 16 else (5 if e < 32 else 6))))
        last = step if step < 2 else (2 if step < 4 else (3 if step < 10 else 4))
        step = np.int64(codes[e]) - before
        coder = _value(stream, coder, nodes, DELTAS + (kind * 7 + rank) * 5 + last, step)
        before += step
    return coder


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
    p, shift = about
    num_ids = ids.shape[0]
    power = np.int64(65536)
    for j in range(1, num_ids + 1):
        power = (power * p) >> 16
        powers[j] = power
    for i in range(num_ids):
        is_right = np.int64(ids[i] >> shift) & 1
        coder = _bit(stream, coder, powers[num_ids - i], is_right)
        if is_right:
            return num_ids - i, coder
    return 0, coder


@inlined
def _one_id(stream, coder, trees, value, about):
    """The bits of one id from a bit down. about: its shift, node, class."""
    shift, node, kind = about
    all_entries, classes = trees
    while node and shift >= 0 and node < 1 << CLASS_TREE_BITS:
        bit = (value >> shift) & 1
        coder = _bit(stream, coder, _prediction(trees, node, kind), bit)
        _learn(all_entries, node, bit)
        _learn(classes[kind], node, bit)
        node, shift = 2 * node + bit, shift - 1
    while node and shift >= 0 and node < all_entries.shape[0]:
        bit = (value >> shift) & 1
        coder = _learned_bit(stream, coder, all_entries, node, bit)
        node, shift = 2 * node + bit, shift - 1
    while shift >= 0:
        coder = _bit(stream, coder, HALF, (value >> shift) & 1)
        shift -= 1
    return coder


@called
def _ids(stream, coder, trees, ids, scratch, about):
    """A set of ids, rising: from the leading bit down, how many have a 1 there. about: bits of an id, class.

    Returns:
        Whether they are distinct, coder.
    """
    width, kind = about
    stack, powers = scratch
    depth = 0
    stack[0, 0], stack[0, 1], stack[0, 2], stack[0, 3] = 0, ids.shape[0], width - 1, 1
    while depth >= 0:
        start, end, shift, node = stack[depth, 0], stack[depth, 1], stack[depth, 2], stack[depth, 3]
        depth -= 1
        if shift < 0:
            if end - start > 1:
                return False, coder
            continue
        if width - 1 - shift >= MOST_TREE_BITS:
            node = 0
        if end - start == 1:
            coder = _one_id(stream, coder, trees, np.int64(ids[start]), (shift, node, kind))
            continue
        num_right, coder = _split(stream, coder, ids[start:end], powers, (_prediction(trees, node, kind), shift))
        middle = end - num_right
        _learn_ids(trees, node, kind, (middle - start, num_right))
        for side in range(1, -1, -1):  # what is put on last, the left ones, is taken up first
            first, last = (middle, end) if side else (start, middle)
            if first < last:
                depth += 1
                stack[depth, 0], stack[depth, 1], stack[depth, 2], stack[depth, 3] = first, last, shift - 1, 2 * node + side
    return True, coder


@called
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


@called
def _position(stream, coder, models, entries, about):
    """One position's entries. entries: ids, codes, number of exact ones. Gives whether ids are distinct, coder."""
    contexts, trees, scratch = models
    ids, codes, num_exact = entries
    width, num_draws, stores_exact = about
    if stores_exact:
        coder = _value(stream, coder, contexts, EXACTS + min(len(ids), 31), num_exact)
    exact, others = codes[:num_exact], codes[num_exact:]
    coder = _codes(stream, coder, contexts, exact, np.int64(0))
    if num_draws:
        coder = _codes(stream, coder, contexts, others, np.int64(1))
    are_distinct, coder = _supports(stream, coder, (trees, scratch), (ids[:num_exact], exact), (width, False, np.int64(0)))
    if are_distinct:
        single = max(num_draws - 1, 0)
        are_distinct, coder = _supports(stream, coder, (trees, scratch), (ids[num_exact:], others), (width, True, single))
    return are_distinct, coder


@inlined
def _tail_context(codes, num_exact, about):
    most_code, stores_exact = about
    if stores_exact:
        return min(codes.shape[0] - num_exact, 63)
    return min((np.int64(codes[0]) * 64) // (most_code + 1), 63) if num_exact else np.int64(0)


_INTS = "int32[::1]"


@compiled(f"int64(uint8[::1], Tuple((int64[::1], int64[::1], {_INTS}, {_INTS}, {_INTS}, {_INTS})), UniTuple(int64, 8))")
def encode_stream(stream, arrays, about):
    """Write the stream, which must have room; gives how many bytes were written, -1 for a record that cannot be."""
    offsets, all_exact, ids, codes, tails, outside = arrays
    width, most_code, num_draws, stores_exact, most_tail, _, num_outside, check = about
    contexts = np.full(NUM_CONTEXTS * VALUE_STRIDE, NEW_NODE, np.uint32)
    tree_bits = min(width, MOST_TREE_BITS)
    trees = (np.full(1 << tree_bits, NEW_NODE, np.uint32), np.full((NUM_CLASSES, 1 << CLASS_TREE_BITS), NEW_NODE, np.uint32))
    most_entries = 0
    for p in range(all_exact.shape[0]):
        most_entries = max(most_entries, offsets[p + 1] - offsets[p])
    scratch = (np.empty((64, 4), np.int64), np.empty(most_entries + 1, np.int64))
    coder = (np.uint64(0), FULL, np.int64(0))
    for p in range(all_exact.shape[0]):
        start, end, num_exact = offsets[p], offsets[p + 1], all_exact[p]
        entries = (ids[start:end], codes[start:end], num_exact)
        are_distinct, coder = _position(stream, coder, (contexts, trees, scratch), entries, (width, num_draws, stores_exact))
        if not are_distinct:
            return np.int64(-1)
        if most_tail:
            context = _tail_context(codes[start:end], num_exact, (most_code, stores_exact))
            coder = _value(stream, coder, contexts, TAILS + context, np.int64(tails[p]))
    coder = _value(stream, coder, contexts, OUTSIDES + 1, num_outside)
    for m in range(num_outside):
        coder = _value(stream, coder, contexts, OUTSIDES, np.int64(outside[m]))
    for i in range(16):
        coder = _bit(stream, coder, HALF, (check >> i) & 1)
    low, pos = coder[0], coder[2]
    _put(stream, pos, low)
    _put(stream, pos + 4, low << U32)
    return pos + 8
