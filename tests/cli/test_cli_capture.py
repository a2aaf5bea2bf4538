"""`kdcache capture`, `verify` and `info`, from a config file to a cache and back, with the fake teacher."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import kdcache
from kdcache.cli.main import main

CHATS = [
    [{"role": "user", "content": "What is seven?"}, {"role": "assistant", "content": "A number."}],
    [{"role": "user", "content": "And eight?"}, {"role": "assistant", "content": "One more."}],
    [{"role": "user", "content": "Nobody answers."}],
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A directory to work in, with a text, chats and a config."""
    monkeypatch.chdir(tmp_path)
    Path("corpus").mkdir()
    for name in "abc":
        Path(f"corpus/{name}.txt").write_text(f"the text of {name}. " * 20)
    Path("chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in CHATS))
    Path("c.yaml").write_text(
        """
input: {format: txt, paths: [corpus], window: {size: 64}}
teacher: {model: fake, backend: fake, fake: {vocab_size: 300}}
selection: {k: 8}
out: cache
shards: {unit_items: 1}
"""
    )
    return tmp_path


def fails(capsys, *arguments, status=2):
    """The error's sentence."""
    capsys.readouterr()
    assert main(list(arguments)) == status
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = [line for line in captured.err.splitlines() if line.startswith("kdcache: error: ")]
    assert "Traceback" not in captured.err
    return line.removeprefix("kdcache: error: ")


def test_capture_verify_info(folder, capsys):
    assert main(["capture", "c.yaml"]) == 0
    out = capsys.readouterr().out
    assert "3 units" in out
    assert "kdcache verify cache" in out
    assert main(["verify", "cache"]) == 0
    out = capsys.readouterr().out
    assert "sound (complete)" in out
    assert "nats per target" in out
    assert main(["info", "cache"]) == 0
    assert "top_k k=8" in capsys.readouterr().out
    assert main(["info", "cache", "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["num_positions"] == 3 * 301
    selection = info["manifest"]["identity"]["selection"]
    assert (selection["kind"], selection["params"]) == ("top_k", {"k": 8})
    assert main(["capture", "c.yaml"]) == 0
    assert capsys.readouterr().out == (
        "cache: nothing to do; 3 units are published and of the right size (`kdcache verify cache` reads everything)\n"
    )


def test_a_dry_run_prints_the_plan_and_writes_nothing(folder, capsys):
    assert main(["capture", "c.yaml", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "3 files, 3 items (0 empty), 900 characters" in out
    assert "3 units, 0 of them already published" in out
    assert "about 903 in 15 sequences" in out
    assert "time       unknown" in out
    assert sorted(path.name for path in folder.iterdir()) == ["c.yaml", "chats.jsonl", "corpus"]
    assert main(["capture", "c.yaml", "--dry-run", "--set", "selection.k=null", "--set", "selection.tau=0.1"]) == 0
    assert "(archive, threshold: tau 0.1); fewer where the teacher is sure, which --probe measures" in capsys.readouterr().out
    assert main(["capture", "c.yaml", "--dry-run", "--probe"]) == 0
    assert "tokens/s, as measured" in capsys.readouterr().out
    assert main(["capture", "c.yaml", "--probe"]) == 2


def test_chats_are_captured_where_the_assistant_speaks(folder, capsys):
    chat = ["--set", "input={format: jsonl, paths: [chats.jsonl], content: messages, supervise: assistant}"]
    sets = [f"input.{field}" for field in ("format=jsonl", "paths=[chats.jsonl]", "content=messages", "supervise=assistant")]
    assert main(["capture", "c.yaml", *(part for field in sets for part in ("--set", field))]) == 0
    assert "1 sequence without a supervised position skipped" in capsys.readouterr().out
    with kdcache.open("cache") as reader:
        said = [bytes(int(i) for i in r.sequence.target_ids_P if i < 256) for r in (reader[0], reader[1])]
        assert len(reader) == 2
    assert said == [b"A number.", b"One more."]
    assert "is a section" in fails(capsys, "capture", "c.yaml", *chat)


def test_users_mistakes_are_one_sentence_each(folder, capsys):
    Path("bad.jsonl").write_text('{"text": "a"}\n{"text": 3}\n')
    Path("empty.txt").write_text("")
    jsonl = ["--set", "input.format=jsonl", "--set", "input.paths=[bad.jsonl]"]
    assert fails(capsys, "capture", "nowhere.yaml") == "nowhere.yaml: no such file; expected a YAML config"
    assert "selection.kk: no such field; did you mean selection.k?" in fails(
        capsys, "capture", "c.yaml", "--set", "selection.kk=3"
    )
    assert "bad.jsonl:2: field 'text' is 3 (int)" in fails(capsys, "capture", "c.yaml", *jsonl)
    assert "nothing to read: all 1 items are empty" in fails(capsys, "capture", "c.yaml", "--set", "input.paths=[empty.txt]")
    assert "nowhere: no such file or folder" in fails(capsys, "capture", "c.yaml", "--set", "input.paths=[nowhere]")
    assert "reads at most 4096 tokens" in fails(capsys, "capture", "c.yaml", "--set", "input.window.size=5000")
    assert "not a cache and not empty" in fails(capsys, "capture", "c.yaml", "--set", "out=corpus")
    assert "is a file" in fails(capsys, "capture", "c.yaml", "--set", "out=c.yaml")
    assert "no cache at 'nowhere'" in fails(capsys, "verify", "nowhere")
    assert "no cache at 'corpus'" in fails(capsys, "info", "corpus")
    assert not Path("cache").exists()
    refused = fails(capsys, "capture", "c.yaml", "--set", "input.window.policy=error")
    assert "corpus/a.txt: 301 tokens, but input.window.size is 64" in refused


def test_another_capture_in_the_same_directory_is_refused(folder, capsys):
    assert main(["capture", "c.yaml"]) == 0
    assert "selection.params.k: 8 != 9" in fails(capsys, "capture", "c.yaml", "--set", "selection.k=9")


def test_damage_gives_status_1_and_names_the_shard(folder, capsys):
    assert main(["capture", "c.yaml"]) == 0
    shard = sorted(Path("cache/data").iterdir())[1]
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    capsys.readouterr()
    assert main(["verify", "cache"]) == 1
    captured = capsys.readouterr()
    assert f"damaged: {shard}" in captured.err
    assert "found" in captured.out


def test_truncation_is_reported(folder, capsys):
    assert main(["capture", "c.yaml", "--set", "input.window.policy=truncate"]) == 0
    assert "711 tokens cut off 3 items by policy 'truncate'" in capsys.readouterr().out


def start(*overrides):
    sets = [part for override in overrides for part in ("--set", override)]
    command = [sys.executable, "-m", "kdcache", "capture", "c.yaml", *sets]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_units(number):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if Path("cache/journal").is_dir() and len(os.listdir("cache/journal")) >= number:
            return
        time.sleep(0.01)
    raise AssertionError("the capture published nothing")


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_a_killed_capture_is_finished_by_the_same_command(folder, capsys, sent):
    Path("many.txt").write_text("".join(f"line {n} of many\n" for n in range(60)))
    overrides = ["input.format=lines", "input.paths=[many.txt]", "shards.unit_items=3"]
    sets = [part for override in overrides for part in ("--set", override)]
    assert main(["capture", "c.yaml", *sets, "--set", "out=undisturbed"]) == 0
    process = start(*overrides)
    wait_for_units(3)
    process.send_signal(sent)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == (0 if sent == signal.SIGINT else -sent)
    assert ("run the same command again to resume" in out) == (sent == signal.SIGINT)
    assert main(["capture", "c.yaml", *sets]) == 0
    assert "had been published by earlier runs" in capsys.readouterr().out
    assert main(["verify", "cache"]) == 0
    assert sorted(os.listdir("cache/data")) == sorted(os.listdir("undisturbed/data"))
