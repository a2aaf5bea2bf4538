"""An input format that another package brings: the contract of every format, and a capture by the command line."""

from __future__ import annotations

import json

import pytest
from contracts import inputs as contract

import kdcache
from kdcache.cli.main import main


def write(path, texts):
    path.write_text("".join(f"{text}\n-----\n" for text in texts))


@pytest.mark.parametrize("promise", contract.PROMISES, ids=lambda promise: promise.__name__)
def test_it_keeps_the_promises_of_every_format(toys, tmp_path, promise):
    promise(contract.InputCase("dashes", ".dashes", write, b"no dashes here"), tmp_path)


def test_a_capture_reads_it_by_name(toys, tmp_path):
    write(tmp_path / "a.dashes", ["first text\nof two lines", "second"])
    config = {
        "input": {"format": "dashes", "paths": [str(tmp_path)]},
        "teacher": {"model": "fake", "backend": "fake"},
        "out": str(tmp_path / "cache"),
    }
    (tmp_path / "c.yaml").write_text(json.dumps(config))
    assert main(["capture", str(tmp_path / "c.yaml")]) == 0
    with kdcache.open(tmp_path / "cache") as cache:
        assert [source.rpartition("/")[2] for source in cache.sources()] == ["a.dashes#0", "a.dashes#1"]


def test_what_is_no_format_is_refused(toys, tmp_path, capsys):
    config = {
        "input": {"format": "no_format", "paths": [str(tmp_path)]},
        "teacher": {"model": "fake", "backend": "fake"},
        "out": str(tmp_path / "cache"),
    }
    (tmp_path / "c.yaml").write_text(json.dumps(config))
    assert main(["capture", str(tmp_path / "c.yaml")]) == 2
    assert "input.format 'no_format' is a function, expected a FileFormat" in capsys.readouterr().err
