"""What Arrow IPC files say of their messages: the few flatbuffer fields that bound what opening them allocates.

Arrow allocates what a compressed buffer says it holds, 33 kB of zstd become 1 GB, and pyarrow does not say beforehand. So these
fields are read in front of Arrow, with nothing but `struct`. Arrow has two ways to say that buffers are compressed: a field of
the record batch and, in messages of its metadata version V4, further keys. Record batches that overlap, or that are named
again and again, are refused for the same reason: their sequences would be more than the file holds.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

# Numbers of the fields in Arrow's File.fbs and Message.fbs.
_FOOTER_VERSION, _FOOTER_DICTIONARIES, _FOOTER_RECORD_BATCHES = 0, 2, 3
_MESSAGE_VERSION, _MESSAGE_HEADER_TYPE, _MESSAGE_HEADER, _MESSAGE_BODY_BYTES, _MESSAGE_METADATA = 0, 1, 2, 3, 4
_DICTIONARY, _RECORD_BATCH = 2, 3
"""Of the kinds of a message."""
_DICTIONARY_DATA, _RECORD_BATCH_BUFFERS, _RECORD_BATCH_COMPRESSION = 1, 2, 3
_CONTINUATION = 0xFFFFFFFF
_MAGIC = b"ARROW1"
_V5 = 4
"""Arrow's metadata version since 2020 (1.0), as its enumeration counts."""
_MAGIC_BYTES = 8
"""In front of the first message: the magic word, padded."""
_BLOCK_BYTES = 24
TRAILER_BYTES = 10
"""After the footer: its length and the magic word."""


class JoinedStreamsError(struct.error):
    """More data follows the end of a stream: a reader would leave it out without a word."""


class MessageSpan(NamedTuple):
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


def record_batch_spans(data: memoryview, file_bytes: int) -> list[MessageSpan] | None:
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
    spans = _blocks(footer, _field(footer, root, _FOOTER_RECORD_BATCHES))
    end = _MAGIC_BYTES
    for span in spans:
        if span.offset < end:
            raise struct.error("record batches that overlap, are named twice, or do not stand in the file's order")
        end = span.stop
    if end > max(file_bytes - TRAILER_BYTES - len(footer), _MAGIC_BYTES):
        raise struct.error("a record batch that ends after its file's data")
    return spans


def _blocks(footer: memoryview, field: int | None) -> list[MessageSpan]:
    """Where the messages of a vector of blocks are."""
    if field is None:
        return []
    vector = _follow(footer, field)
    (count,) = struct.unpack_from("<I", footer, vector)
    if count * _BLOCK_BYTES > len(footer):
        raise struct.error("more record batches than the footer has room for")
    spans = [MessageSpan(*struct.unpack_from("<qi4xq", footer, vector + 4 + i * _BLOCK_BYTES)) for i in range(count)]
    if any(min(span) < 0 for span in spans):
        raise struct.error("a record batch in front of the file, or of less than nothing")
    return spans


def is_compressed(message: memoryview) -> bool:
    """Whether a record batch's message says that its buffers are compressed, or may be: in another metadata version than V5, or
    with keys of its own, which no file of a cache has."""
    metadata = _metadata(message)
    root = _follow(metadata, 0)
    if not _is_v5(metadata, _field(metadata, root, _MESSAGE_VERSION)) or _field(metadata, root, _MESSAGE_METADATA) is not None:
        return True
    kind, header = _field(metadata, root, _MESSAGE_HEADER_TYPE), _field(metadata, root, _MESSAGE_HEADER)
    if header is None:
        return False
    batch = _batch_of(metadata, header, is_dictionary=kind is not None and metadata[kind] == _DICTIONARY)
    return _field(metadata, batch, _RECORD_BATCH_COMPRESSION) is not None


def message_sizes(data: memoryview) -> Iterator[tuple[int, int]]:
    """The bytes of each message's body in an Arrow IPC file or stream, and the bytes that its buffers claim to be once they are
    decompressed.

    Raises:
        struct.error: no Arrow data, or messages that overlap or leave it.
    """
    for message, body in _file_messages(data) if bytes(data[: len(_MAGIC)]) == _MAGIC else _stream_messages(data):
        yield len(body), _claimed_bytes(message, body)


