"""Decoding the stream of `archive` straight to where its entries belong, in compiled loops, GIL released.

`reference.py` holds the definition. Here a coder is a tuple: offset of the code in the range, range, addresses of the
next bytes and of the stream's end, after which 4 zeros stand. Memory of the model is known by its address: what a compiled
function is given as an array are seven values, and of those that are called for every id all have to stay in registers. A node
of the tree of ids is its leading bits after a 1, so that an id ends as a node of its own.

What no processor can foretell, the way a bit falls, costs as much as some ten instructions where it is asked by a branch. So
bits are chosen by masks; but where there is a branch on the bit anyway (how long a number is, where a set is split), the range
is chosen by it too, and is at hand as soon as the processor has guessed.

All of it is one file, since numba's copy on disk notices a change of this one alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

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
from kdcache.format.record import PADDING_ID

U16, U32 = np.uint64(16), np.uint64(32)
FULL, SMALL = np.uint64(2**64 - 1), np.uint64(2**32)
HALF, SURE = np.uint64(1 << 15), np.uint64(65536 - LEAST_P)
CLASS_LIMIT = 1 << CLASS_TREE_BITS
HALF_INFINITY = 0x7C00

as_instruction: Any = intrinsic  # its result is called with other arguments than it takes, which no type checker knows


@as_instruction
def _node(typing_context, address, index):  # noqa: ARG001 - numba's calling convention
    def generate(context, builder, signature, arguments):  # noqa: ARG001
        nodes = builder.inttoptr(arguments[0], ir.IntType(32).as_pointer())
        return builder.zext(builder.load(builder.gep(nodes, [arguments[1]])), ir.IntType(64))

    return types.int64(types.int64, types.int64), generate


@as_instruction
def _set_node(typing_context, address, index, state):  # noqa: ARG001
    def generate(context, builder, signature, arguments):  # noqa: ARG001
        nodes = builder.inttoptr(arguments[0], ir.IntType(32).as_pointer())
        builder.store(builder.trunc(arguments[2], ir.IntType(32)), builder.gep(nodes, [arguments[1]]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@as_instruction
def _word(typing_context, address):  # noqa: ARG001
    def generate(context, builder, signature, arguments):  # noqa: ARG001
        # The processor's order is little-endian everywhere that numba is.
        word = builder.load(builder.inttoptr(arguments[0], ir.IntType(32).as_pointer()), align=1)
        return builder.zext(builder.bswap(word), ir.IntType(64))

    return types.uint64(types.int64), generate


@inlined
def _bound(size, p):
    # p: of 2^16, that the bit is 1.
    return (size >> U16) * min(max(np.uint64(p), np.uint64(LEAST_P)), SURE)


@inlined
def _filled(coder):
    # The coder once its range is wide enough again.
    low, size, pos, end = coder
    if size < SMALL:
        low = (low << U32) | _word(min(pos, end))
        size <<= U32
        pos += 4
    return low, size, pos, end


@inlined
def _bit(coder, p):
    low, size, pos, end = coder
    bound = _bound(size, p)
    bit = np.int64(low < bound)
    above = np.uint64(bit) - np.uint64(1)
    size = (bound & ~above) | ((size - bound) & above)
    return bit, _filled((low - (bound & above), size, pos, end))


@inlined
def _branch(coder, p):
    # As `_bit`, where a branch on the bit follows.
    low, size, pos, end = coder
    bound = _bound(size, p)
    if low < bound:
        return True, _filled((low, bound, pos, end))
    return False, _filled((low - bound, size - bound, pos, end))


@inlined
def _learned(state, bit):
    # A node's state after a bit.
    p, asked = state >> 10, state & 1023
    p += (((-bit & 4194303) - p) * RATES[np.uint64(asked)]) >> 16
    return (p << 10) | min(asked + 1, MOST_ASKED)


@inlined
def _learned_bit(coder, nodes, at):
    state = _node(nodes, at)
    bit, coder = _bit(coder, state >> 16)
    _set_node(nodes, at, _learned(state, bit))
    return bit, coder


@inlined
def _value(coder, nodes):
    # nodes: address of the context's.
    length = np.int64(0)
    while length < NUM_LENGTHS - 1:
        state = _node(nodes, length)
        more, coder = _branch(coder, state >> 16)
        _set_node(nodes, length, _learned(state, np.int64(more)))
        if not more:
            break
        length += 1
    found = min(length, np.int64(1))
    for _ in range(length - 1):
        if found < 8 and length <= MOST_LEARNED_LENGTH:
            bit, coder = _learned_bit(coder, nodes, NUM_LENGTHS + 8 * (length - 1) + found)
        else:
            bit, coder = _bit(coder, HALF)
        found = 2 * found + bit
    return found, coder


@called
def _called_value(coder, nodes):
    return _value(coder, nodes)


@inlined
def _context(contexts, index):
    return contexts + 4 * VALUE_STRIDE * index


@called
def _codes(coder, contexts, codes, about):
    """Rising codes of one kind of entries. about: kind, how many, the largest code. Gives whether they are sound, and coder."""
    kind, count, most = about
    before, step = np.int64(0), np.int64(0)
    for e in range(count):
        rank = e if e < 2 else 2 + np.int64(e >= 4) + np.int64(e >= 8) + np.int64(e >= 16) + np.int64(e >= 32)
        last = min(step, 2) + np.int64(step >= 4) + np.int64(step >= 10)
        step, coder = _value(coder, _context(contexts, DELTAS + (kind * 7 + rank) * 5 + last))
        before += step
        if before > most:
            return False, coder
        _set_node(codes, e, before)
    return True, coder


@inlined
def _mixed(state, of_class):
    # Of 2^16, that the next bit is 1, by a node for all entries and one for a class.
    p = state >> 16
    return p + ((((of_class >> 16) - p) * SHARES[np.uint64(of_class & 1023)]) >> 10)


@called
def _one_id(coder, trees, node, limits):
    """From a node to an id. trees: addresses of the tree of all entries and of that of their class; limits: how many nodes the
    latter has, how many the former, and 2^bits of an id."""
    nodes, classes = trees
    class_limit, limit, end = limits
    while node < class_limit:
        state, of_class = _node(nodes, node), _node(classes, node)
        bit, coder = _bit(coder, _mixed(state, of_class))
        _set_node(nodes, node, _learned(state, bit))
        _set_node(classes, node, _learned(of_class, bit))
        node = 2 * node + bit
    if node < limit:
        state = _node(nodes, node)
        while node < limit >> 1:
            # Both children are fetched before it is known which is next.
            left, right = _node(nodes, 2 * node), _node(nodes, 2 * node + 1)
            bit, coder = _bit(coder, state >> 16)
            _set_node(nodes, node, _learned(state, bit))
            node = 2 * node + bit
            state = left + ((right - left) & -bit)
        bit, coder = _bit(coder, state >> 16)
        _set_node(nodes, node, _learned(state, bit))
        node = 2 * node + bit
    while node < end:
        bit, coder = _bit(coder, HALF)
        node = 2 * node + bit
    return node, coder


@inlined
def _num_right(coder, powers, p, count):
    # How many of several ids have a 1 next: asked of one after another until one has, and with it the rest.
    if count == 2:
        both, coder = _branch(coder, (p * p) >> 16)
        if both:
            return np.int64(2), coder
        return _bit(coder, p)
    power = np.int64(65536)
    for j in range(1, count + 1):
        power = (power * p) >> 16
        _set_node(powers, j, power)
    while count:
        is_right, coder = _branch(coder, _node(powers, count))
        if is_right:
            break
        count -= 1
    return count, coder


@inlined
def _learn_all(nodes, node, num_left, count):
    state = _node(nodes, node)
    for i in range(count):
        state = _learned(state, np.int64(i >= num_left))
    _set_node(nodes, node, state)


@called
def _id_set(coder, trees, scratch, about):
    """A set of ids, rising. scratch: addresses of where they go, of room for powers and of a stack; about: how many, limits.
    Gives whether they are distinct, and the coder."""
    ids, powers, stack = scratch
    count, limits = about
    nodes, classes = trees
    class_limit, limit, end = limits
    node, depth, at = np.int64(1), np.int64(0), np.int64(0)
    while True:
        while count > 1:
            if node >= end:
                return False, coder
            p = np.int64(HALF)
            if node < class_limit:
                p = _mixed(_node(nodes, node), _node(classes, node))
            elif node < limit:
                p = _node(nodes, node) >> 16
            num_right, coder = _num_right(coder, powers, p, count)
            if node < limit:
                _learn_all(nodes, node, count - num_right, count)
            if node < class_limit:
                _learn_all(classes, node, count - num_right, count)
            if 0 < num_right < count:  # the left ones first; at most one set waits at each bit
                _set_node(stack, 2 * depth, 2 * node + 1)
                _set_node(stack, 2 * depth + 1, num_right)
                depth += 1
                node, count = 2 * node, count - num_right
            else:
                node = 2 * node + np.int64(num_right != 0)
        node, coder = _one_id(coder, trees, node, limits)
        _set_node(ids, at, node - end)
        at += 1
        if depth == 0:
            return True, coder
        depth -= 1
        node, count = _node(stack, 2 * depth), _node(stack, 2 * depth + 1)


@called
def _supports(coder, trees, scratch, about):
    """The ids of one position, in groups of equal code. about: exact entries, all, code of one draw, limits."""
    nodes, classes = trees
    codes, ids, powers, stack = scratch
    exact, count, single, limits = about
    start = np.int64(0)
    while start < count:
        stop = exact if start < exact else count
        code, e = _node(codes, start), start + 1
        while e < stop and _node(codes, e) == code:
            e += 1
        kind = np.int64(start > 0) + np.int64(start >= 4) + np.int64(start >= 16)
        if start >= exact:
            kind = 4 + np.int64(code == single)
        here = (nodes, classes + 4 * CLASS_LIMIT * kind)
        if e == start + 1:
            node, coder = _one_id(coder, here, np.int64(1), limits)
            _set_node(ids, start, node - limits[2])
        else:
            are_distinct, coder = _id_set(coder, here, (ids + 4 * start, powers, stack), (e - start, limits))
            if not are_distinct:
                return False, coder
        start = e
    return True, coder


@inlined
def _position(coder, model, scratch, counts, about):
    """One position. model: addresses of contexts, tree and classes; counts: entries, and exact ones where the stream does not
    say. Gives the number of exact ones (-1 for a corrupt stream), the tail's code, and the coder."""
    contexts, tree, classes = model
    codes = scratch[0]
    count, exact = counts
    limits, most_code, num_draws, stores_exact, most_tail = about
    corrupt = np.int64(-1)
    if stores_exact:
        exact, coder = _called_value(coder, _context(contexts, EXACTS + min(count, 31)))
    if not 0 <= exact <= count:
        return corrupt, corrupt, coder
    is_sound, coder = _codes(coder, contexts, codes, (np.int64(0), exact, most_code))
    if is_sound and num_draws:
        is_sound, coder = _codes(coder, contexts, codes + 4 * exact, (np.int64(1), count - exact, num_draws - 1))
    elif is_sound:
        for e in range(exact, count):
            _set_node(codes, e, 0)
    if is_sound:
        is_sound, coder = _supports(coder, (tree, classes), scratch, (exact, count, max(num_draws - 1, 0), limits))
    if not is_sound:
        return corrupt, corrupt, coder
    tail = np.int64(0)
    if most_tail:
        context = np.int64(0)
        if stores_exact:
            context = min(count - exact, 63)
        elif exact:
            context = _node(codes, 0) * 64 // (most_code + 1)
        tail, coder = _called_value(coder, _context(contexts, TAILS + context))
    return exact if tail <= most_tail else corrupt, tail, coder


