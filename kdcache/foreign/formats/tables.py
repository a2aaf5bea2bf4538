"""Items of Parquet, Arrow and JSON-lines files, a few at a time, whatever is in them.

An item is a mapping of column -> cell. `flat` and `nested` make arrays of a cell, be it Arrow's or JSON's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from kdcache.errors import InputError
from kdcache.inputs.content import BEGINNING
from kdcache.inputs.formats.arrow_files import open_arrow
from kdcache.inputs.formats.open_file import TextFiles
from kdcache.inputs.formats.parquet_bounds import check_parquet, items_at_once
from kdcache.inputs.formats.text_files import read_objects
from kdcache.store.files.regular import leads_inside

COMPRESSED = (".gz", ".zst")
ENDINGS = {
    ".parquet": "parquet", ".arrow": "arrow", ".feather": "arrow", ".ipc": "arrow", ".jsonl": "jsonl", ".ndjson": "jsonl",
    ".json": "jsonl",
}  # fmt: skip
ITEMS_PER_READ = 8
ITEMS_TO_LOOK_AT = 16
"""To tell a layout by: the first answers of an engine may be empty."""

MAX_POSITIONS_PER_SEQUENCE = 2**24
_DESCRIPTIONS = {
    "dataset_info.json",
    "state.json",
    "dataset_dict.json",
    "compression_config.yaml",
    "README.md",
    ".gitattributes",
}

Cells = Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """Files of one kind with the same columns.

    Attributes:
        kind: `parquet`, `arrow` or `jsonl`.
        files: in the order of their names.
        columns_of: of each file; for JSON lines the keys of its first line, none for a file without lines.
        left_out: files of the folder that are not read, as their endings are of no kind that is known here.
    """

    kind: str
    files: tuple[Path, ...]
    columns_of: tuple[tuple[str, ...], ...]
    left_out: tuple[Path, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of all files, in the order in which they are found."""
        return tuple(dict.fromkeys(name for columns in self.columns_of for name in columns))

    def items(self, columns: list[str]) -> Iterator[tuple[str, Cells]]:
        """(where it is, the named columns) of each item; columns that no file has are left out.

        Raises:
            InputError: a file that cannot be read, or that lacks a named column which others have.
        """
        self._check_alike(set(columns))
        for path in self.files:
            yield from _READERS[self.kind](path, columns)

    def first_items(self, columns: Sequence[str]) -> Iterator[Cells]:
        """The first few items, to tell a layout by; columns that are not there are left out."""
        items = (item for path in self.files for _, item in _READERS[self.kind](path, list(columns)))
        return islice(items, ITEMS_TO_LOOK_AT)

    def _check_alike(self, needed: set[str]) -> None:
        """A file that lacks a column would be left out item by item, without a word."""
        having = {name: path for path, there in zip(self.files, self.columns_of, strict=True) for name in needed & {*there}}
        for path, there in zip(self.files, self.columns_of, strict=True):
            if there and (missing := sorted(having.keys() - {*there})):
                raise InputError(
                    f"{path}: has no column {missing[0]!r}, which {having[missing[0]].name} has (there are "
                    f"{', '.join(map(repr, there))}); files that are read together need the same columns: name one file, or "
                    "move the others away"
                )


def open_table(path: str | Path) -> Table | None:
    """Open the files at a path, which is one of them or a folder of them; None if it holds none.

    Raises:
        InputError: a file cannot be read or names a column twice, or a folder holds several kinds.
    """
    files, left_out = _files(Path(path))
    kinds = {str(_kind_of(file)) for file in files}
    if not files:
        return None
    if len(kinds) > 1:
        raise InputError(f"{path}: holds {' and '.join(sorted(kinds))} files; name one of them, or a folder with one kind")
    (kind,) = kinds
    return Table(kind, tuple(files), tuple(_columns(kind, file) for file in files), tuple(left_out))


