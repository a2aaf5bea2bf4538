"""Where the fields of an Arrow IPC file's flatbuffers lie in its bytes, and one random change to any of them."""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass

_BLOCKS, _HEADER = 3, 2
"""Fields of a footer and of a message."""

NUMBERS = [
    0, 1, -1, 2, 7, 8, 63, 64, 65, 255, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**60, 2**61, 2**62, 2**63 - 1,
    -(2**31), -(2**63), -8, -64,
]  # fmt: skip


@dataclass(frozen=True)
class RecordBatchAt:
    """Offsets in a file: of a batch's length, of its nodes' and buffers' pairs of int64, and of its body."""

    length: int | None
    nodes: list[int]
    buffers: list[int]
    metadata: tuple[int, int]
    body: int


def footer(data: bytearray) -> tuple[int, int]:
    """Where a file's footer starts and ends."""
    end = len(data) - 10
    return end - _int(data, end, 4), end


def blocks(data: bytearray) -> list[int]:
    """Where the places of its record batches are written: int64 offset, int32 metadata length, int64 body length."""
    start, _ = footer(data)
    vector = _field(data, _follow(data, start), _BLOCKS)
    return [] if vector is None else _items(data, vector, 24)


def record_batch(data: bytearray, block: int) -> RecordBatchAt:
    """The fields of the record batch that a block names."""
    offset, num_bytes = _int(data, block, 8), _int(data, block + 8, 4)
    message = _follow(data, offset + 8)
    header = _field(data, message, _HEADER)
    assert header is not None
    batch = _follow(data, header)
    nodes, buffers = _field(data, batch, 1), _field(data, batch, 2)
    assert nodes is not None
    assert buffers is not None
    return RecordBatchAt(
        _field(data, batch, 0),
        _items(data, nodes, 16),
        _items(data, buffers, 16),
        (offset + 8, offset + num_bytes),
        offset + num_bytes,
    )


def mutated(file: bytes, rng: random.Random) -> bytes:
    """The file with one to five changes, most of them to numbers that say where something is and how long."""
    data = bytearray(file)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 5))):
        try:
            rng.choice(_CHANGES)(data, rng)
        except (struct.error, AssertionError, IndexError, ValueError):
            continue  # an earlier change has left nothing there
    return bytes(data)


def _change_number(data: bytearray, rng: random.Random) -> None:
    """A node's length or nulls, a buffer's offset or length, a batch's length."""
    batch = record_batch(data, rng.choice(blocks(data)))
    places = [*batch.nodes, *batch.buffers, *batch.buffers]
    at = rng.choice([rng.choice(places) + 8 * rng.randrange(2), batch.length or batch.nodes[0]])
    _put(data, at, 8, _other(_int(data, at, 8), len(data), rng))


def _change_offset(data: bytearray, rng: random.Random) -> None:
    """A number in a buffer: of lists' offsets, as a rule."""
    start, num_bytes = _buffer(data, rng)
    width = rng.choice((4, 4, 4, 8))
    at = start + rng.randrange(num_bytes // width) * width
    _put(data, at, width, _other(_int(data, at, width), num_bytes, rng))


def _change_value(data: bytearray, rng: random.Random) -> None:
    start, num_bytes = _buffer(data, rng)
    data[start + rng.randrange(num_bytes)] = rng.choice((0, 255, 1, 128, rng.randrange(256)))


def _change_metadata(data: bytearray, rng: random.Random) -> None:
    """A byte of a message, of the schema or of the footer."""
    first = _int(data, blocks(data)[0], 8)
    start, end = rng.choice([record_batch(data, rng.choice(blocks(data))).metadata, (8, first), footer(data)])
    data[start + rng.randrange(end - start)] = rng.choice((0, 255, 1, 2, 4, 8, rng.randrange(256)))


def _change_block(data: bytearray, rng: random.Random) -> None:
    """A place in the footer: another number, or that of another batch."""
    every = blocks(data)
    part, width = rng.choice(((0, 8), (8, 4), (16, 8)))
    at = rng.choice(every) + part
    other = _other(_int(data, at, width), len(data), rng)
    _put(data, at, width, other if rng.random() < 0.7 else _int(data, rng.choice(every) + part, width))


def _overlap(data: bytearray, rng: random.Random) -> None:
    """Two buffers at one place."""
    batch = record_batch(data, rng.choice(blocks(data)))
    one, other = rng.sample(batch.buffers, 2)
    data[one : one + 16] = data[other : other + 16]


_CHANGES = (
    [_change_number] * 4 + [_change_offset] * 3 + [_change_value, _change_metadata, _change_metadata, _change_block, _overlap]
)


def _buffer(data: bytearray, rng: random.Random) -> tuple[int, int]:
    batch = record_batch(data, rng.choice(blocks(data)))
    at = rng.choice(batch.buffers)
    start, num_bytes = batch.body + _int(data, at, 8), _int(data, at + 8, 8)
    assert num_bytes > 0
    assert 0 <= start <= len(data) - num_bytes
    return start, num_bytes


def _other(old: int, size: int, rng: random.Random) -> int:
    return rng.choice(
        (
            old + rng.choice((1, -1, 2, -2, 4, -4, 8, -8, 16, 64, -64, 4096)),
            rng.choice(NUMBERS),
            old * rng.choice((2, 8, -1, 2**20)),
            rng.randrange(max(size, 1)),
        )
    )


def _int(data: bytearray, at: int, width: int) -> int:
    assert 0 <= at <= len(data) - width
    return int.from_bytes(data[at : at + width], "little", signed=True)


def _put(data: bytearray, at: int, width: int, value: int) -> None:
    assert 0 <= at <= len(data) - width
    most = 2 ** (8 * width - 1)
    data[at : at + width] = min(max(value, -most), most - 1).to_bytes(width, "little", signed=True)


def _follow(data: bytearray, at: int) -> int:
    return at + (_int(data, at, 4) & 0xFFFFFFFF)


def _field(data: bytearray, table: int, number: int) -> int | None:
    """Where a flatbuffer table's field lies; None where it has none."""
    vtable = table - _int(data, table, 4)
    if 4 + 2 * number >= _int(data, vtable, 2):
        return None
    offset = _int(data, vtable + 4 + 2 * number, 2)
    return table + offset if offset else None


def _items(data: bytearray, field: int, width: int) -> list[int]:
    vector = _follow(data, field)
    return [vector + 4 + width * number for number in range(min(_int(data, vector, 4), 4096))]
