"""Foreign caches in several layouts, as JSON lines, Parquet, Arrow and tar files, values or bytes changed, for `doctor`."""

from __future__ import annotations

import io
import json
import random
import shutil
import tarfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from foreign_cases import Item, Truth, items, write_distillkit, write_rows
from fuzzing import arrow_bytes
from fuzzing.manifests import NASTY, places_in
from fuzzing.reading import attempt, command, findings

_LAYOUTS: dict[str, tuple[str, str, str]] = {
    "columns": ("input_ids", "topk_ids", "topk_logprobs"),
    "nemo": ("input_ids", "topk_indices", "topk_logits"),
    "axolotl": ("input_ids", "target_token_ids", "target_logprobs"),
}
_DISTILLKIT = {"d": 300, "exact_k": 4, "k": 16, "polynomial_terms": [0, 1, 2], "normalize_t": False, "delta_encoding": False}
_ENDINGS = (".jsonl", ".parquet", ".arrow")


def trial(seed: int, folder: Path) -> list[str]:
    """Spoil a foreign cache, let `doctor` read it; gives what must not be."""
    rng = random.Random(seed)
    place = folder / "foreign"
    shutil.rmtree(place, ignore_errors=True)
    kind = rng.choice(("columns", "columns", "distillkit", "tar"))
    path = {"columns": _columns, "distillkit": _distillkit, "tar": _tar}[kind](place, rng)
    return findings({f"doctor {path.name}": attempt(lambda: command("doctor", str(path)))})


@cache
def sound_items() -> tuple[Item, ...]:
    """Short texts and their most probable tokens."""
    rng = np.random.default_rng(0)
    return tuple(items(Truth(Path(), rng.integers(0, 300, (4, 20)), rng.normal(0.0, 3.0, (4, 20, 300)))))


def _columns(folder: Path, rng: random.Random) -> Path:
    folder.mkdir()
    tokens, ids, values = _LAYOUTS[rng.choice(sorted(_LAYOUTS))]
    path = folder / f"rows{rng.choice(_ENDINGS)}"
    rows = json.loads(json.dumps([{tokens: item.input_ids, ids: item.ids, values: item.values} for item in sound_items()]))
    if path.suffix == ".jsonl":
        change_json(rows, rng)
    write_rows(path, rows)
    if path.suffix != ".jsonl" or rng.random() < 0.3:
        _change_bytes(path, rng)
    return path


def _distillkit(folder: Path, rng: random.Random) -> Path:
    write_distillkit(folder, list(sound_items()), dict(_DISTILLKIT))
    config = folder / "compression_config.yaml"
    settings: dict[str, Any] = json.loads(json.dumps(_DISTILLKIT))
    if rng.random() < 0.7:
        change_json(settings, rng)
        config.write_text(json.dumps(settings))
    _change_bytes(rng.choice((config, folder / "data_0.parquet", folder / "data_0.parquet")), rng)
    return folder


def _tar(folder: Path, rng: random.Random) -> Path:
    """Nothing that anybody's saver wrote, but named and made as its tars are."""
    folder.mkdir()
    path = folder / "logprobs_0_0_0.tar"
    meta: dict[str, Any] = {"k": 16, "p": 0.9, "dtype": "float16", "identifiers": {"a": 1}, "version": 1, "num_samples": 2}
    change_json(meta, rng)
    with tarfile.open(path, "w") as tar:
        for name, data in (("meta.json", json.dumps(meta).encode()), ("0.bin", rng.randbytes(64)), ("1.npy", rng.randbytes(9))):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    _change_bytes(path, rng)
    return folder


def change_json(value: Any, rng: random.Random) -> None:
    for _ in range(rng.choice((1, 1, 2, 4))):
        places = places_in(value)
        if not places:
            return
        *way, last = rng.choice(places)
        inner = value
        for key in way:
            inner = inner[key]
        if isinstance(inner, dict) and rng.random() < 0.1:
            del inner[last]
        else:
            inner[last] = json.loads(json.dumps(rng.choice(NASTY)))


def _change_bytes(path: Path, rng: random.Random) -> None:
    """Framing of Arrow's, or bytes anywhere; the end more often, where Parquet has its metadata."""
    data = path.read_bytes()
    if path.suffix == ".arrow" and rng.random() < 0.7:
        path.write_bytes(arrow_bytes.mutated(data, rng))
        return
    out = bytearray(data)
    for _ in range(rng.choice((0, 1, 1, 3, 10))):
        at = rng.randrange(len(out)) if rng.random() < 0.5 else len(out) - 1 - rng.randrange(min(len(out), 600))
        out[at] = rng.choice((0, 255, rng.randrange(256)))
    path.write_bytes(bytes(out) if rng.random() < 0.9 else bytes(out[: rng.randrange(len(out))]))
