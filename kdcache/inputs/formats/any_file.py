"""Files of text or ids in any known format, as held-out data is read. (A capture names its format.)"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing

from kdcache.errors import InputError
from kdcache.inputs.content import BEGINNING, DEFAULT_FIELDS, Fields, Item, parse_content
from kdcache.inputs.formats.base import InputFile
from kdcache.inputs.formats.open_file import TextFiles
from kdcache.inputs.formats.table_files import read_arrow, read_parquet, table_columns
from kdcache.inputs.formats.text_files import read_objects


def read_text_or_ids(path: str) -> Iterator[Item]:
    """Yield the items of a Parquet or Arrow file, or of JSON, also compressed: each item's `text`, or else its `input_ids`.

    Raises:
        InputError: a file that cannot be read, or an item with neither field or with one of the wrong type; names the item.
    """
    if os.path.isdir(path):
        raise InputError(f"{path} is a folder; name one of its files")
    found, columns = table_columns(path)
    if found is None:
        with closing(TextFiles()) as opener:
            yield from _json_items(path, opener)
        return
    kind = "ids" if "text" not in columns and "input_ids" in columns else "text"
    read = read_parquet if found == "parquet" else read_arrow
    yield from read(InputFile(path, Fields(DEFAULT_FIELDS[kind], kind)))


def _json_items(path: str, opener: TextFiles) -> Iterator[Item]:
    for value, where, start in read_objects(path, BEGINNING, opener=opener):
        kind = "text" if value.get("text") is not None or "input_ids" not in value else "ids"
        name = DEFAULT_FIELDS[kind]
        if name not in value:
            there = ", ".join(map(repr, value)) or "none"
            raise InputError(f"{where}: neither 'text' nor 'input_ids'; the item has {there}")
        yield Item(parse_content(value[name], kind, f"{where}: field {name!r}"), where, start)
