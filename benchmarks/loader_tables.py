"""Baselines that store tables: `datasets`, Lance, Vortex and Parquet."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from loader_measure import Row, Rows
from loader_samples import Baseline, row_of

SCAN_SEQUENCES = 16
"""Read at once in stored order."""


def arrow_table(rows: Rows) -> Any:
    """One row per sequence, lists of int32 and float16."""
    pa = importlib.import_module("pyarrow")

    def lists(values: Any, per_token: int) -> Any:
        return pa.ListArray.from_arrays(pa.array((rows.starts_S1 * per_token).astype(np.int32)), pa.array(values.reshape(-1)))

    columns = lists(rows.input_ids_N, 1), lists(rows.token_ids_NK, rows.k), lists(rows.logprobs_NK, rows.k)
    return pa.table(dict(zip(("input_ids", "token_ids", "logprobs"), columns, strict=True)))


def arrow_rows(table: Any) -> Iterator[Row]:
    """Views of a table's sequences."""
    for batch in table.to_batches():
        columns = []
        for name in ("input_ids", "token_ids", "logprobs"):
            column = batch.column(name)
            columns.append((column.values.to_numpy(), column.offsets.to_numpy()))
        for at in range(batch.num_rows):
            yield tuple(values[offsets[at] : offsets[at + 1]] for values, offsets in columns)


class Datasets(Baseline):
    package, module = "datasets", "datasets"
    note = "format arrow; `dataset[i]`, a batch by `dataset[[...]]`, in order `iter`"
    format: ClassVar[str] = "arrow"

    def prepare(self) -> None:
        datasets = importlib.import_module("datasets")
        datasets.Dataset(arrow_table(self.rows)).save_to_disk(self.path)
        self.dataset = datasets.load_from_disk(self.path).with_format(self.format)

    def get(self, numbers: list[int]) -> Iterable[Row]:
        return arrow_rows(self.dataset[numbers] if len(numbers) > 1 else self.dataset[numbers[0]])

    def scan(self) -> Iterable[Row]:
        return (row for batch in self.dataset.iter(SCAN_SEQUENCES) for row in arrow_rows(batch))


class DatasetsNumpy(Datasets):
    note = "format numpy, which gives int64 and float32"
    format = "numpy"

    def get(self, numbers: list[int]) -> Iterable[Row]:
        if len(numbers) == 1:
            return [row_of(self.dataset[numbers[0]])]
        return zip(*row_of(self.dataset[numbers]), strict=True)

    def scan(self) -> Iterable[Row]:
        return map(row_of, self.dataset)


class Lance(Baseline):
    package, module = "pylance", "lance"
    note = "a row per sequence, format 2.0; `take`, a batch by one `take`, in order `to_batches`"

    def prepare(self) -> None:
        lance = importlib.import_module("lance")
        self.dataset = lance.write_dataset(arrow_table(self.rows), self.path, data_storage_version="2.0")

    def get(self, numbers: list[int]) -> Iterable[Row]:
        return arrow_rows(self.dataset.take(numbers))

    def scan(self) -> Iterable[Row]:
        return (row for batch in self.dataset.to_batches(batch_size=SCAN_SEQUENCES) for row in arrow_rows(_table(batch)))


def _table(batch: Any) -> Any:
    return importlib.import_module("pyarrow").Table.from_batches([batch])


def token_table(rows: Rows) -> Any:
    """One row per token, fixed-size lists."""
    pa = importlib.import_module("pyarrow")
    lists = [
        pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), rows.k)
        for values in (rows.token_ids_NK, rows.logprobs_NK)
    ]
    return pa.table({"input_ids": pa.array(rows.input_ids_N), "token_ids": lists[0], "logprobs": lists[1]})


def token_row(values: Any) -> Row:
    """Of a struct array of tokens, in one piece or in several."""
    if hasattr(values, "combine_chunks"):
        values = values.chunk(0) if values.num_chunks == 1 else values.combine_chunks()
    columns = [values.field(name) for name in ("input_ids", "token_ids", "logprobs")]
    return columns[0].to_numpy(), *(c.flatten().to_numpy() for c in columns[1:])