def flat(cell: Any, where: str) -> NDArray[Any] | None:
    """A list of numbers, or of booleans as masks are, as an array; None for null.

    Raises:
        InputError: it is something else, or holds nulls.
    """
    if isinstance(cell, pa.Scalar):
        if not cell.is_valid:
            return None
        values: Any = getattr(cell, "values", None)
        is_array = isinstance(values, pa.Array)
        if not is_array or not (_is_numeric(values.type) or pa.types.is_boolean(values.type)) or values.null_count:
            nulls = " with nulls" if is_array and values.null_count else ""
            raise InputError(f"{where}: expected a list of numbers, found {cell.type}{nulls}")
        return values.to_numpy(zero_copy_only=False)
    if cell is None:
        return None
    if isinstance(cell, list) and cell and all(type(value) is bool for value in cell):
        return np.array(cell)
    return _numeric(cell, where)


def nested(cell: Any, where: str) -> tuple[NDArray[Any], NDArray[np.int64]] | None:
    """A list of lists of numbers as (all numbers, the length of each list); a null list is empty. None for null.

    Raises:
        InputError: it is something else, or holds nulls among the numbers.
    """
    if isinstance(cell, pa.Scalar):
        return _nested_arrow(cell, where) if cell.is_valid else None
    if cell is None:
        return None
    if not isinstance(cell, list) or not all(item is None or isinstance(item, list) for item in cell):
        raise InputError(f"{where}: expected a list of lists of numbers, found {_kind(cell)}")
    items = [_numeric(item or [], where) for item in cell]
    return _joined(items), np.array([len(item) for item in items], np.int64)


def plain(cell: Any, where: str = "") -> Any:
    """Any cell as lists, dicts, numbers and text.

    Raises:
        InputError: it holds more values than any real one: nulls and empty lists take no bytes in a file, and many here.
    """
    if not isinstance(cell, pa.Scalar):
        return cell
    values: Any = getattr(cell, "values", None)
    while isinstance(values, pa.Array):
        check_num_positions(values, where or "a cell")
        values = values.flatten() if _is_list(values.type) else None
    return cell.as_py(maps_as_pydicts="lossy")


def _nested_arrow(cell: Any, where: str) -> tuple[NDArray[Any], NDArray[np.int64]]:
    items: Any = getattr(cell, "values", None)
    if isinstance(items, pa.Array) and pa.types.is_null(items.type):
        check_num_positions(items, where)
        return np.zeros(0), np.zeros(len(items), np.int64)
    if not isinstance(items, pa.Array) or not _is_list(items.type):
        raise InputError(f"{where}: expected a list of lists of numbers, found {cell.type}")
    check_num_positions(items, where)
    values = items.flatten()
    if not _is_numeric(values.type) or values.null_count:
        raise InputError(
            f"{where}: expected a list of lists of numbers, found {cell.type}{' with nulls' * bool(values.null_count)}"
        )
    return values.to_numpy(zero_copy_only=False), list_lengths(items)


def check_num_positions(items: pa.Array, where: str) -> None:
    """Raise InputError for more positions than a real sequence has: empty ones take no bytes in a file, and eight here."""
    if len(items) > MAX_POSITIONS_PER_SEQUENCE:
        raise InputError(f"{where}: {len(items):,} positions of one sequence; at most {MAX_POSITIONS_PER_SEQUENCE:,} are read")


def list_lengths(items: pa.Array) -> NDArray[np.int64]:
    """Return (P,) the elements of each list; 0 for a null one."""
    counts = pc.call_function("coalesce", [pc.call_function("list_value_length", [items]), pa.scalar(0, pa.int64())])
    return counts.to_numpy(zero_copy_only=False).astype(np.int64)


def _numeric(cell: Any, where: str) -> NDArray[Any]:
    if not isinstance(cell, list) or not all(type(value) in (int, float) for value in cell):
        raise InputError(f"{where}: expected a list of numbers, found {_kind(cell)}")
    try:
        values = np.array(cell) if cell else np.zeros(0)
        # Whole numbers beyond 64 bits stay Python's own; they must be some float's at least.
        return values.astype(np.float64) if values.dtype == object else values
    except OverflowError as error:
        raise InputError(f"{where}: a number is too large: {error}") from error


