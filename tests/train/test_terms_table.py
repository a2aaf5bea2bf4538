"""The page on loss terms lists what each term is, as the terms say it themselves.

After a change that is meant: python tests/train/test_terms_table.py
"""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers")

from kdcache import extensions
from kdcache.train.terms.table import terms_table

PAGE = Path(__file__).parents[2] / "kdcache" / "docs" / "loss-terms.md"
BEGIN, END = "<!-- terms -->\n", "\n<!-- end of terms -->"


def with_table(text: str) -> str:
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END.lstrip("\n"))
    return f"{before}{BEGIN}{terms_table(list(extensions.OWN['losses']))}{END}{after}"


def test_the_page_has_the_table_that_the_terms_make() -> None:
    text = PAGE.read_text("utf-8")
    assert text == with_table(text)


def test_every_term_of_ours_says_what_it_needs() -> None:
    lines = terms_table(list(extensions.OWN["losses"])).splitlines()[2:]
    assert [line for line in lines if "|  |" in line.rpartition(" | ")[0]] == []


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text("utf-8")), "utf-8")
