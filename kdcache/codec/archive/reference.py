"""The stream of `archive`, defined: a decoder in plain Python, slow and obvious. `_numba_decode.py` is the fast path.

**Bits.** A range of 64 bits, at first 2^64 - 1 wide, and the first 8 bytes of the stream, big-endian, as an offset in it. A bit
that is 1 with probability p / 2^16 (p held within 32 and 2^16 - 32): the lowest floor(width / 2^16) p of the range mean 1,
the rest 0; the range becomes that part, and while it is narrower than 2^32 both are shifted by 32 bits, 4 bytes of the stream
coming in. The stream ends with the last byte that came in so; zeros follow up to one byte for 64 entries.

**Nodes** and contexts are in `model.py`. **Numbers**, **codes** and **sets of ids** are the methods below; `decode`
is the order of all. Of a position: the number of exact entries where the selection does not fix it; the codes of exact
entries, then of estimates that are counts (of N draws, count c has the code N - c); the ids of both, a set for each group of
equal code; the tail's code. After the last position: how many targets outside the support have a logprob, their codes, and 16
even bits, the lowest first, of (entries + 257 positions) mod 2^16.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from kdcache.codec.archive import model


@dataclass(frozen=True)
class Layout:
    """What a stream holds, by its codec and selection.

    Attributes:
        id_bits: of the largest id.
        num_draws: of estimates that are counts, or 0.
        stores_exact: whether the numbers of exact entries are in the stream.
        most_code: largest code of an exact entry.
        has_tail: whether there are codes of tails.
    """

    id_bits: int
    num_draws: int
    stores_exact: bool
    most_code: int
    has_tail: bool


@dataclass
class Record:
    """What was decoded: as in `Distributions`, with codes for numbers."""

    num_exact: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)
    tail_codes: list[int] = field(default_factory=list)
    outside_codes: list[int] = field(default_factory=list)


class Decoder:
    """One stream. Trusts it."""

    def __init__(self, stream: bytes, layout: Layout) -> None:
        self._stream, self._layout = stream, layout
        self._width, self._offset, self._next = 2**64 - 1, int.from_bytes(stream[:8], "big"), 8
        self._nodes: dict[tuple[object, ...], int] = {}

    def decode(self, num_entries: list[int], num_exact: list[int]) -> Record:
        """All positions. num_exact: of each, where the stream does not hold them."""
        record = Record()
        for p, (count, given) in enumerate(zip(num_entries, num_exact, strict=True)):
            self._position(record, count, self._value(model.EXACTS + min(count, 31)) if self._layout.stores_exact else given)
            if self._layout.has_tail:
                record.tail_codes.append(self._value(model.TAILS + self._tail_context(record, p, count)))
        record.outside_codes = [0] * self._value(model.OUTSIDES + 1)
        record.outside_codes = [self._value(model.OUTSIDES) for _ in record.outside_codes]
        check = sum(self._bit(1 << 15) << i for i in range(16))
        assert check == (sum(num_entries) + 257 * len(num_entries)) % 2**16
        return record

    @property
    def num_bytes(self) -> int:
        """How many of the stream's bytes came in."""
        return self._next

    def _bit(self, p: int) -> int:
        bound = (self._width >> 16) * min(max(p, model.LEAST_P), 2**16 - model.LEAST_P)
        bit = int(self._offset < bound)
        self._width = bound if bit else self._width - bound
        self._offset -= 0 if bit else bound
        if self._width < 2**32:
            incoming = self._stream[self._next : self._next + 4].ljust(4, b"\0")
            self._offset = self._offset << 32 | int.from_bytes(incoming, "big")
            self._width, self._next = self._width << 32, self._next + 4
        return bit

    def _state(self, node: tuple[object, ...]) -> tuple[int, int]:
        """(p of 2^22, how often asked)."""
        return divmod(self._nodes.get(node, model.NEW_NODE), 1024)

    def _learn(self, node: tuple[object, ...], bit: int) -> None:
        p, asked = self._state(node)
        p += (((2**22 - 1 if bit else 0) - p) * int(model.RATES[asked])) >> 16
        self._nodes[node] = p << 10 | min(asked + 1, model.MOST_ASKED)

    def _learned_bit(self, node: tuple[object, ...]) -> int:
        bit = self._bit(self._state(node)[0] >> 6)
        self._learn(node, bit)
        return bit

    def _value(self, context: int) -> int:
        """Its length in bits, in unary; then the bits after the leading one, of which the first three are learned."""
        length = 0
        while length < model.NUM_LENGTHS - 1 and self._learned_bit((context, "length", length)):
            length += 1
        value = min(length, 1)
        for _ in range(length - 1):
            is_learned = value < 8 and length <= model.MOST_LEARNED_LENGTH
            bit = self._learned_bit((context, length, value)) if is_learned else self._bit(1 << 15)
            value = 2 * value + bit
        return value

    def _position(self, record: Record, count: int, num_exact: int) -> None:
        record.num_exact.append(num_exact)
        exact = self._codes(0, num_exact)
        others = self._codes(1, count - num_exact) if self._layout.num_draws else [0] * (count - num_exact)
        for codes, is_estimate in ((exact, False), (others, True)):
            for start, end in _groups(codes):
                kind = (0, 1, 1, 1)[start] if start < 4 else 2 if start < 16 else 3
                if is_estimate:
                    kind = 5 if codes[start] == max(self._layout.num_draws - 1, 0) else 4
                record.token_ids += self._ids(end - start, kind, 0, 1)
            record.codes += codes

    def _codes(self, kind: int, count: int) -> list[int]:
        """Rising; each as the difference from the one before, in the context of its rank and of the difference before."""
        codes: list[int] = []
        before, step = 0, 0
        for e in range(count):
            rank = e if e < 2 else 2 + sum(e >= bound for bound in (4, 8, 16, 32))
            last = step if step < 2 else 2 + sum(step >= bound for bound in (4, 10))
            step = self._value(model.DELTAS + (kind * 7 + rank) * 5 + last)
            before += step
            codes.append(before)
        return codes

    def _tail_context(self, record: Record, p: int, count: int) -> int:
        num_exact = record.num_exact[p]
        if self._layout.stores_exact:
            return min(count - num_exact, 63)
        first = len(record.codes) - count
        return min(record.codes[first] * 64 // (self._layout.most_code + 1), 63) if num_exact else 0

    def _ids(self, count: int, kind: int, depth: int, node: int) -> list[int]:
        """A set of ids below a node of the tree of ids (1 is its root; node 2n has a 0 next, 2n + 1 a 1), rising.

        One after another is asked, in rising order, whether its bit is 1: if it is, so are those of all after it. With j ids
        left, that is so with probability p^j.
        """
        if count == 0:
            return []
        if depth == self._layout.id_bits:
            assert count == 1
            return [node - (1 << depth)]
        is_learned = depth < min(self._layout.id_bits, model.MOST_TREE_BITS)
        p = self._id_prediction(node, kind, depth) if is_learned else 1 << 15
        powers = [1 << 16]
        for _ in range(count):
            powers.append(powers[-1] * p >> 16)
        num_left = 0
        while num_left < count and not self._bit(powers[count - num_left]):
            num_left += 1
        for bit in [0] * num_left + [1] * (count - num_left) if is_learned else []:
            self._learn(("ids", node), bit)
            if depth < model.CLASS_TREE_BITS:
                self._learn(("ids", node, kind), bit)
        left = self._ids(num_left, kind, depth + 1, 2 * node)
        return left + self._ids(count - num_left, kind, depth + 1, 2 * node + 1)

    def _id_prediction(self, node: int, kind: int, depth: int) -> int:
        p = self._state(("ids", node))[0] >> 6
        if depth < model.CLASS_TREE_BITS:
            of_kind, asked = self._state(("ids", node, kind))
            p += ((of_kind >> 6) - p) * int(model.SHARES[asked]) >> 10
        return p


def _groups(codes: list[int]) -> list[tuple[int, int]]:
    ends = [e for e in range(1, len(codes) + 1) if e == len(codes) or codes[e] != codes[e - 1]]
    return list(zip([0, *ends], ends, strict=False))
