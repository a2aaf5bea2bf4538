"""JSON and YAML from outside that is no cache: configs, served answers, a model's folder, a run's folder, states, failures.

Each is spoilt as JSON, a value at a time, and as text, a few bytes at a time.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import yaml
from fuzzing.foreign_files import change_json
from fuzzing.manifests import parts_of
from fuzzing.reading import attempt, command, findings

from kdcache.config.capture import CaptureConfig
from kdcache.config.load import load_config
from kdcache.config.train import TrainConfig
from kdcache.errors import TeacherError
from kdcache.format.record import TokenSequence
from kdcache.loader.state import LoaderState, parse_state
from kdcache.teacher.checkpoint import check_model_name, weights_digest
from kdcache.teacher.served.answers import APIS, read_answer, read_completion, speaks
from kdcache.teacher.vllm.adapter import adapter_rank
from kdcache.train.runs.digests import find_damage, write_digests
from kdcache.train.runs.run_folder import _refuse_other_run, read_metrics

CONFIGS = Path(__file__).parents[2] / "configs"
_SNIPPETS = (
    "&a ",
    "*a ",
    "!!python/object/new:os.system ",
    "{",
    "[",
    "- ",
    "\t",
    "? ",
    "<<: ",
    "\x00",
    "0x",
    "1e999",
    ".inf",
    "~",
    "\udcff",
)
_PROMPT = [5, 17, 3, 60]
_K = 3


def trial(seed: int, folder: Path) -> list[str]:
    """Spoil one text, let its reader read it; gives what must not be."""
    rng = random.Random(seed)
    place = folder / "texts"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    name = rng.choice(sorted(READERS))
    data = READERS[name][0](rng)
    (place / "input").write_bytes(data)
    return read_one(name, data, place)


def read_one(name: str, data: bytes, place: Path) -> list[str]:
    """Let one of READERS read a text, in an empty folder; gives what must not be."""
    return findings({name: attempt(lambda: READERS[name][1](place, data))})


def spoilt(value: Any, rng: random.Random, *, dump: Callable[[Any], str] = json.dumps) -> bytes:
    """The value with changes, as text; sometimes with changes to the text, sometimes deep or long beyond reason."""
    value = json.loads(json.dumps(value))
    kind = rng.random()
    if kind < 0.75:
        change_json(value, rng)
    text = dump(value).encode("utf-8", "surrogatepass")
    if kind > 0.97:
        return rng.choice((b"[" * 5000 + b"]" * 5000, b'{"a":' * 5000 + b"1" + b"}" * 5000, b"9" * 5000, b"", b"null"))
    for _ in range(rng.choice((1, 3, 10)) if kind > 0.6 else 0):
        at = rng.randrange(len(text) + 1)
        snippet = rng.choice((bytes([rng.randrange(256)]), rng.choice(_SNIPPETS).encode("utf-8", "surrogateescape")))
        text = text[:at] + snippet + text[at + rng.randrange(2) :]
    return text


@cache
def config_values(name: str) -> Any:
    """One of the project's own configs."""
    return yaml.safe_load((CONFIGS / name).read_text())


def _config(kind: type[CaptureConfig] | type[TrainConfig]) -> Callable[[Path, bytes], Any]:
    def read(folder: Path, data: bytes) -> None:
        (folder / "config.yaml").write_bytes(data)
        load_config(folder / "config.yaml", kind, ("out=x",) if len(data) % 2 else ())

    return read


def _spoilt_config(rng: random.Random, beginning: str) -> bytes:
    name = rng.choice(sorted(path.name for path in CONFIGS.glob(f"{beginning}*.yaml")))
    return spoilt(config_values(name), rng, dump=rng.choice((json.dumps, yaml.safe_dump)))


def _completion(rng: random.Random) -> dict[str, Any]:
    rows = [{str(token): {"logprob": -1.0 - rank} for rank, token in enumerate((came, 90, 91))} for came in _PROMPT[1:]]
    echo = [{f"token_id:{token}": entry["logprob"] for token, entry in row.items()} for row in rows]
    written = {"token_id:7": -0.5, "token_id:90": -2.0, "token_id:91": -3.0}
    tokens = [f"token_id:{token}" for token in [*_PROMPT, 7]]
    if rng.random() < 0.5:
        logprobs = {"tokens": tokens[-1:], "top_logprobs": [written]}
        return {"choices": [{"prompt_logprobs": [None, *rows], "logprobs": logprobs}], "model": "m"}
    return {"choices": [{"logprobs": {"tokens": tokens, "top_logprobs": [None, *echo, written]}}], "model": "m"}


