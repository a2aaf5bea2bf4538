"""The other libraries of the loader benchmark, each written by its own writer from the same rows and read by its own calls.

Runs in an environment of its own (see loader.py), which has NumPy and some of the libraries; nothing of kdcache is imported.

    python benchmarks/loader_baselines.py NAME ROWS FOLDER [--seconds 0.3] [--rounds 3]

The last line of stdout is JSON: the passes of each mode, bytes, version; or {"not_installed": ...}.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from loader_measure import MODES, Room, Rows, check, measure, num_bytes, steps, use_one_core
from loader_samples import Baseline, LitData, Mds
from loader_tables import Datasets, DatasetsNumpy, Lance, LanceTokens, Parquet, ParquetSmall, Vortex

BASELINES: dict[str, type[Baseline]] = {
    "MDS": Mds,
    "LitData": LitData,
    "datasets, arrow": Datasets,
    "datasets, numpy": DatasetsNumpy,
    "Lance, sequences": Lance,
    "Lance, tokens": LanceTokens,
    "Vortex, tokens": Vortex,
    "Parquet": Parquet,
    "Parquet, zstd": ParquetSmall,
}


def result(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    kind = BASELINES[name]
    try:
        found = version(kind.package)
    except PackageNotFoundError:
        return {"not_installed": f"{kind.package} is not installed in this environment"}
    rows = Rows.load(arguments.rows)
    reader = kind(rows, arguments.folder)
    check(reader, rows)
    batch_rows, seq_len = np.load(arguments.rows / "shape.npy").tolist()
    some = np.asarray(next(iter(reader.get([0])))[2])
    room = Room(batch_rows, seq_len, rows.k, some.dtype)
    modes = {mode: (lambda mode=mode: steps(mode, reader, rows, room)) for mode in MODES}
    use_one_core()
    passes = measure(modes, rows, arguments.seconds, arguments.rounds)
    about = {"package": f"{kind.package} {found}", "note": kind.note, "checked": kind.checked, "dtype": some.dtype.name}
    return about | {"bytes": num_bytes(arguments.folder), "tokens": rows.num_tokens, "passes": passes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=BASELINES)
    parser.add_argument("rows", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=0.3)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    found = result(arguments.name, arguments)
    sys.stdout.flush()
    print(json.dumps(found), flush=True)
    os._exit(0)  # some of these keep threads or helpers that would be waited for


if __name__ == "__main__":
    main()
