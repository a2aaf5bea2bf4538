from __future__ import annotations

import sys
from pathlib import Path

import pytest
from walk import Tracer

LEFT = """\
import right
class Left:
    noise = right.noise()
    def go(self, what):
        return [right.add(what, i) for i in range(2)] + [self.stay()]
    def stay(self):
        return 3
"""
RIGHT = """\
def noise():
    return 0
def add(what, more):
    return what + more
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "left.py").write_text(LEFT)
    (tmp_path / "right.py").write_text(RIGHT)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("left", "right"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def test_a_walk_has_the_files_whose_functions_ran_and_the_moves_between_them(package: Path) -> None:
    tracer = Tracer(package)
    with tracer.following():
        import left  # pyright: ignore[reportMissingImports]

        assert not tracer.walk.files  # what runs while a module is imported does not count
        assert left.Left().go(1) == [1, 2, 3]
    assert tracer.walk.files == ["left.py", "right.py"]
    assert tracer.walk.num_moves == 4  # there and back, twice


def test_a_function_that_counts_brings_its_callers(package: Path) -> None:
    tracer = Tracer(package, lambda frame: frame.f_code.co_name == "add" and frame.f_locals["more"] == 1)
    with tracer.following():
        import left  # pyright: ignore[reportMissingImports]

        left.Left().go(1)
    assert tracer.walk.files == ["left.py", "right.py"]
    assert {name for name, _ in tracer.walk.functions} == {"left.py", "right.py"}
    assert tracer.walk.num_moves == 2