def _served(folder: Path, data: bytes) -> None:
    try:
        completion = read_completion(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise TeacherError(f"asked again: {error}") from error  # as the client does
    flags, roles = np.array([True] * len(_PROMPT)), np.zeros(len(_PROMPT), np.uint8)
    sequence = TokenSequence(np.array(_PROMPT, np.int32), flags, roles, np.zeros(1, np.int32), "s", b"k" * 16)
    for api in APIS:
        if speaks(completion, api):
            read_answer(completion, api, sequence, _K)


def _model(folder: Path, data: bytes) -> None:
    (folder / "config.json").write_bytes(data)
    check_model_name(str(folder))
    weights_digest(str(folder))


def _adapter(folder: Path, data: bytes) -> None:
    (folder / "adapter_config.json").write_bytes(data)
    (folder / "adapter_model.safetensors").write_bytes(len(data).to_bytes(8, "little") + data)
    weights_digest(str(folder))
    adapter_rank(str(folder))


def _run_config(folder: Path, data: bytes) -> None:
    (folder / "config.json").write_bytes(data)
    _refuse_other_run(folder / "config.json", {"config": {"a": {"b": 1}}, "snapshot": "x"})


def _metrics(folder: Path, data: bytes) -> None:
    (folder / "metrics.jsonl").write_bytes(data + b"\n")
    read_metrics(folder)


def _digests(folder: Path, data: bytes) -> None:
    (folder / "state.json").write_text("{}")
    write_digests(folder)
    (digests,) = (path for path in folder.iterdir() if path.name.startswith("digests"))
    digests.write_bytes(data)
    find_damage(folder)


def _state(folder: Path, data: bytes) -> None:
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):
        return  # the user's own reader refuses it
    parse_state(fields, here=_HERE)


def _work(directory: str) -> Callable[[Path, bytes], Any]:
    """Records of the journal and of failures, which no manifest's digest covers."""

    def read(folder: Path, data: bytes) -> None:
        cache = parts_of("packed top_k").copy().write(folder / "cache")
        (cache / directory).mkdir(exist_ok=True)
        (cache / directory / "000001-0123456789abcdef.json").write_bytes(data)
        for name in ("info", "verify", "fold"):
            command(name, str(cache))

    return read


def _of(value: Any) -> Callable[[random.Random], bytes]:
    return lambda rng: spoilt(value, rng)


_HERE = LoaderState(snapshots=("a" * 64,), config={"seq_len": 64, "mask": {"roles": None}}, seed=0, epoch=0, next_batch=0)
_FILE = {"sha256": "0" * 64, "num_bytes": 2}

READERS: dict[str, tuple[Callable[[random.Random], bytes], Callable[[Path, bytes], Any]]] = {
    "adapter": (
        _of({"base_model_name_or_path": "m", "r": 8, "lora_alpha": 16, "target_modules": ["q"], "peft_type": "LORA"}),
        _adapter,
    ),
    "capture-config": (lambda rng: _spoilt_config(rng, "capture"), _config(CaptureConfig)),
    "checkpoint-digests": (_of({"files": {"state.json": _FILE}, "digest": "0" * 64}), _digests),
    "failed": (_of({"unit": 1, "error": "E", "reason": "x", "attempts": 1, "host": "h", "time": "t"}), _work("failed")),
    "journal": (lambda rng: spoilt(parts_of("packed top_k").newest["shards"][1] | {"digest": "x"}, rng), _work("journal")),
    "loader-state": (_of(msgspec.to_builtins(_HERE)), _state),
    "model-config": (
        _of({"architectures": ["LlamaForCausalLM"], "hidden_size": 8, "auto_map": {"AutoConfig": "x.py"}, "vocab_size": 9}),
        _model,
    ),
    "run-config": (_of({"config": {"a": {"b": 1}}, "snapshot": "x"}), _run_config),
    "run-metrics": (_of({"step": 1, "loss": 2.0}), _metrics),
    "served-answer": (lambda rng: spoilt(_completion(rng), rng), _served),
    "train-config": (lambda rng: _spoilt_config(rng, "train"), _config(TrainConfig)),
}
"""Name -> what spoils a sound text, and what reads it in an empty folder."""
