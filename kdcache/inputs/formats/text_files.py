"""Items of text files: a whole file, its lines, or JSON values; gzip and zstd are decompressed.

Lines end at \\n only and are counted from 1, as in an editor; so a byte offset is enough to start from.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from typing import Any

import msgspec

from kdcache.errors import InputError
from kdcache.inputs.content import Fields, Item, Start, parse_item, parse_marks
from kdcache.inputs.formats.base import FileFormat, InputFile, also_compressed
from kdcache.inputs.formats.json_faults import json_fault
from kdcache.inputs.formats.json_values import read_lines as _lines
from kdcache.inputs.formats.json_values import read_values
from kdcache.inputs.formats.open_file import TextFiles


def read_txt(file: InputFile) -> Iterator[Item]:
    """Yield the one item of a file: all of it."""
    path = file.path
    if file.start.item_index:
        return
    with file.opener.open(path) as stream:
        data = stream.read(stream.max_item_bytes) if stream.is_compressed else stream.read()
        if stream.is_compressed and stream.read(1):
            raise InputError(
                f"{path}: the compressed file holds more than {stream.max_item_bytes:,} bytes; decompress it first"
            )
    yield Item(_decode(data.removeprefix(codecs.BOM_UTF8), path, first_line=1), path, file.start)


def read_lines(file: InputFile) -> Iterator[Item]:
    """Yield an item for each line, without its line end; a blank line is an empty item."""
    path = file.path
    with file.opener.open(path) as stream:
        for content, line_start in _lines(stream, path, file.start):
            line = line_start.item_index + 1
            yield Item(_decode(content, path, first_line=line).removesuffix("\r"), f"{path}:{line}", line_start)


def read_jsonl(file: InputFile) -> Iterator[Item]:
    """Yield an item for each JSON object: on lines of their own, in an array, or one after another; blank lines are skipped.

    Raises:
        InputError: a line that is not a JSON object, lacks a field, or has a field of the wrong type.
    """
    fields = file.fields
    for value, where, start in read_objects(file.path, file.start, opener=file.opener):
        for name in [*fields.content_names(list(value)), *fields.mark_names]:
            if name not in value:
                raise InputError(f"{where}: {_missing(name, value, file.path, fields)}")
        content = parse_item(value, fields, where, "field", is_table=False)
        yield Item(content, where, start, **parse_marks(value, fields, f"{where}: field"))


def read_objects(path: str, start: Start, *, opener: TextFiles) -> Iterator[tuple[dict[str, Any], str, Start]]:
    """Yield each JSON object of a file, its file and line in words, and where it starts.

    Raises:
        InputError: a value that is not a JSON object.
    """
    decoder = msgspec.json.Decoder()
    with opener.open(path) as stream:
        for data, where, value_start in read_values(stream, path, start):
            try:
                value = decoder.decode(data)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                raise InputError(f"{where}: {json_fault(data, error)}") from error
            if not isinstance(value, dict):
                raise InputError(f"{where}: holds a {type(value).__name__}, but a JSON object was expected")
            yield value, where, value_start


def _missing(name: str, value: dict[str, Any], path: str, fields: Fields) -> str:
    there = ", ".join(map(repr, value)) or "none"
    # Other .json files in a folder of JSON lines are often not data.
    other = "; to leave this file out, name the others in input.paths" if path.lower().endswith(".json") else ""
    return f"no field {name!r}; the line has {there} ({fields.advice(name, list(value))}){other}"


def _decode(data: bytes, path: str, *, first_line: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = first_line + data[: error.start].count(b"\n")
        raise InputError(
            f"{path}:{line}: not UTF-8 text (byte 0x{data[error.start]:02x}); convert the file to UTF-8"
        ) from error


TXT = FileFormat(read_txt, also_compressed(".txt"), has_fields=False)
LINES = FileFormat(read_lines, also_compressed(".txt"), has_fields=False)
JSONL = FileFormat(read_jsonl, also_compressed(".jsonl", ".ndjson", ".json"))
