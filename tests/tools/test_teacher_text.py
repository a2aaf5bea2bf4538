from __future__ import annotations

import json
from pathlib import Path

import pytest
import teacher_text
from teacher_text import Document, TextError


def documents(count: int) -> list[Document]:
    return [Document(f"file-{number}.py", f"text {number}") for number in range(count)]


def test_every_document_is_in_one_split_in_the_stated_shares() -> None:
    given = documents(4000)
    splits = teacher_text.split_documents(given)
    assert sorted(map(id, [*splits["train"], *splits["heldback"], *splits["heldout"]])) == sorted(map(id, given))
    assert len(splits["heldback"]) / 4000 == pytest.approx(0.15, abs=0.02)
    assert len(splits["heldout"]) / 4000 == pytest.approx(0.05, abs=0.015)


def test_a_further_document_moves_no_other() -> None:
    few, more = teacher_text.split_documents(documents(500)), teacher_text.split_documents(documents(600))
    for name in teacher_text.SPLITS:
        assert [d for d in more[name] if d in documents(500)] == few[name]


def test_the_split_of_a_name_is_for_ever() -> None:
    named = {"abc.py": "train", "turtle.py": "heldout", "crypt.py": "heldback"}
    assert {source: teacher_text.split_of(source) for source in named} == named


def test_an_empty_split_is_refused_with_words() -> None:
    with pytest.raises(TextError, match=r"has 1 documents, and none of them falls into .*heldout"):
        teacher_text.split_documents(documents(1))


def test_folders_give_their_text_files_once_each_and_skip_binaries(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("same")
    (tmp_path / "sub" / "a.py").write_text("same")
    (tmp_path / "c.md").write_text("other")
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes("\xe9t\xe9".encode("latin-1"))
    (tmp_path / "zeros.bin").write_bytes(b"a\0b")
    (tmp_path / "lines.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    found = teacher_text.user_text([tmp_path])
    assert [(d.source, d.text) for d in found] == [
        ("sub/a.py", "same"),
        ("c.md", "other"),
        ("lines.jsonl:1", "one"),
        ("lines.jsonl:2", "two"),
    ]


def test_a_bad_line_and_a_missing_path_are_named(tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "one"}\n{"txt": "two"}\n')
    with pytest.raises(TextError, match=r"bad\.jsonl: line 2 is not a JSON object with a `text`"):
        teacher_text.user_text([bad])
    with pytest.raises(TextError, match="nowhere does not exist"):
        teacher_text.user_text([tmp_path / "nowhere"])


def test_the_standard_library_has_megabytes_of_text_and_no_test_suites() -> None:
    found = teacher_text.standard_library()
    assert sum(len(d.text) for d in found) > 5_000_000
    assert "argparse.py" in {d.source for d in found}
    assert not [d.source for d in found if "test" in d.source.split("/")[:-1]]


def test_written_lines_read_back(tmp_path: Path) -> None:
    given = [Document("a", 'caf\u00e9 "x"\n'), Document("b", "y")]
    teacher_text.write_jsonl(given, tmp_path / "t.jsonl")
    lines = (tmp_path / "t.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [{"text": d.text, "source": d.source} for d in given]
