"""Baselines that store samples: MosaicML's streaming and LitData; and what every baseline of the loader benchmark is."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Iterable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from loader_measure import Row, Rows


class Baseline:
    """A reader that is made of the rows, in a folder of its own; `get` reads one by one unless said otherwise."""

    package: ClassVar[str]
    module: ClassVar[str]
    note: ClassVar[str]
    checked: ClassVar[str] = "no"

    def __init__(self, rows: Rows, folder: Path) -> None:
        self.rows, self.path = rows, str(folder)
        self.prepare()

    def prepare(self) -> None:
        """Write and open."""
        raise NotImplementedError

    def one(self, number: int) -> Row:
        """One sequence by number."""
        raise NotImplementedError

    def get(self, numbers: list[int]) -> Iterable[Row]:
        return (self.one(number) for number in numbers)

    def scan(self) -> Iterable[Row]:
        return (self.one(number) for number in range(len(self.rows)))

    def dicts(self) -> Iterator[dict[str, Any]]:
        for number in range(len(self.rows)):
            yield dict(zip(("input_ids", "token_ids", "logprobs"), self.rows.row(number), strict=True))


def row_of(item: Any) -> Row:
    return item["input_ids"], item["token_ids"], item["logprobs"]


class Mds(Baseline):
    package, module = "mosaicml-streaming", "streaming"
    note = "no compression; `dataset[i]`, also in order"
    checked = "a shard's hash when it is fetched, not on reads (validate_hash is on)"

    def prepare(self) -> None:
        if importlib.util.find_spec("torchvision") is None:
            stub_torchvision()
        streaming = importlib.import_module("streaming")
        columns = {"input_ids": "ndarray:int32", "token_ids": "ndarray:int32", "logprobs": "ndarray:float16"}
        with streaming.MDSWriter(out=self.path, columns=columns, hashes=["xxh3_64"]) as writer:
            for item in self.dicts():
                writer.write({name: np.array(values) for name, values in item.items()})
        self.dataset = streaming.StreamingDataset(local=self.path, batch_size=8, validate_hash="xxh3_64")

    def one(self, number: int) -> Row:
        return row_of(self.dataset[number])


def stub_torchvision() -> None:
    """streaming imports it for its image datasets, which are not used here; its index builds ask for CUDA libraries."""
    for name, attribute in {
        "torchvision": "version",
        "torchvision.datasets": "VisionDataset",
        "torchvision.transforms": "functional",
        "torchvision.transforms.functional": "to_tensor",
    }.items():
        stub = types.ModuleType(name)
        stub.__spec__ = ModuleSpec(name, None)  # transformers asks for it
        setattr(stub, attribute, type(attribute, (), {}))
        sys.modules[name] = stub


class LitData(Baseline):
    package, module = "litdata", "litdata"
    note = "no compression; `dataset[i]`, in order its iterator"

    def prepare(self) -> None:
        litdata = importlib.import_module("litdata")
        global _rows
        _rows = self.rows
        litdata.optimize(_item, list(range(len(self.rows))), self.path, chunk_bytes="64MB", num_workers=1, start_method="fork",
                         keep_data_ordered=True, verbose=False)  # fmt: skip
        self.dataset = litdata.StreamingDataset(self.path, shuffle=False)

    def one(self, number: int) -> Row:
        return row_of(self.dataset[number])

    def scan(self) -> Iterable[Row]:
        return map(row_of, self.dataset)


_rows: Rows


def _item(number: int) -> dict[str, Any]:
    """What LitData calls in its worker, a fork of this process."""
    return dict(zip(("input_ids", "token_ids", "logprobs"), map(np.array, _rows.row(number)), strict=True))