@inlined
def _put_exact(codes, bits, logprobs, levels):
    # The logprobs of levels or (without) of negative float16. bits: the same memory as logprobs.
    if levels.shape[0]:
        for e in range(logprobs.shape[0]):
            logprobs[e] = levels[codes[e]]
        return
    for e in range(bits.shape[0]):  # a normal number by moving its bits; see numba_unpack.py
        bits[e] = (codes[e] << np.uint32(13)) + np.uint32(0x38000000)
    for e in range(bits.shape[0]):
        value = np.float32(np.int32(codes[e])) * np.float32(2.0**-24) if codes[e] < 0x400 else logprobs[e]
        logprobs[e] = -np.float32(np.inf) if codes[e] == HALF_INFINITY else -value


@inlined
def _put(entries, out, span, tables):
    # One position's ids and logprobs. entries: ids, codes, number of exact ones; span: where it begins and ends.
    ids, codes, exact = entries
    out_ids, out_logprobs = out
    start, stop = span
    levels, log_counts, log_tail, log_tau = tables
    count, logprobs = ids.shape[0], out_logprobs[start:stop]
    out_ids[start : start + count] = ids
    out_ids[start + count : stop] = np.int32(PADDING_ID)
    _put_exact(codes[:exact], out_logprobs.view(np.uint32)[start : start + exact], logprobs[:exact], levels)
    for e in range(exact, count):
        logprobs[e] = np.float32(log_counts[codes[e]] + log_tail) if log_counts.shape[0] else log_tau
    logprobs[count:] = -np.float32(np.inf)


