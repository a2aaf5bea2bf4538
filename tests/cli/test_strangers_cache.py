"""A cache from a stranger, its digests right: nothing in it chooses what runs, what is called, or which variable is read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tiny_model import build_tiny_model

from kdcache.capture.job import recorded_moment
from kdcache.cli.main import main
from kdcache.errors import CorruptCacheError, StateError, TeacherError
from kdcache.format import paths
from kdcache.format.manifest import manifest_to_json
from kdcache.store.reader import open_reader
from kdcache.teacher.checkpoint import check_model_name
from kdcache.train.evaluation.evaluate import heldout_curve

SECRET = "s3cr3t-of-the-user"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A sound cache of the fake teacher."""
    (tmp_path / "ids.jsonl").write_text("".join(json.dumps({"input_ids": [1, 2, 3 + n]}) + "\n" for n in range(4)))
    (tmp_path / "c.yaml").write_text(
        f"""
input: {{format: jsonl, content: ids, paths: ['{tmp_path}/ids.jsonl'], window: {{size: 8}}}}
teacher: {{model: fake, backend: fake, fake: {{vocab_size: 50}}}}
selection: {{k: 4}}
out: '{tmp_path}/cache'
"""
    )
    assert main(["capture", str(tmp_path / "c.yaml")]) == 0
    return tmp_path / "cache"


def claim(cache: Path, **teacher: Any) -> None:
    """Have the cache's newest manifest say this of its teacher, and sign it."""
    replace(cache, config={"teacher": teacher})


def replace(cache: Path, **fields: Any) -> None:
    """Have the cache's newest manifest say this, and sign it."""
    with open_reader(cache) as reader:
        manifest = reader.manifest
    changed = msgspec.structs.replace(manifest, **fields)
    (cache / paths.manifest_name(manifest.number)).write_bytes(manifest_to_json(changed))


@pytest.fixture
def model_with_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose own Python code, where it runs, leaves a file `ran` beside it."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = build_tiny_model(tmp_path / "evil")
    fields = json.loads((folder / "config.json").read_text())
    fields |= {"model_type": "evil", "auto_map": {"AutoConfig": "code.EvilConfig", "AutoModelForCausalLM": "code.Evil"}}
    (folder / "config.json").write_text(json.dumps(fields))
    (folder / "code.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class EvilConfig(LlamaConfig):\n    model_type = 'evil'\n"
        "class Evil(LlamaForCausalLM):\n    config_class = EvilConfig\n"
    )
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    capsys.readouterr()
    status = main([str(argument) for argument in arguments])
    return status, capsys.readouterr().err


def test_code_beside_a_model_runs_for_the_user_s_own_config_alone(
    cache: Path,
    model_with_code: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
):
    trusting = {"model": str(model_with_code), "backend": "transformers", "engine_options": {"trust_remote_code": True}}
    claim(cache, **trusting)
    asked = ("verify", cache, "--deep")
    status, err = run(capsys, *asked)
    assert status == 2
    assert "name the teacher to ask with --teacher MODEL" in err
    assert "the cache says: model" in err
    status, err = run(capsys, *asked, "--teacher", model_with_code, "--backend", "transformers")
    assert (status, (tmp_path / "ran").exists()) == (2, False)
    assert "note: according to the cache, its teacher had engine_options {'trust_remote_code': True}; asked with {}" in err
    mine = tmp_path / "mine.yaml"
    mine.write_text(json.dumps({"teacher": trusting}))
    run(capsys, *asked, "--teacher-config", mine)
    assert (tmp_path / "ran").exists()  # the case is a real one: where the user says so, it runs, and is said to
    assert "Python code next to" in caplog.text


@pytest.fixture
def server() -> Iterator[tuple[str, list[str | None]]]:
    """An address, and the Authorization header of each request that came."""
    asked: list[str | None] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.headers.get("Authorization"))
            self.send_response(401)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{served.server_port}/v1", asked
        served.shutdown()


