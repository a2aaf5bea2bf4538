"""Escape sequences planted in every text of a cache, of foreign files, configs, file names and a server's answers: no command
prints one, on any line, and no line goes on for ever.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import hostile
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kdcache.cli.main import main
from kdcache.errors import KdcacheError
from kdcache.format import paths
from kdcache.format.manifest import manifest_from_json
from kdcache.shown import is_plain

PLANT = "\x1b]0;t\x07\x1b[2J\x9b31m\u202eevil\u2066\u200b\u2028\x7f\r\nkdcache: error: forged" + "x" * 5000
MOST = 2100

CAPTURE = """
input: {{format: jsonl, content: ids, paths: ['{folder}/ids.jsonl'], domain_field: kind, window: {{size: 8}}}}
teacher: {{model: fake, backend: fake, fake: {{vocab_size: 50}}}}
selection: {{k: 4}}
out: '{folder}/cache'
run: {{progress_path: '{folder}/progress.json'}}
"""


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    rows = ({"input_ids": [1, 2, 3 + n], "kind": f"{PLANT[:60]}{n}"} for n in range(4))
    (tmp_path / "ids.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "c.yaml").write_text(CAPTURE.format(folder=tmp_path))
    assert main(["capture", str(tmp_path / "c.yaml")]) == 0
    return tmp_path / "cache"


class Commands:
    """Runs commands in this process and looks at all that they say."""

    def __init__(self, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
        self._capsys, self._caplog = capsys, caplog

    def __call__(self, *arguments: object) -> str:
        self._capsys.readouterr()
        self._caplog.clear()
        with suppress(SystemExit):
            main([str(argument) for argument in arguments])
        found = self._capsys.readouterr()
        logged = [record.getMessage() for record in self._caplog.records if record.name.startswith("kdcache")]
        is_json = "--json" in arguments and found.out.startswith("{")
        for line in [*found.out.split("\n"), *found.err.split("\n"), *logged]:
            assert is_plain(line.replace("\t", " ")), (arguments, line)
            assert is_json or len(line) <= MOST, (arguments, len(line))
            assert is_json or not line.startswith("kdcache: error: forged"), arguments
        if is_json:
            json.loads(found.out)
        return found.out + found.err


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> Commands:
    return Commands(capsys, caplog)


def look_at(run: Commands, cache: Path) -> str:
    """Every command that reads a cache; all that they say."""
    said = [run(*command, cache) for command in (
        ("info",), ("info", "--json"), ("info", "--skipped"), ("verify",), ("verify", "--json"), ("verify", "--deep"),
        ("doctor",), ("doctor", "--json"), ("fold",), ("repair",), ("convert", "--tokenizer", "fake", cache),
    )]  # fmt: skip
    shutil.rmtree(cache.parent / "derived", ignore_errors=True)
    said.append(run("derive", cache, "--out", cache.parent / "derived", "--fraction", "0.5"))
    said.append(run("derive", cache, "--out", cache.parent / "derived", "--where", "domain == 'x'"))
    said.append(run("info", cache.parent / "derived"))
    return "\n".join(said)


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where there is a text, a null or a mapping of names that may be more."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, child in items:
        yield from leaves(child, (*path, name))
    if isinstance(value, str | dict) or value is None:
        yield path


def plant(fields: Any, path: tuple[Any, ...]) -> None:
    """A text becomes the planted one; a mapping gets a name and a value more."""
    for name in path[:-1]:
        fields = fields[name]
    if not path:
        fields[PLANT] = PLANT
    elif isinstance(fields[path[-1]], dict):
        fields[path[-1]][PLANT] = PLANT
    else:
        fields[path[-1]] = PLANT


def test_in_every_text_of_a_manifest(cache: Path, run: Commands):
    """Those that a manifest may have stay and are printed; the others are refused one by one."""
    path = max((cache / paths.MANIFESTS).iterdir())
    fields = json.loads(path.read_bytes())
    fields["shards"][0]["account"] = {
        "wall_seconds": 1.0, "cpu_seconds": 1.0, "skipped": [{"source": "a", "reason": "b"}],
    }  # fmt: skip
    places, num_refused = list(leaves({name: part for name, part in fields.items() if name != "digest"})), 0
    for place in places:
        changed = json.loads(json.dumps(fields))
        plant(changed, place)
        signed = hostile.signed_json(changed)
        path.write_bytes(signed)
        try:
            manifest_from_json(signed, where="here")
        except KdcacheError as error:
            num_refused += is_plain(str(error))
            run("info", cache)
        else:
            if place[:2] not in (("identity", "codec"), ("identity", "selection")):  # which decide whether anything is read
                fields = changed
    assert 5 < num_refused < len(places) - 20
    path.write_bytes(hostile.signed_json(fields))
    said = look_at(run, cache)
    assert said.count("\\x1b]0;t\\x07") > 10


def test_in_records_of_journal_failures_and_shards(cache: Path, run: Commands):
    path = cache / paths.MANIFESTS / "000001.json"
    first = path.read_bytes()
    path.unlink()  # the cache is not complete: failures are shown
    (journal,) = (cache / paths.JOURNAL).iterdir()
    kept = journal.read_bytes()
    record = json.loads(kept)
    for name in record:
        journal.write_bytes(hostile.signed_json(record | {name: PLANT}))
        run("fold", cache)
        run("verify", cache)
        shutil.rmtree(cache / paths.FAILED, ignore_errors=True)
    path.unlink(missing_ok=True)  # one of the records was taken, as its text says nothing
    failed = {"unit": 0, "error": PLANT, "reason": PLANT, "attempts": 1, "host": PLANT, "time": PLANT}
    (cache / paths.FAILED).mkdir(exist_ok=True)
    for text in (json.dumps(failed), PLANT, json.dumps(failed | {"attempts": PLANT})):
        name = paths.failed_name(0, hashlib.sha256(text.encode()).hexdigest())
        (cache / name).write_text(text)
    assert "\\x1b]0;t\\x07" in run("info", cache)
    path.write_bytes(first)
    journal.write_bytes(kept)
    for name in ("unit", "codec", "selection", "digest_columns", "vocab_size", "features", PLANT):
        for value in (PLANT, [PLANT], {"codec_id": PLANT, "params": {PLANT: PLANT}, "kind": PLANT}):
            hostile.edit_metadata(cache, **{name: value})
            run("verify", cache)
            run("doctor", cache)
            path.write_bytes(first)
            shutil.copy(next((cache / paths.DATA).iterdir()), cache / json.loads(first)["shards"][0]["name"])
            for shard in (cache / paths.DATA).iterdir():
                if f"data/{shard.name}" != json.loads(first)["shards"][0]["name"]:
                    shard.unlink()


def test_in_arrow_s_own_errors(cache: Path, run: Commands):
    batches = hostile.shard_batches(cache)
    odd = {"ARROW:extension:name": "arrow.bool8", "ARROW:extension:metadata": PLANT * 20}
    schema = pa.schema([*batches[0].schema, pa.field(PLANT, pa.int8(), metadata=odd)], metadata=batches[0].schema.metadata)
    hostile.replace_shard(cache, hostile.file_bytes([], schema))
    look_at(run, cache)


def test_in_foreign_files(tmp_path: Path, run: Commands):
    columns = {
        "input_ids": [[1, 2, 3]], "logprob_token_ids": [[[1, 2]] * 3], "logprobs": [[[-1.0, -2.0]] * 3], PLANT: [PLANT],
    }  # fmt: skip
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    pq.write_table(pa.table({PLANT: [PLANT], "input_ids": [[1]]}), tmp_path / "b.parquet")
    (tmp_path / "c.jsonl").write_text(json.dumps({"input_ids": [1], "prompt_logprobs": [{PLANT: {"logprob": PLANT}}]}) + "\n")
    (tmp_path / "d.jsonl").write_text(json.dumps({PLANT: PLANT}) + "\n" + PLANT)
    folder = tmp_path / "e"
    folder.mkdir()
    shutil.copy(tmp_path / "b.parquet", folder / f"{PLANT[:40].replace('/', '')}.parquet")
    (folder / "compression_config.yaml").write_text(f"{json.dumps(PLANT)}: {json.dumps(PLANT)}\n")
    (folder / "\x1b[31mother").write_text("x")
    for path in (*sorted(tmp_path.glob("*.*")), folder):
        run("doctor", path)
        run("doctor", "--json", path)
        run("convert", path, "--out", tmp_path / "out", "--tokenizer", "fake")
        run("doctor", path, "--column", f"ids={PLANT}", "--column", "values=logprobs")


def test_in_configs_and_the_names_of_inputs(tmp_path: Path, run: Commands):
    names = [f"{number}\x1b[2J\u202e.jsonl" for number in range(3)]
    for name in names:
        (tmp_path / name).write_text(json.dumps({"input_ids": [1, 2, 3]}) + "\n")
    (tmp_path / names[1]).write_text(PLANT)
    (tmp_path / f"{names[0]}.other").write_text("x")
    fields: dict[str, Any] = {
        "input": {"format": "jsonl", "content": "ids", "paths": [str(tmp_path)]},
        "teacher": {"model": "fake", "backend": "fake"}, "out": str(tmp_path / "cache"),
    }  # fmt: skip
    config = tmp_path / "c.yaml"
    places = [place for place in leaves(fields) if place]
    for place in [(), *places]:
        changed = json.loads(json.dumps(fields))
        plant(changed, place)
        config.write_text(json.dumps(changed))
        run("capture", config, "--dry-run")
        run("train", config)
    config.write_text(json.dumps(fields))
    run("capture", config)
    run("capture", config, "--set", f"{PLANT}={PLANT}")
    run("capture", config, "--set", f"run.rank={PLANT}")
    for text in (PLANT, f"a: [{PLANT}", json.dumps(PLANT), "a: &x 1\nb: *\x1b"):
        config.write_text(text)
        run("capture", config)
    (tmp_path / names[1]).unlink()
    config.write_text(json.dumps(fields))
    assert "\\x1b[2J" in run("capture", config)


class _Hostile(BaseHTTPRequestHandler):
    status = 200
    body = b""

    def do_GET(self) -> None:
        self.send_response(self.status, "odd")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(self.body)))
        self.send_header("Location", "http://127.0.0.1:1/\x9b31m")
        self.end_headers()
        self.wfile.write(self.body)

    do_POST = do_GET

    def log_message(self, format: str, *args: object) -> None:
        del format, args


def test_in_a_server_s_answers(tmp_path: Path, run: Commands):
    (tmp_path / "ids.jsonl").write_text(json.dumps({"input_ids": [1, 2, 3]}) + "\n")
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hostile)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/v1"
    fields = {
        "input": {"format": "jsonl", "content": "ids", "paths": [str(tmp_path / "ids.jsonl")]},
        "teacher": {
            "model": "m", "backend": "served", "tokenizer": "fake",
            "server": {"url": url, "retries": 0, "deadline_seconds": 2, "vocab_size": 50},
        },
        "selection": {"k": 4}, "out": str(tmp_path / "cache"),
    }  # fmt: skip
    (tmp_path / "c.yaml").write_text(json.dumps(fields))
    answers = [{"data": [{"id": PLANT, "max_model_len": 9}, {"id": "b"}]}, {"data": [{"id": PLANT, "max_model_len": 9}]},
               {"error": {"message": PLANT}}, {PLANT: PLANT}, PLANT]  # fmt: skip
    try:
        for status in (200, 301, 401, 404, 500):
            for answer in answers:
                _Hostile.status, _Hostile.body = status, json.dumps(answer).encode()
                run("capture", tmp_path / "c.yaml")
    finally:
        server.shutdown()
        server.server_close()


def test_in_the_name_of_the_folder(cache: Path, run: Commands):
    odd = cache.with_name("\x1b[31mred\n")
    os.rename(cache, odd)
    assert "\\x1b[31mred\\n" in look_at(run, odd)
