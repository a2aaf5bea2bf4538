"""An input format in one file: texts that stand between lines of dashes."""

from __future__ import annotations

from collections.abc import Iterator

from kdcache.errors import InputError
from kdcache.inputs.content import Item, Start
from kdcache.inputs.formats.base import FileFormat, InputFile

BETWEEN = b"\n-----\n"


def read(file: InputFile) -> Iterator[Item]:
    """Yield the text before each line of dashes."""
    with open(file.path, "rb") as stream:
        stream.seek(file.start.offset)
        rest, offset, index = stream.read(), file.start.offset, file.start.item_index
    while BETWEEN in rest:
        text, _, rest = rest.partition(BETWEEN)
        yield Item(_decoded(text, file.path), f"{file.path}#{index}", Start(file.start.file_index, offset, index))
        offset, index = offset + len(text) + len(BETWEEN), index + 1
    if rest:
        raise InputError(f"{file.path}#{index}: the text does not end in a line of dashes")


def _decoded(text: bytes, path: str) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text") from error


DASHES = FileFormat(read, (".dashes",), has_fields=False)