def test_a_server_that_a_cache_names_is_never_asked(
    cache: Path, server: tuple[str, list[str | None]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    url, asked = server
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    claim(cache, model="x/y", backend="served", server={"url": url, "api_key_env": "AWS_SECRET_ACCESS_KEY"})
    for flags in ([], ["--teacher", "fake", "--backend", "fake"]):
        _, err = run(capsys, "verify", cache, "--deep", *flags)
        assert asked == []
        assert SECRET not in err
    _, err = run(capsys, "verify", cache, "--deep", "--teacher", "x/y", "--backend", "served")
    assert "needs server.url" in err


def test_what_a_cache_says_of_its_teacher_is_shown_on_one_line_of_bounded_length(
    cache: Path, capsys: pytest.CaptureFixture[str]
):
    claim(cache, model="\x1b[31mred\nnote: all is well", **{"\x1b" * 500: "x" * 10_000})
    _, err = run(capsys, "verify", cache, "--deep")
    assert "\x1b" not in err
    _, err = run(capsys, "verify", cache, "--deep", "--teacher", "fake", "--backend", "fake")
    assert "\x1b" not in err
    assert max(map(len, err.splitlines())) < 400
    assert "\nnote: all is well" not in err


@pytest.mark.parametrize(
    "fields", [{"attn_implementation": "who/ever"}, {"text_config": {"_attn_implementation": {"": "who/ever"}}}]
)
def test_a_config_json_that_asks_for_code_of_another_repository_is_refused(tmp_path: Path, fields: dict[str, Any]):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **fields}))
    with pytest.raises(TeacherError, match=r"config.json asks for the code of another repository, \w+ 'who/ever'"):
        check_model_name(str(tmp_path))


def test_a_module_in_the_working_directory_is_not_imported(tmp_path: Path):
    """`python -m kdcache info .` in a stranger's folder: Python itself would look for modules there first."""
    (tmp_path / "msgspec.py").write_text("open('ran', 'w').close()\n")
    command = [sys.executable, "-m", "kdcache", "info", "."]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert "no cache at '.'" in done.stderr
    assert not (tmp_path / "ran").exists()


def test_notes_of_a_manifest_may_be_anything(cache: Path, capsys: pytest.CaptureFixture[str]):
    by_teacher = {"proven_by": "teacher", "num_sequences": 3, "kl_nats": 0.5}
    proofs = [5, by_teacher | {"num_sequences": "x"}, by_teacher | {"num_sequences": None}, by_teacher | {"kl_nats": 10**400}]
    proofs.append({"proven_by": "text", "hits_found": [], "hits_claimed": 10**400, "hits_by_chance": 1e308})
    for notes in (5, None, [1], "converted_from", *({"converted_from": "x", "alignment": proof} for proof in proofs)):
        replace(cache, config={"notes": notes})
        for command in (["info"], ["verify"], ["verify", "--json"]):
            assert main([*command, str(cache)]) == 0, (command, notes)
        if not isinstance(notes, dict):
            assert main(["doctor", str(cache)]) < 2
    replace(cache, config={"notes": {"converted_from": "x", "alignment": by_teacher}})
    capsys.readouterr()
    assert main(["info", str(cache)]) == 0
    assert "asked about 3 sequences: KL 0.5 nats" in capsys.readouterr().out


def test_a_moment_that_a_manifest_notes_is_one(cache: Path):
    with open_reader(cache) as reader:
        manifest = reader.manifest
    assert recorded_moment(msgspec.structs.replace(manifest, config={"notes": 5})) is None
    for moment in ("soon", 5, [], {}):
        with pytest.raises(CorruptCacheError, match="in its notes template_time is"):
            recorded_moment(msgspec.structs.replace(manifest, config={"notes": {"template_time": moment}}))


def test_answers_that_ended_in_no_sequence_are_not_divided(cache: Path):
    with open_reader(cache) as reader:
        shards = reader.manifest.shards
    replace(cache, shards=tuple(msgspec.structs.replace(s, num_sequences=0, num_finished={"stop": 0}) for s in shards))
    assert main(["info", str(cache)]) == 0


@pytest.mark.parametrize(
    "line", ['{"tokens": 1, "heldout_nats_per_token": 1%s}', '{"tokens": 1%s, "heldout_nats_per_token": 1.5}']
)
def test_a_whole_number_beyond_every_float_in_a_run_s_metrics_is_refused(tmp_path: Path, line: str):
    (tmp_path / "metrics.jsonl").write_text(line % ("0" * 400) + "\n")
    with pytest.raises(StateError, match="is not a number"):
        heldout_curve(tmp_path)
