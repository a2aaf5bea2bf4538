"""benchmarks/loader.py gives all readers the same rows, and reports what it measured; the numbers are its readers' affair."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdcache.loader.cache import open_cache

FOLDER = Path(__file__).parents[2] / "benchmarks"
FOUND = {"tokens": 2000.0, "cpu_seconds": 0.001, "wall_seconds": 0.002}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark's modules by name."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


def test_a_cache_and_a_baseline_give_the_rows_that_were_written(bench: Any, tmp_path: Path):
    making, ours, measuring = bench("loader_rows"), bench("loader_ours"), bench("loader_measure")
    rows = making.write_rows(tmp_path / "rows", 4, 3)
    making.write_cache(tmp_path / "packed", rows, "packed")
    making.write_packed_floor(tmp_path / "rows", tmp_path / "packed")
    making.write_plan(tmp_path / "rows", tmp_path / "packed")
    rows = measuring.Rows.load(tmp_path / "rows")
    baseline = bench("loader_baselines").BASELINES["Parquet"](rows, tmp_path / "parquet")
    with open_cache(tmp_path / "packed") as cache:
        readers = [ours.MapReader(cache), ours.LoaderReader(cache), baseline]
        for reader in readers:
            measuring.check(reader, rows)
        passes = measuring.measure(ours.modes("loader", cache, rows), rows, 0.001, 1)
    assert all(p["tokens"] > 0 for each in passes.values() for p in each)
    room = measuring.Room(*np.load(tmp_path / "rows" / "shape.npy").tolist(), rows.k, np.float16)
    for mode in measuring.MODES:
        assert sum(measuring.steps(mode, baseline, rows, room)) == rows.num_tokens
    for floor in measuring.FLOORS:
        assert sum(measuring.floor_steps(floor, rows, np.empty(10**6, np.uint8))) == rows.num_tokens


def test_a_reader_of_other_rows_is_found_out(bench: Any, tmp_path: Path):
    making, measuring = bench("loader_rows"), bench("loader_measure")
    rows = making.write_rows(tmp_path / "rows", 4, 3)

    class Wrong:
        def get(self, numbers: list[int]) -> list[Any]:
            return [rows.row(3 - number) for number in numbers]

        scan = [].copy

    with pytest.raises(ValueError, match="sequence 0 is not what was written"):
        measuring.check(Wrong(), rows)


def test_a_packed_batch_of_a_baseline_is_the_loaders(bench: Any, tmp_path: Path):
    making, measuring = bench("loader_rows"), bench("loader_measure")
    rows = making.write_rows(tmp_path / "rows", 5, 3)
    making.write_cache(tmp_path / "packed", rows, "packed")
    making.write_plan(tmp_path / "rows", tmp_path / "packed")
    rows, room = measuring.Rows.load(tmp_path / "rows"), measuring.Room(8, 1024, 3, np.float16)
    numbers = [number for _, number in rows.batches[0]]
    count = room.put_batch(rows.batches[0], map(rows.row, numbers))
    with (
        open_cache(tmp_path / "packed") as cache,
        bench("loader_ours").Loader(cache, bench("loader_ours").OPTIONS["packed"]) as loader,
    ):
        batch = next(iter(loader))
    assert (room.input_ids == batch.input_ids_BT.reshape(-1)).all()
    assert (room.positions == batch.position_ids_BT.reshape(-1)).all()
    assert (room.segments == batch.segment_ids_BT.reshape(-1)).all()
    assert (room.labels == batch.target_ids_BT.reshape(-1)).all()
    assert (room.token_ids[: count * 3].reshape(-1, 3) == batch.teacher.token_ids_PK).all()


def test_a_library_that_is_not_there_is_reported_and_ours_is_compared_with_the_others(bench: Any):
    names = ("sequential", "random", "packed", "floor packed", "floor raw", "floor packed, map kept")
    slow = {name: [FOUND | {"tokens": 1000.0}] for name in names[:3]} | {name: [FOUND] for name in names[3:]}
    about = {"bytes": 300, "tokens": 10, "checked": "each row's digest", "dtype": "float32", "is_lossless": True}
    ours = {"packed, loader": about | {"passes": {name: [FOUND] for name in names}}, "threads": {"passes": {"0": [FOUND]}}}
    others = {
        "A": about | {"package": "a 1", "note": "n", "passes": slow},
        "B": {"not_installed": "b is not there"},
        "C": {"failed": "it broke"},
    }
    run = {"sequences": 1, "tokens": 10, "k": 3, "cpu": "x", "load_before": 0, "rounds": 1, "seconds": 1}
    text = bench("loader_report").report(run | {"floor_bytes": {"packed": 9, "raw": 9}, "ours": ours, "others": others})
    assert "| B | | | not installed | | | |" in text
    assert "- B: not installed: b is not there." in text
    assert "- C: failed: it broke" in text
    assert "| A | packed, loader | 2, 2, 2 |" in text
    assert "`packed` at 0.75 of the floor: 1.00: met" in text
    assert "1.00 of the packed floor whose map is kept" in text
    assert "Ahead of all of them at equal or fewer bytes, float16 exact: met." in text
    assert "Ahead of all of them at equal or fewer bytes, any codec: met." in text


def test_a_library_that_gives_float32_is_compared_with_ours_that_do(bench: Any):
    report = bench("loader_report")
    about = {"bytes": 300, "tokens": 10, "checked": "each row's digest", "is_lossless": True}
    fast, slow = {"random": [FOUND]}, {"random": [FOUND | {"tokens": 1000.0}]}
    ours = {"half": about | {"dtype": "float16", "passes": fast}, "single": about | {"dtype": "float32", "passes": slow}}
    for dtype, expected in (("float16", "half"), ("float32", "single")):
        assert report.fastest_within({"ours": ours}, about | {"dtype": dtype}, True) == expected


def test_a_baseline_says_that_its_library_is_missing(tmp_path: Path):
    script = "import loader_baselines as b; b.Mds.package = 'no-such-package'; b.main()"
    done = subprocess.run(
        [sys.executable, "-c", script, "MDS", tmp_path, tmp_path], capture_output=True, text=True, check=True, cwd=FOLDER
    )
    assert json.loads(done.stdout) == {"not_installed": "no-such-package is not installed in this environment"}


@pytest.mark.slow
def test_the_whole_benchmark_runs_at_toy_size(tmp_path: Path):
    command = [sys.executable, FOLDER / "loader.py", "--quick", "--codecs", "packed", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "| MDS | | | not installed | | | |" in (tmp_path / "loader.md").read_text()
    results = json.loads((tmp_path / "loader.json").read_text())
    assert all("passes" in result for result in results["ours"].values())