@inlined
def _ending(coder, contexts, outside, about):
    # What stands after the last position. Gives the number of outside targets, -1 for a corrupt stream, and the coder.
    most_outside, check = about
    num_outside, coder = _called_value(coder, _context(contexts, OUTSIDES + 1))
    if num_outside > outside.shape[0]:
        return np.int64(-1), coder
    is_sound = True
    for m in range(num_outside):
        code, coder = _called_value(coder, _context(contexts, OUTSIDES))
        is_sound &= code <= most_outside
        outside[m] = code
    for i in range(16):
        bit, coder = _bit(coder, HALF)
        is_sound &= bit == (check >> i) & 1
    return num_outside if is_sound else np.int64(-1), coder


_NUM_OTHER_NODES, _STACK_SIZE = NUM_CONTEXTS * VALUE_STRIDE + NUM_CLASSES * CLASS_LIMIT, 64


def room_for(id_bits: int, most_entries: int) -> int:
    """How many uint32 of memory `decode_entries` needs, by the most entries of a position."""
    return (1 << min(id_bits, MOST_TREE_BITS)) + _NUM_OTHER_NODES + _STACK_SIZE + 3 * most_entries + 1


_POSITIONS = "Tuple((int64[::1], int64[::1], int64[:, ::1]))"
_OUT = "Tuple((int32[::1], float32[::1], float32[::1], int32[::1]))"
_SINGLE, _DOUBLE = (f"Array({kind}, 1, 'C', readonly=True)" for kind in ("float32", "float64"))
_TABLES = f"Tuple(({_SINGLE}, {_DOUBLE}, {_SINGLE}, {_DOUBLE}))"


