"""benchmarks/loss.py runs, merges and reports; its numbers are its readers' affair."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "loss.py"


@pytest.mark.slow
def test_a_part_is_measured_and_takes_the_place_of_an_older_one(tmp_path, main):
    old = {"cpu": "another", "case": "toy-16-bfloat16", "group": "labels", "rows": 1, "hidden": 1, "vocab": 1, "dtype": "x"}
    old |= {"threads": 1, "torch": "2", "rounds": 1, "load_before": 0.1, "variants": {}}
    (tmp_path / "loss.json").write_text(json.dumps([old]))
    for memory in ((), ("--no-memory",)):
        main("--part", "toy-16-bfloat16", "labels", "--rounds", "1", "--output", tmp_path, *memory)
        parts = json.loads((tmp_path / "loss.json").read_text())
        assert len(parts) == 2
        assert all(variant["ratios"] for part in parts for variant in part["variants"].values())
        assert ["peak_mib" in variant for variant in parts[1]["variants"].values()] == [not memory] * 2
    assert "| three matmuls |" in (tmp_path / "loss.md").read_text()


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """The program called here, where torch is imported already."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    program, num_threads = importlib.import_module("loss"), torch.get_num_threads()

    def call(*arguments: str | Path) -> None:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        program.main()

    yield call
    torch.set_num_threads(num_threads)


@pytest.mark.slow
def test_our_group_says_whether_the_targets_are_met(tmp_path, main, capsys):
    main("--part", "toy-16-float32", "ours", "--rounds", "1", "--no-memory", "--output", tmp_path)
    out = capsys.readouterr().out
    assert "Fused at the default chunk within 1.10 of three matmuls" in out
    assert "tail_aware_kl" in out


def test_an_unknown_part_is_refused_with_the_known_ones(main, capsys):
    with pytest.raises(SystemExit) as ended:
        main("--part", "huge", "ours")
    assert ended.value.code == 2
    assert "there are the cases 32k-512-float32" in capsys.readouterr().err
