"""Manifests with one to three values replaced or left out, signed anew, the shards told of it or not."""

from __future__ import annotations

import contextlib
import json
import random
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from fuzzing.bases import BASES
from fuzzing.reading import findings, read_all
from fuzzing.signing import Parts

NUMBERS: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 255, 65535, 65536, 2**31 - 1, 2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1,
    -(2**31), -(2**63), 0.0, -0.0, 0.5, 1.5, 1e308, -1e308, 1e-320,
]  # fmt: skip
TEXTS: list[Any] = [
    "", "x", "../../etc/passwd", "/etc/passwd", "\x1b[2J", "a" * 10**5, "\u202e\x00", "data/000000-0000000000000000.arrow",
    "none", "mean", "float16", "int8", "top_k", "top_p_k", "sampled", "threshold", "top_k_sampled", "raw", "packed",
    "quantized", "archive", "foo",
]  # fmt: skip
NESTED: list[Any] = [
    [], [1], [[]], {}, {"a": 1}, [None], [1.0, 2.0], ["none"], [1, 2], [1e308] * 3, ["x"] * 1000, {"k": 5}, {"stop": 1},
    {"k": 5, "p": 0.5}, {"num_draws": 3, "seed": 0}, {"": ""}, {"tau": 1e-3, "seed": 1}, {"vocab_size": 97, "bits": 8},
    [{"source": "a", "reason": "b"}],
]  # fmt: skip
NASTY = [*NUMBERS, *TEXTS, *NESTED]
_LEFT_ALONE = {"parent", "format", "number", "digest", "versions"}


@cache
def parts_of(name: str) -> Parts:
    """One of BASES, taken apart; with all that a manifest may hold where it is one of everything."""
    parts = Parts.read(BASES[name].write(Path(mkdtemp(prefix="kdcache-fuzz-")) / "cache"))
    if BASES[name].everything:
        identity = parts.newest["identity"]
        parent = {part: identity[part] for part in ("teacher", "tokenizer", "selection", "codec", "input_fingerprint")}
        operation = {"name": "reduce", "params": {"k": 1}}
        parts.newest["lineage"] = {"operations": [operation], "parents": [parent | {"name": "p", "snapshot": "x"}]}
        cost = {"wall_seconds": 1.0, "cpu_seconds": 1.0, "gpu_seconds": 2.0, "energy_joules": 3.0}
        for shard in parts.newest["shards"]:
            shard["account"] = cost | {"skipped": [{"source": "a", "reason": "b"}]}
        parts.newest["config"] = {"notes": {"converted_from": "x", "alignment": "y"}, "teacher": {"model": "m"}}
    return parts


def trial(seed: int, folder: Path) -> list[str]:
    """Spoil a manifest, read the cache in every way; gives what must not be."""
    rng = random.Random(seed)
    parts = parts_of(rng.choice(sorted(BASES))).copy()
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        mutate(parts.newest, rng)
    if rng.random() < 0.8:
        with contextlib.suppress(Exception):  # the spoilt identity may have no place for it
            parts.tell_the_shards()
    try:
        cache = parts.write(folder / "cache")
    except (OverflowError, OSError, ValueError):
        return []  # no JSON can say it, or no file be called so
    return findings(read_all(cache, everything=seed % 4 == 0))


def mutate(fields: Any, rng: random.Random) -> None:
    """Replace or leave out one value anywhere in some JSON; what decides the columns more often."""
    places = [place for place in places_in(fields) if place[0] not in _LEFT_ALONE]
    weights = [5 if place[0] == "identity" else 1 for place in places]
    *way, last = rng.choices(places, weights)[0]
    for key in way:
        fields = fields[key]
    if isinstance(fields, dict) and rng.random() < 0.1:
        del fields[last]
    else:
        fields[last] = json.loads(json.dumps(rng.choice(NASTY)))


def places_in(value: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value in some JSON."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, child in children for place in ((*prefix, key), *places_in(child, (*prefix, key)))]