@compiled(f"UniTuple(int64, 3)(uint8[::1], uint32[::1], {_POSITIONS}, {_OUT}, {_TABLES}, UniTuple(int64, 7), float32)")
def decode_entries(stream, room, positions, out, tables, about, log_tau):
    """Write what the stream says.

    Args:
        stream: with 4 zeros after it; at least 8 bytes.
        room: `room_for` them, of any content. Held by the caller, since addresses in it do not keep it.
        positions: offsets_P1; (P,) numbers of exact entries, which are filled in where the stream has them; (P, 2) where a
            position's entries begin in the flat arrays, -1 for nowhere, and where their padding ends.
        out: flat ids and logprobs; (P,) tail masses; (P,) codes of outside targets.
        tables: logprobs of codes, none for float16; logarithms of shares of draws by code, none without; tail masses by code,
            and their logarithms.
        about: bits of an id, largest code, draws or 0, whether numbers of exact entries are stored, largest code of a tail or
            0, of an outside target, 16 bits to check.
        log_tau: logprob of estimates that are not counts.

    Returns:
        The number of outside targets, -1 for a corrupt stream; how many bytes were read; the largest id.
    """
    offsets, num_exact, spans = positions
    out_ids, out_logprobs, tail_masses, outside = out
    levels, log_counts, masses, log_masses = tables
    width, most_code, num_draws, stores_exact, most_tail, most_outside, check = about
    tree_size = np.int64(1) << min(width, MOST_TREE_BITS)
    num_nodes, most_entries = tree_size + _NUM_OTHER_NODES, np.int64(0)
    room[:num_nodes] = NEW_NODE
    for p in range(num_exact.shape[0]):
        most_entries = max(most_entries, offsets[p + 1] - offsets[p])
    base, stack = np.int64(room.ctypes.data), num_nodes + 3 * most_entries + 1
    codes = room[num_nodes : num_nodes + most_entries]
    ids = room[num_nodes + most_entries : num_nodes + 2 * most_entries].view(np.int32)
    model = (base + 4 * (tree_size + NUM_CLASSES * CLASS_LIMIT), base, base + 4 * tree_size)
    scratch = (
        base + 4 * num_nodes,
        base + 4 * (num_nodes + most_entries),
        base + 4 * (num_nodes + 2 * most_entries),
        base + 4 * stack,
    )
    limits = (min(CLASS_LIMIT, tree_size), tree_size, np.int64(1) << width)
    first, largest = np.int64(stream.ctypes.data), np.int32(-1)
    coder = ((_word(first) << U32) | _word(first + 4), FULL, first + 8, first + stream.shape[0] - 4)
    for p in range(num_exact.shape[0]):
        count = offsets[p + 1] - offsets[p]
        exact, tail, coder = _position(
            coder, model, scratch, (count, num_exact[p]), (limits, most_code, num_draws, stores_exact, most_tail)
        )
        if exact < 0:
            return np.int64(-1), np.int64(0), np.int64(0)
        num_exact[p], tail_masses[p] = exact, masses[tail]
        for e in range(count):
            largest = max(largest, ids[e])
        if spans[p, 0] >= 0:
            entries, span = (ids[:count], codes[:count], exact), (spans[p, 0], spans[p, 1])
            _put(entries, (out_ids, out_logprobs), span, (levels, log_counts, log_masses[tail], log_tau))
    num_outside, coder = _ending(coder, model[0], outside, (most_outside, check))
    return num_outside, coder[2] - first, np.int64(largest)
