"""Secrets in every place where a user may have one; then all that a day's commands wrote and said is searched for them."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
sys.path.insert(0, str(Path(__file__).parents[1] / "teacher"))

from completions_server import CompletionsServer
from train_caches import train_config, write_cache

from kdcache.cli.main import main

NAMES = (
    "env-aws", "env-hf", "env-key", "option", "nested", "header", "presigned", "userinfo", "remote-key", "remote-secret",
    "session", "url-token", "pasted", "template",
)  # fmt: skip
SECRETS = {name: f"S3CRET-{name}-zq9" for name in NAMES}


class Day:
    """Runs commands; keeps all that they say."""

    def __init__(self, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
        self._capsys, self._caplog = capsys, caplog
        self.said: list[str] = []

    def __call__(self, *arguments: object) -> int:
        status = 2
        with suppress(SystemExit):
            status = main([str(argument) for argument in arguments])
        found = self._capsys.readouterr()
        self.said += [found.out, found.err, *(record.getMessage() for record in self._caplog.records)]
        return status


def found_in(text: str) -> set[str]:
    return {name for name, secret in SECRETS.items() if secret in text}


def test_none_is_in_anything_written_or_said(
    tmp_path: Path,
    tiny_model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
):
    for variable, name in (("AWS_SECRET_ACCESS_KEY", "env-aws"), ("HF_TOKEN", "env-hf"), ("MY_KEY", "env-key")):
        monkeypatch.setenv(variable, SECRETS[name])
    run, mine, out = Day(capsys, caplog), tmp_path / "mine", tmp_path / "written"
    mine.mkdir()
    out.mkdir()
    caplog.set_level("DEBUG", logger="kdcache")
    rows = "".join(json.dumps({"input_ids": [1, 2, 3 + n]}) + "\n" for n in range(4))
    (mine / "ids.jsonl").write_text(rows)
    remote = {
        "options": {"key": SECRETS["remote-key"], "secret": SECRETS["remote-secret"], "max_concurrency": "a",
                    "client_kwargs": {"aws_session_token": SECRETS["session"]}},
    }  # fmt: skip
    capture = {
        "input": {"format": "jsonl", "content": "ids", "paths": [str(mine / "ids.jsonl")], "window": {"size": 8}},
        "teacher": {"model": "fake", "backend": "fake", "fake": {"vocab_size": 50}}, "selection": {"k": 4},
        "out": str(out / "cache"), "run": {"progress_path": str(out / "progress.json")}, "remote": remote,
    }  # fmt: skip

    def config(name: str, **changes: object) -> Path:
        (mine / name).write_text(json.dumps(capture | changes))
        return mine / name

    # What would be written is refused.
    for number, (name, options) in enumerate(
        (("option", {"use_auth_token": SECRETS["option"]}), ("nested", {"hub_kwargs": {"token": SECRETS["nested"]}}),
         ("header", {"headers": {"Authorization": SECRETS["header"]}}))
    ):  # fmt: skip
        assert run("capture", config(f"{number}.yaml", teacher={**capture["teacher"], "engine_options": options})) == 2, name
    presigned = f"https://bucket/ids.jsonl?X-Amz-Signature={SECRETS['presigned']}"
    assert run("capture", config("p.yaml", input={**capture["input"], "paths": [presigned]})) == 2
    assert run("capture", config("d.yaml", input={"format": "dataset", "dataset": presigned})) == 2
    arguments = {"content": "messages", "template_arguments": {"api_key": SECRETS["template"]}}
    assert run("capture", config("t.yaml", input={**capture["input"], **arguments})) == 2
    for place in (f"s3://me:{SECRETS['userinfo']}@bucket/x", f"s3://bucket/x?token={SECRETS['url-token']}"):
        assert run("capture", config("o.yaml", out=place)) == 2
        for command in (("info",), ("verify",), ("fold",), ("doctor",)):
            assert run(*command, place) == 2
        assert run("derive", place, "--out", out / "x") == 2
    # What is not written is used and not shown.
    assert run("capture", config("c.yaml")) == 0
    assert run("capture", config("r.yaml", out="s3://bucket/x")) == 2
    server = CompletionsServer()
    server.manners.key = "another"
    try:
        for variable in ("MY_KEY", SECRETS["pasted"]):
            asked = {"url": server.url, "api_key_env": variable, "vocab_size": 50, "retries": 0}
            teacher = {"model": "m", "tokenizer": "fake", "backend": "served", "server": asked}
            assert run("capture", config("s.yaml", teacher=teacher, out=str(out / "served"))) == 2
            assert run("verify", "--deep", "--teacher-config", mine / "s.yaml", out / "cache") == 2
    finally:
        server.close()
    for command in (("info",), ("info", "--json"), ("verify",), ("doctor",), ("fold",)):
        assert run(*command, out / "cache") == 0
    assert run("derive", out / "cache", "--out", out / "derived", "--fraction", "0.5") == 0
    assert run("convert", out / "cache", "--out", out / "converted", "--tokenizer", "fake", "--model", presigned) == 2
    # A student.
    cache = write_cache(out / "of-model", tiny_model_dir, k=8, num_sequences=4)
    fields = json.loads(msgspec.json.encode(train_config(cache, tiny_model_dir, out / "run", steps=1)))
    (mine / "train.yaml").write_text(json.dumps(fields | {"remote": remote}))
    assert run("train", mine / "train.yaml") == 0
    assert run("train", mine / "train.yaml") == 0
    assert run("train", mine / "train.yaml", "--set", f"cache=s3://me:{SECRETS['userinfo']}@bucket/x") == 2
    (mine / "heldout.jsonl").write_text("".join(json.dumps({"text": f"x = {n}\n" * 9}) + "\n" for n in range(3)))
    student = f"kd={out / 'run'}"
    asked = (
        "evaluate",
        "--teacher",
        tiny_model_dir,
        "--data",
        mine / "heldout.jsonl",
        "--student",
        student,
        "--out",
        out / "e",
    )
    assert run(*asked) == 0

    assert [said for said in run.said if found_in(said)] == []
    written = [path for path in out.rglob("*") if path.is_file()]
    assert {path: found for path in written if (found := found_in(path.read_bytes().decode("latin-1")))} == {}
    assert "***" in (out / "run" / "run.json").read_text()
    assert len(written) > 15
