"""What Arrow IPC files say of their messages: the few flatbuffer fields that bound what opening them allocates.

Arrow allocates what a compressed buffer says it holds, 33 kB of zstd become 1 GB, and pyarrow does not say beforehand. So these
fields are read in front of Arrow, with nothing but `struct`. Arrow has two ways to say that buffers are compressed: a field of
the record batch and, in messages of its metadata version V4, a key beside them. Record batches that overlap, or that are named
again and again, are refused for the same reason: their rows would be more than the file holds.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

# Numbers of the fields in Arrow's File.fbs and Message.fbs.
_FOOTER_VERSION, _FOOTER_DICTIONARIES, _FOOTER_RECORD_BATCHES = 0, 2, 3
_MESSAGE_VERSION, _MESSAGE_HEADER, _MESSAGE_METADATA = 0, 2, 4
_RECORD_BATCH_COMPRESSION = 3
_V5 = 4
"""Arrow's metadata version since 2020 (1.0), as its enumeration counts."""
_MAGIC_BYTES = 8
"""In front of the first message: the magic word, padded."""
_BLOCK_BYTES = 24
TRAILER_BYTES = 10
"""Behind the footer: its length and the magic word."""


class MessagePlace(NamedTuple):
    """Where a message starts in its file, and the bytes of its metadata and of its buffers."""

    offset: int
    metadata_bytes: int
    body_bytes: int

    @property
    def stop(self) -> int:
        """Where it ends."""
        return self.offset + self.metadata_bytes + self.body_bytes


def footer_bytes(data: memoryview) -> int:
    """Bytes of the footer of the file that ends with these bytes; raises struct.error where there cannot be one."""
    (num_bytes,) = struct.unpack_from("<i", data, len(data) - TRAILER_BYTES)
    if num_bytes < 0:
        raise struct.error("a footer of less than nothing")
    return num_bytes


def record_batch_places(data: memoryview, file_bytes: int) -> list[MessagePlace] | None:
    """Where a file's record batches are, from its last bytes, the footer among them; None where there are dictionaries.

    Args:
        data: the end of the file.
        file_bytes: of the whole file.

    Raises:
        struct.error: no Arrow footer of metadata version V5, or record batches that do not lie one after another in the file.
    """
    footer = data[len(data) - TRAILER_BYTES - footer_bytes(data) : len(data) - TRAILER_BYTES]
    root = _follow(footer, 0)
    if not _is_v5(footer, _field(footer, root, _FOOTER_VERSION)):
        raise struct.error("a footer of another metadata version than V5")
    if _blocks(footer, _field(footer, root, _FOOTER_DICTIONARIES)):
        return None
    places = _blocks(footer, _field(footer, root, _FOOTER_RECORD_BATCHES))
    end = _MAGIC_BYTES
    for place in places:
        if place.offset < end:
            raise struct.error("record batches that overlap, are named twice, or do not stand in the file's order")
        end = place.stop
    if end > max(file_bytes - TRAILER_BYTES - len(footer), _MAGIC_BYTES):
        raise struct.error("a record batch that ends behind its file's data")
    return places


def _blocks(footer: memoryview, field: int | None) -> list[MessagePlace]:
    """Where the messages of a vector of blocks are."""
    if field is None:
        return []
    vector = _follow(footer, field)
    (count,) = struct.unpack_from("<I", footer, vector)
    if count * _BLOCK_BYTES > len(footer):
        raise struct.error("more record batches than the footer has room for")
    places = [MessagePlace(*struct.unpack_from("<qi4xq", footer, vector + 4 + i * _BLOCK_BYTES)) for i in range(count)]
    if any(min(place) < 0 for place in places):
        raise struct.error("a record batch in front of the file, or of less than nothing")
    return places


def is_compressed(message: memoryview) -> bool:
    """Whether a record batch's message says that its buffers are compressed, or may be: in another metadata version than V5, or
    with keys of its own, which no file of a cache has."""
    (marker,) = struct.unpack_from("<I", message, 0)
    metadata = message[8 if marker == 0xFFFFFFFF else 4 :]
    root = _follow(metadata, 0)
    if not _is_v5(metadata, _field(metadata, root, _MESSAGE_VERSION)) or _field(metadata, root, _MESSAGE_METADATA) is not None:
        return True
    header = _field(metadata, root, _MESSAGE_HEADER)
    return header is not None and _field(metadata, _follow(metadata, header), _RECORD_BATCH_COMPRESSION) is not None


def _is_v5(data: memoryview, field: int | None) -> bool:
    return field is not None and struct.unpack_from("<h", data, field) == (_V5,)


def _follow(data: memoryview, place: int) -> int:
    (distance,) = struct.unpack_from("<I", data, place)
    return place + distance


def _field(data: memoryview, table: int, number: int) -> int | None:
    """Where a table's field is, or None where the table does not have it."""
    (distance,) = struct.unpack_from("<i", data, table)
    vtable = table - distance
    if vtable < 0:
        raise struct.error("a table that starts in front of its data")
    (vtable_bytes,) = struct.unpack_from("<H", data, vtable)
    entry = 4 + 2 * number
    if entry + 2 > vtable_bytes:
        return None
    (offset,) = struct.unpack_from("<H", data, vtable + entry)
    return table + offset if offset else None