def _file_messages(data: memoryview) -> Iterator[tuple[memoryview, memoryview]]:
    footer_at = len(data) - TRAILER_BYTES - footer_bytes(data)
    footer = data[footer_at : len(data) - TRAILER_BYTES]
    root, end = _follow(footer, 0), _MAGIC_BYTES
    spans = [
        span
        for field in (_FOOTER_DICTIONARIES, _FOOTER_RECORD_BATCHES)
        for span in _blocks(footer, _field(footer, root, field))
    ]
    for span in sorted(spans):
        if span.offset < end or span.stop > footer_at:
            raise struct.error("messages that overlap, are named twice, or leave the file")
        end, body_at = span.stop, span.offset + span.metadata_bytes
        yield data[span.offset : body_at], data[body_at : span.stop]


def _stream_messages(data: memoryview) -> Iterator[tuple[memoryview, memoryview]]:
    at = 0
    while at + 8 <= len(data):
        marker, num_bytes = struct.unpack_from("<Ii", data, at)
        is_old = marker != _CONTINUATION
        num_bytes, body_at = (marker, at + 4 + marker) if is_old else (num_bytes, at + 8 + num_bytes)
        if num_bytes == 0:
            if bytes(data[body_at:]).strip(b"\0"):
                raise JoinedStreamsError
            return
        message = data[at:body_at]
        body_field = _field(_metadata(message), _follow(_metadata(message), 0), _MESSAGE_BODY_BYTES)
        (body_bytes,) = (0,) if body_field is None else struct.unpack_from("<q", _metadata(message), body_field)
        if num_bytes < 0 or body_bytes < 0 or body_at + body_bytes > len(data):
            raise struct.error("a message that leaves its stream")
        yield message, data[body_at : body_at + body_bytes]
        at = body_at + body_bytes


def _claimed_bytes(message: memoryview, body: memoryview) -> int:
    """Of the decompressed buffers of a dictionary or record batch; the body's own for any other message."""
    metadata = _metadata(message)
    root = _follow(metadata, 0)
    kind, header = _field(metadata, root, _MESSAGE_HEADER_TYPE), _field(metadata, root, _MESSAGE_HEADER)
    if kind is None or header is None or metadata[kind] not in (_DICTIONARY, _RECORD_BATCH) or not is_compressed(message):
        return len(body)
    batch = _batch_of(metadata, header, is_dictionary=metadata[kind] == _DICTIONARY)
    buffers = _field(metadata, batch, _RECORD_BATCH_BUFFERS)
    if buffers is None:
        return len(body)
    vector, total = _follow(metadata, buffers), 0
    for i in range(struct.unpack_from("<I", metadata, vector)[0]):
        offset, num_bytes = struct.unpack_from("<qq", metadata, vector + 4 + 16 * i)
        claimed = struct.unpack_from("<q", body, offset)[0] if num_bytes >= 8 and offset >= 0 else 0
        total += num_bytes if claimed == -1 else claimed  # -1: this one is not compressed
        if claimed < -1 or num_bytes < 0:
            raise struct.error("a buffer of less than nothing")
    return total


def _batch_of(metadata: memoryview, header: int, *, is_dictionary: bool) -> int:
    """Where the table of a record batch is: a dictionary's is inside it."""
    table = _follow(metadata, header)
    inner = _field(metadata, table, _DICTIONARY_DATA) if is_dictionary else None
    return table if inner is None else _follow(metadata, inner)


def _metadata(message: memoryview) -> memoryview:
    (marker,) = struct.unpack_from("<I", message, 0)
    return message[8 if marker == _CONTINUATION else 4 :]


def _is_v5(data: memoryview, field: int | None) -> bool:
    return field is not None and struct.unpack_from("<h", data, field) == (_V5,)


def _follow(data: memoryview, offset: int) -> int:
    (distance,) = struct.unpack_from("<I", data, offset)
    return offset + distance


def _field(data: memoryview, table: int, index: int) -> int | None:
    """Where a table's field is, or None where the table does not have it."""
    (distance,) = struct.unpack_from("<i", data, table)
    vtable = table - distance
    if vtable < 0:
        raise struct.error("a table that starts in front of its data")
    (vtable_bytes,) = struct.unpack_from("<H", data, vtable)
    entry = 4 + 2 * index
    if entry + 2 > vtable_bytes:
        return None
    (offset,) = struct.unpack_from("<H", data, vtable + entry)
    return table + offset if offset else None