def _joined(items: list[NDArray[Any]]) -> NDArray[Any]:
    kept = [item for item in items if len(item)]
    return np.concatenate(kept) if kept else np.zeros(0)


def _kind(cell: Any) -> str:
    if isinstance(cell, list) and cell:
        odd = next((value for value in cell if type(value) not in (int, float)), None)
        return f"a list with a {type(odd).__name__}"
    return f"a {type(cell).__name__}"


def _is_numeric(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _files(path: Path) -> tuple[list[Path], list[Path]]:
    """The files to read, and those of a folder that are passed over."""
    if path.is_file():
        return [path] if _kind_of(path) else [], []
    if not path.is_dir():
        return [], []
    there = sorted(file for file in path.rglob("*") if not file.is_dir())
    found = [file for file in there if _kind_of(file) and file.is_file() and file.name not in _DESCRIPTIONS]
    # What a stranger's link names elsewhere is no part of the folder.
    found = [file for file in found if not file.name.startswith((".", "cache-")) and leads_inside(file, path)]
    # A .json beside files of items describes them, as `datasets` has it; alone it holds the items.
    wanted = [file for file in found if file.suffix.lower() != ".json"] or found
    return wanted, [file for file in there if file not in set(wanted) and file.name not in _DESCRIPTIONS]


def _kind_of(path: Path) -> str | None:
    """Tell the kind of a file by its ending; JSON lines may be compressed."""
    ending = path.suffix.lower()
    if ending not in COMPRESSED:
        return ENDINGS.get(ending)
    return "jsonl" if ENDINGS.get(path.with_suffix("").suffix.lower()) == "jsonl" else None


def _columns(kind: str, path: Path) -> tuple[str, ...]:
    if kind == "jsonl":
        return tuple(next((item for _, item in _jsonl_items(path, None)), {}))
    with _translated(path):
        if kind == "parquet":
            names = pq.read_schema(path).names
        else:
            with pa.memory_map(str(path)) as source:
                names = open_arrow(source, str(path))[0].names
    twice = next((name for index, name in enumerate(names) if name in names[:index]), None)
    if twice is not None:
        raise InputError(f"{path}: has two columns {twice!r}; which of them is meant cannot be told: rename one")
    return tuple(names)


def _parquet_items(path: Path, columns: list[str] | None) -> Iterator[tuple[str, Cells]]:
    with _translated(path), pq.ParquetFile(path) as table:
        names = [name for name in table.schema_arrow.names if columns is None or name in columns]
        check_parquet(table.metadata, str(path))
        index = 0
        num_items = items_at_once(table.metadata, names, path.stat().st_size, ITEMS_PER_READ)
        for batch in table.iter_batches(batch_size=num_items, columns=names):
            batch.validate(full=True)  # Parquet's text may be no UTF-8
            yield from _batch_items(batch, path, index)
            index += batch.num_rows


def _arrow_items(path: Path, columns: list[str] | None) -> Iterator[tuple[str, Cells]]:
    with _translated(path), pa.memory_map(str(path)) as source:
        schema, batches = open_arrow(source, str(path))
        names = [name for name in schema.names if columns is None or name in columns]
        index = 0
        for batch in batches:
            yield from _batch_items(batch.select(names), path, index)
            index += batch.num_rows


def _jsonl_items(path: Path, _columns: list[str] | None) -> Iterator[tuple[str, Cells]]:
    with _translated(path):
        for item, where, _ in read_objects(str(path), BEGINNING, opener=TextFiles()):
            yield where, item


_READERS: dict[str, Callable[[Path, list[str] | None], Iterator[tuple[str, Cells]]]] = {
    "parquet": _parquet_items, "arrow": _arrow_items, "jsonl": _jsonl_items,
}  # fmt: skip


def _batch_items(batch: pa.RecordBatch, path: Path, first: int) -> Iterator[tuple[str, Cells]]:
    for index in range(batch.num_rows):
        cells = {name: batch.column(column)[index] for column, name in enumerate(batch.schema.names)}
        yield f"{path}#{first + index}", cells


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path}: cannot be read: {reason}") from error
