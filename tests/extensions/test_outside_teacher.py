"""A teacher backend that another package brings: the contract of every teacher, and a capture by the command line."""

from __future__ import annotations

import json

import pytest
from contracts import teacher as contract

from kdcache.cli.main import main
from kdcache.config.teacher import TeacherConfig
from kdcache.teacher import load_teacher


@pytest.mark.parametrize("promise", [*contract.PROMISES, contract.closing], ids=lambda promise: promise.__name__)
def test_it_keeps_the_promises_of_every_teacher(toys, promise):
    config = TeacherConfig(model="any name", backend="toy")
    teacher = load_teacher(config)
    promise(contract.TeacherCase(teacher, teacher.dense_logprobs, 1e-6, lambda: load_teacher(config).identity))


def test_a_capture_runs_it_by_name_with_its_own_options(toys, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("what is read last is said next\n" * 30)
    config = {
        "input": {"format": "lines", "paths": [str(tmp_path / "text.txt")], "window": {"size": 512}},
        "teacher": {"model": "m", "backend": "toy", "engine_options": {"vocab_size": 400}},
        "out": str(tmp_path / "cache"),
    }
    (tmp_path / "c.yaml").write_text(json.dumps(config))
    assert main(["capture", str(tmp_path / "c.yaml")]) == 0
    assert main(["verify", str(tmp_path / "cache"), "--deep", "--teacher-config", str(tmp_path / "c.yaml")]) == 0
    assert main(["info", str(tmp_path / "cache")]) == 0
    assert "toy" in capsys.readouterr().out


def test_a_backend_that_nobody_brings_is_refused_with_those_there_are(toys, tmp_path, capsys):
    config = {"input": {"format": "lines", "paths": ["x"]}, "teacher": {"model": "m", "backend": "tory"}, "out": "c"}
    (tmp_path / "c.yaml").write_text(json.dumps(config))
    assert main(["capture", str(tmp_path / "c.yaml")]) == 2
    assert "teacher: backend is 'tory', expected one of auto, vllm, transformers, served, fake, toy" in capsys.readouterr().err
