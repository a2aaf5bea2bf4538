"""Everywhere that a library opens what may come from a stranger: each place is known, with the guard that stands before use."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "kdcache"

OPENERS = {
    "open_file", "open_stream", "read_record_batch", "read_message", "read_schema", "read_tensor", "ParquetFile",
    "ParquetDataset", "read_table", "read_feather", "CompressedInputStream",
    "decompress", "decompressobj", "ZipFile", "get_batch", "read_all", "read_next_batch", "iter_batches", "read_row_group",
    "to_batches", "load_from_disk", "load_dataset", "from_buffers", "from_stream", "deserialize", "unpack_archive",
}  # fmt: skip
"""What makes arrays, or memory, of a file's bytes. tarfile's `open` and YAML's `load` are found by their modules."""

GUARDS = {
    # Where: what is called -> what must be called before its result is used: in the same function, or in "file:function".
    "codec/base.py:binary_array from_buffers": "",  # of what a codec of ours has made
    "store/index.py:_publish to_batches": "",  # the same, of an index
    "store/records/arrow_file.py:open_arrow_buffer open_file": "_has_compression_or_dictionaries",
    "store/remote/remote_file.py:parse_tail open_file": "record_batch_spans",  # of the file its schema alone is read
    "store/remote/remote_file.py:parse_record_batch read_record_batch": "is_compressed",
    "store/remote/remote_file.py:parse_record_batch read_message": "is_compressed",
    "store/remote/remote_file.py:open_columns open_file": "is_compressed",
    "store/index.py:open_index read_all": "validate",
    "store/index.py:_file_lines get_batch": "validate",
    "store/reader.py:_open_batch get_batch": "store/records/batch.py:__init__ validate",
    "foreign/formats/tables.py:_columns read_schema": "",  # names and types: no values
    "foreign/formats/tables.py:_parquet_items ParquetFile": "check_parquet",
    "foreign/formats/tables.py:_parquet_items iter_batches": "check_parquet",
    "foreign/formats/megatron.py:_storages ZipFile": "sum",
    "foreign/formats/megatron.py:_decompressed CompressedInputStream": "max",
    "foreign/formats/megatron.py:_members open": "issparse",
    "inputs/formats/table_files.py:read_parquet ParquetFile": "check_parquet",
    "inputs/formats/table_files.py:read_parquet iter_batches": "inputs/formats/table_files.py:_items _validate",
    "inputs/formats/table_files.py:read_arrow open_file": "check_inflation",
    "inputs/formats/table_files.py:read_arrow open_stream": "check_inflation",
    "inputs/formats/table_files.py:read_arrow get_batch": "inputs/formats/table_files.py:_items _validate",
    "inputs/formats/table_files.py:table_columns read_schema": "",
    "inputs/formats/table_files.py:table_columns open_file": "",
    "inputs/formats/table_files.py:table_columns open_stream": "",
    "inputs/formats/table_files.py:_runs from_buffers": "inputs/formats/table_files.py:_items check_num_values",
    "inputs/formats/arrow_files.py:open_arrow open_file": "check_inflation",
    "inputs/formats/arrow_files.py:open_arrow open_stream": "check_inflation",
    "inputs/formats/arrow_files.py:open_arrow get_batch": "_validated",
    "inputs/formats/open_file.py:_begin CompressedInputStream": "inputs/formats/open_file.py:readinto InputError",
    "inputs/formats/_datasets.py:_open load_from_disk": "inputs/formats/_datasets.py:_values validate",
    "inputs/formats/_datasets.py:_open load_dataset": "",  # downloaded and converted by the library itself
    "inputs/formats/_datasets.py:_values to_batches": "validate",
    "config/yaml_text.py:parse_yaml load": "check_yaml_size",
    "teacher/served/client.py:_body decompressobj": "TeacherError",
    "teacher/served/client.py:_body decompress": "TeacherError",
}


def functions() -> Iterator[tuple[str, ast.AST]]:
    for path in sorted(ROOT.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield f"{path.relative_to(ROOT).as_posix()}:{node.name}", node


def names_in(node: ast.AST) -> set[str]:
    """What is called or named in a function: `pa.ipc.open_file` is given to `map` without a call."""
    found = {part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute)}
    return found | {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}


def openers_in(node: ast.AST) -> set[str]:
    found = set()
    for part in ast.walk(node):
        if isinstance(part, ast.Attribute):
            module = part.value.id if isinstance(part.value, ast.Name) else ""
            if part.attr in OPENERS or (module, part.attr) in (("tarfile", "open"), ("yaml", "load"), ("yaml", "safe_load")):
                found.add(part.attr)
    return found


NAMES = {}
for where, function in functions():
    NAMES[where] = NAMES.get(where, set()) | names_in(function)
FOUND = {f"{where} {opener}" for where, function in functions() for opener in openers_in(function)}


def test_every_place_that_opens_outside_data_is_known():
    assert FOUND - GUARDS.keys() == set()
    assert GUARDS.keys() - FOUND == set()


@pytest.mark.parametrize("place", [place for place, guard in GUARDS.items() if guard])
def test_its_guard_is_there(place: str):
    guard = GUARDS[place]
    where, _, name = guard.rpartition(" ")
    assert name in NAMES[where or place.partition(" ")[0]]