class LanceTokens(Lance):
    note = "a row per token, fixed-size lists, format 2.1; `take` of a sequence's rows"

    def prepare(self) -> None:
        lance = importlib.import_module("lance")
        self.dataset = lance.write_dataset(token_table(self.rows), self.path, data_storage_version="2.1")

    def get(self, numbers: list[int]) -> Iterable[Row]:
        starts = self.rows.starts_S1
        for number in numbers:
            yield token_row(self.dataset.take(range(int(starts[number]), int(starts[number + 1]))).to_struct_array())

    def scan(self) -> Iterable[Row]:
        batches = self.dataset.to_batches(batch_size=8192)
        return cut((token_row(batch.to_struct_array()) for batch in batches), self.rows)


def together(parts: list[Row]) -> Row:
    input_ids, token_ids, logprobs = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    return input_ids, token_ids, logprobs


def cut(parts: Iterable[Row], rows: Rows) -> Iterator[Row]:
    """Rows per sequence of tables of tokens, which are cut anywhere: of those on a cut, the pieces are put together."""
    waiting: list[Row] = []
    number, have = 0, 0
    for part in parts:
        at = 0
        while at < len(part[0]):
            needed = int(rows.starts_S1[number + 1] - rows.starts_S1[number])
            take, k = min(needed - have, len(part[0]) - at), rows.k
            waiting.append((part[0][at : at + take], part[1][at * k : (at + take) * k], part[2][at * k : (at + take) * k]))
            at, have = at + take, have + take
            if have == needed:
                yield waiting[0] if len(waiting) == 1 else together(waiting)
                waiting, number, have = [], number + 1, 0


class Vortex(Baseline):
    package, module = "vortex-data", "vortex"
    note = "a row per token, fixed-size lists, memory map; `execute(row_range=...)`"

    def prepare(self) -> None:
        vortex = importlib.import_module("vortex")
        path = f"{self.path}/rows.vortex"
        Path(self.path).mkdir()
        vortex.io.write(vortex.array(token_table(self.rows)), path)
        self.file = vortex.open(path, memory_map=True)
        self.repeated = self.file.to_repeated_scan()

    def one(self, number: int) -> Row:
        part = int(self.rows.starts_S1[number]), int(self.rows.starts_S1[number + 1])
        return token_row(self.repeated.execute(row_range=part).read_all().to_arrow_array())

    def scan(self) -> Iterable[Row]:
        return cut((token_row(array.to_arrow_array()) for array in self.file.scan(batch_size=8192)), self.rows)


class Parquet(Baseline):
    package, module = "pyarrow", "pyarrow.parquet"
    note = "no compression, a row group per sequence; `read_row_group`, a batch by `read_row_groups`"
    checked = "each page's CRC (page_checksum_verification)"
    options: ClassVar[dict[str, Any]] = {"compression": "none"}

    def prepare(self) -> None:
        pq = importlib.import_module("pyarrow.parquet")
        path = f"{self.path}/rows.parquet"
        Path(self.path).mkdir()
        pq.write_table(arrow_table(self.rows), path, row_group_size=1, use_dictionary=False, write_page_checksum=True,
                       **self.options)  # fmt: skip
        self.file = pq.ParquetFile(path, memory_map=True, page_checksum_verification=True)

    def get(self, numbers: list[int]) -> Iterable[Row]:
        return arrow_rows(self.file.read_row_groups(numbers, use_threads=False))

    def scan(self) -> Iterable[Row]:
        batches = self.file.iter_batches(batch_size=SCAN_SEQUENCES, use_threads=False)
        return (row for batch in batches for row in arrow_rows(_table(batch)))


class ParquetSmall(Parquet):
    note = "byte stream split and zstd, a row group per sequence"
    options: ClassVar[dict[str, Any]] = {"compression": "zstd", "use_byte_stream_split": True}
