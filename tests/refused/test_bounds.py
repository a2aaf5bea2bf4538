"""Each line of the spec's table of bounds is kept: a hostile input for it is refused in its words, under a limit of memory."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from bound_cases import CASES
from cache_making import make_cache, make_record

TESTS = Path(__file__).parents[1]
SPEC = TESTS.parent / "kdcache" / "format" / "README.md"


def table() -> dict[str, tuple[str, str, str]]:
    """What is bounded -> the bound, the error's name and its words, as the spec has them."""
    text = SPEC.read_text(encoding="utf-8").partition("### 5.1")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (.+?) \| (.+?) \| `(\w+)`: (.+?) \|$", text, re.MULTILINE)
    return {what: (bound, error, words) for what, bound, error, words in rows}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    pytest.importorskip("httpx2")
    folder = tmp_path_factory.mktemp("bounds")
    sound = make_cache(folder / "sound", units=[[make_record(seed) for seed in range(3)]])
    (folder / "work").mkdir()
    paths = [TESTS, TESTS / "teacher", TESTS / "refused", TESTS.parent]
    done = subprocess.run(
        [sys.executable, str(TESTS / "refused" / "bound_cases.py"), str(sound), str(folder / "work")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))},
        stdout=subprocess.PIPE,
        check=True,
        timeout=300,
    )
    return json.loads(done.stdout)


def test_every_line_of_the_table_is_tried_and_every_try_is_a_line():
    assert table().keys() == CASES.keys()


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are kept by Linux alone")
@pytest.mark.parametrize("what", CASES)
def test_the_bound_is_kept(outcomes: dict[str, list[str]], what: str):
    _, error, words = table()[what]
    kind, sentence = outcomes[what]
    assert kind == error
    assert words in sentence
