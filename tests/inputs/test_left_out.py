"""Nothing that an input names is left out without a word."""

import gzip
import json
import os

import pytest

from kdcache.capture.inputs import InputReader
from kdcache.cli.main import main
from kdcache.config.capture import InputConfig, ShardConfig
from kdcache.errors import InputError
from kdcache.inputs.files import find_files
from kdcache.inputs.formats.table_files import PARQUET
from kdcache.inputs.formats.text_files import JSONL
from kdcache.inputs.left_out import LeftOut


def line(text):
    return json.dumps({"text": text}) + "\n"


@pytest.fixture
def folder(tmp_path):
    """A folder with one of everything."""
    (tmp_path / "in" / "sub").mkdir(parents=True)
    here = tmp_path / "in"
    (here / "a.jsonl").write_text(line("a"))
    (here / "b.jsonl.gz").write_bytes(gzip.compress(line("b").encode()))
    (here / "sub" / "c.JSON").write_text(f"[{line('c')}]")
    (here / "d.md").write_text("no data")
    (here / ".e.jsonl").write_text(line("hidden"))
    (here / ".git").mkdir()
    (here / ".git" / "f.jsonl").write_text(line("hidden too"))
    (here / "g.jsonl").symlink_to(here / "gone")
    (here / "h.jsonl").symlink_to(here / "h.jsonl")
    (here / "i.jsonl").symlink_to(here / "a.jsonl")
    (here / "j").symlink_to(here)
    os.mkfifo(here / "k.jsonl")
    (here / "l.jsonl").write_text("\n")
    (tmp_path / "m.jsonl").write_text(line("m"))
    (here / "m.jsonl").symlink_to(tmp_path / "m.jsonl")
    return here


def test_all_that_a_folder_holds_is_read_or_named(folder):
    reader = InputReader(InputConfig(format="jsonl", paths=(str(folder),)))
    plan = reader.plan(ShardConfig(), template_fingerprint="")
    assert [item.content for item in reader.items()] == ["a", "b", "m", "c"]
    assert plan.num_items == 4
    shown = {reason: [name.removeprefix(f"{folder}/") for name in names] for reason, names in reader.left_out.names.items()}
    assert shown == {
        "hidden folders": [".git"],
        "links to folders, which are read if named themselves": ["j"],
        "hidden files": [".e.jsonl"],
        "files of other endings": ["d.md"],
        "links that lead nowhere": ["g.jsonl", "h.jsonl"],
        "other names of files that are read": ["i.jsonl"],
        "names that are not plain files": ["k.jsonl"],
        "files without any item": ["l.jsonl"],
    }


def test_what_a_pattern_matches_and_nobody_reads_is_named(folder):
    found = find_files([f"{folder}/*"], "jsonl", JSONL.endings)
    assert [name.removeprefix(f"{folder}/") for name in found.files] == ["a.jsonl", "b.jsonl.gz", "d.md", "l.jsonl", "m.jsonl"]
    assert found.left_out.counts == {
        "hidden files": 1,
        "links that lead nowhere": 2,
        "folders that a pattern matches, which are read if named themselves": 2,
        "names that are not plain files": 1,
        "other names of files that are read": 1,
    }
    # A link to the folder itself: every name below it comes again, as many times as the system follows.
    assert len(find_files([f"{folder}/**/*.jsonl"], "jsonl", JSONL.endings).files) == 3
    with pytest.raises(InputError, match=r"g\.jsonl: this link leads nowhere \(to '.*gone'\)"):
        find_files([f"{folder}/g.jsonl"], "jsonl", JSONL.endings)
    with pytest.raises(InputError, match=r"k\.jsonl: not a plain file"):
        find_files([f"{folder}/k.jsonl"], "jsonl", JSONL.endings)
    with pytest.raises(InputError, match=r"ends in \.parquet, .*; not read, .*; files of other endings: 7 \("):
        find_files([str(folder)], "parquet", PARQUET.endings)


def test_files_after_the_limit_are_named(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.jsonl").write_text(line(name))
    reader = InputReader(InputConfig(format="jsonl", paths=(str(tmp_path),), limit=1))
    reader.plan(ShardConfig(), template_fingerprint="")
    assert reader.left_out.counts == {"files after input.limit was reached": 2}


def test_odd_names_are_sentences_and_no_tracebacks(tmp_path):
    with open(os.fsencode(tmp_path) + b"/\xff.md", "w"):
        (tmp_path / "a.jsonl").write_text(line("a"))
    assert str(find_files([str(tmp_path)], "jsonl", JSONL.endings).left_out).endswith(r"/\udcff.md)")
    with pytest.raises(InputError, match=r"\\udcff\.md: the file's name is not UTF-8.*rename the file"):
        find_files([f"{tmp_path}/*"], "jsonl", JSONL.endings)
    for path, sentence in (
        ("x" * 5000, "cannot be searched: File name too long"),
        ("a\0b", "no such file or folder"),
        ("", "empty text"),
    ):
        with pytest.raises(InputError, match=sentence):
            find_files([path], "jsonl", JSONL.endings)


def test_the_names_are_bounded():
    left_out = LeftOut()
    left_out.add("hidden files", map(str, range(1000)))
    assert str(left_out) == "hidden files: 1,000 (0, 1, 2, 3, 4, ...)"


def test_a_dry_run_and_a_captures_summary_name_what_is_not_read(folder, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text(
        f"input: {{format: jsonl, paths: [{folder}]}}\nteacher: {{model: fake, backend: fake, fake: {{vocab_size: 400}}}}\n"
        f"selection: {{k: 4}}\nout: {tmp_path / 'out'}\n"
    )
    for arguments in (["--dry-run"], [], []):
        assert main(["capture", str(tmp_path / "c.yaml"), *arguments]) == 0
        shown = capsys.readouterr().out
        assert "files of other endings: 1 (" in shown
        assert "links that lead nowhere: 2 (" in shown
