from __future__ import annotations

from pathlib import Path

import check_sizes
import pytest


def make_tree(root: Path, relative: str, source: str) -> Path:
    path = root / relative
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)
    return root


def function_of(num_lines: int, parameters: str = "") -> str:
    return f'def f({parameters}):\n    """Long.\n\n    Text.\n    """\n' + "    pass\n" * num_lines


def test_functions_and_files_at_the_caps_pass(tmp_path: Path) -> None:
    make_tree(tmp_path, "kdcache/a.py", function_of(50, "a, b, c, d, e, *args, **kwargs"))
    make_tree(tmp_path, "kdcache/b.py", "x = 1\n" * 400)
    assert check_sizes.main(tmp_path) == 0


@pytest.mark.parametrize(
    ("source", "what"),
    [
        (function_of(51), "kdcache/a.py:1 f: body is 51, the cap is 50"),
        (function_of(1, "a, b, c, d, *, e, f, g, h"), "kdcache/a.py:1 f: parameters is 8, the cap is 7"),
        ("x = 1\n" * 401, "kdcache/a.py: file is 401, the cap is 400"),
    ],
)
def test_one_over_a_cap_fails_and_names_the_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str, what: str
) -> None:
    assert check_sizes.main(make_tree(tmp_path, "kdcache/a.py", source)) == 1
    assert what in capsys.readouterr().out


def test_self_is_no_parameter_of_a_method(tmp_path: Path) -> None:
    method = "class C:\n    def f(self, a, b, c, d, e, f, g):\n        pass\n"
    assert check_sizes.main(make_tree(tmp_path, "kdcache/a.py", method)) == 0


def test_kernels_may_have_longer_bodies_but_not_longer_files(tmp_path: Path) -> None:
    make_tree(tmp_path, "kdcache/kernels/a.py", function_of(100, ", ".join("abcdefghij")))
    assert check_sizes.main(tmp_path) == 0
    assert check_sizes.main(make_tree(tmp_path, "kdcache/kernels/b.py", function_of(101))) == 1


def test_this_repository_keeps_its_caps() -> None:
    assert check_sizes.main(Path(__file__).resolve().parents[2]) == 0
