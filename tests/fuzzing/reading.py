"""Every way in which a cache is read, and what came of each: read, refused in our words, or an exception that is a bug."""

from __future__ import annotations

import contextlib
import hashlib
import io
import shutil
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kdcache
import kdcache.loader.read as loader_read
from kdcache.cli.main import main
from kdcache.config.loader import LoaderConfig
from kdcache.errors import KdcacheError
from kdcache.format.soft_targets import ARRAYS
from kdcache.loader.batches.batch import Batch
from kdcache.store.reader import open_reader

MOST_RECORDS = 50
_PARTS = ("input_ids_BT", "target_ids_BT", "flat_positions_P", "weights_P")


@dataclass(frozen=True)
class Outcome:
    """Of one reading.

    Attributes:
        kind: `read`, `refused` or `raw`.
        value: a digest of what was read; the message; the exception with the place in our code.
    """

    kind: str
    value: Any


def attempt(read: Callable[[], Any]) -> Outcome:
    """What comes of a reading."""
    try:
        return Outcome("read", read())
    except KdcacheError as error:
        return Outcome("refused", f"{type(error).__name__}: {str(error)[:500]}")
    except (Exception, SystemExit) as error:
        return Outcome("raw", describe(error))


def describe(error: BaseException) -> str:
    """The exception, and where in our code it came from."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/kdcache/" in frame.filename]
    where = f" at {frames[-1].filename.rpartition('/kdcache/')[2]}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}: {str(error)[:200]}{where}"


def command(*arguments: str) -> int:
    """The exit status of a command; its output is thrown away."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return main(list(arguments))


def loaded(cache: Path, *, direct: bool = True, verify: bool = True, **options: Any) -> str:
    """A digest of all batches; `direct` False takes the path by records."""
    digest = hashlib.sha256()
    config = LoaderConfig(seq_len=64, batch_rows=2, shuffle=False, **options)
    with pytest.MonkeyPatch.context() as patch:
        if not direct:
            patch.setattr(loader_read, "read_mapped", lambda *arguments: None)
        with kdcache.open(str(cache), verify=verify) as reader, kdcache.Loader(reader, config) as loader:
            for batch in loader:
                _check_batch(batch, reader.manifest.identity.teacher.vocab_size)
                for vectors in (batch.features or {}).values():
                    slots_F = vectors.slots_F
                    assert slots_F.size == 0 or 0 <= slots_F.min() <= slots_F.max() < batch.input_ids_BT.size, "slots"
                    digest.update(_bytes(vectors.float32()))
                for value in (*(getattr(batch, name) for name in _PARTS), *(getattr(batch.teacher, name) for name in ARRAYS)):
                    digest.update(_bytes(value))
    return digest.hexdigest()


def records(cache: Path) -> str:
    """A digest of the first records; one that is refused counts as such."""
    digest = hashlib.sha256()
    with open_reader(cache) as reader:
        for number in range(min(len(reader), MOST_RECORDS)):
            try:
                record = reader[number]
            except KdcacheError:
                digest.update(b"refused")
                continue
            d = record.distributions
            for part in (record.sequence.input_ids_N, d.token_ids_E, d.logprobs_E, d.tail_mass_P, d.offsets_P1):
                digest.update(_bytes(part))
    return digest.hexdigest()


def read_all(cache: Path, *, everything: bool) -> dict[str, Outcome]:
    """Each way's outcome; `everything` adds the ones that take longest."""
    name, derived = str(cache), f"{cache}-derived"
    ways: dict[str, Callable[[], Any]] = {
        "info": lambda: command("info", name),
        "info --json": lambda: command("info", "--json", name),
        "verify": lambda: command("verify", name),
        "records": lambda: records(cache),
        **{
            f"{packing} {path}{' unverified' * (not verify)}": _loading(cache, packing, path == "direct", verify)
            for packing in ("none", "first_fit") for path in ("direct", "record") for verify in (True, False)
        },
        "half": lambda: loaded(cache, packing="none", num_threads=0, logprob_dtype="float16"),
    }  # fmt: skip
    if everything:
        ways |= {
            "roles": lambda: loaded(cache, packing="none", num_threads=0, with_roles=True),
            "local": lambda: loaded(cache, packing="none", num_threads=0, order="local"),
            "features": lambda: loaded(cache, packing="none", num_threads=0, features=_features(cache)),
            "doctor": lambda: command("doctor", name),
            "derive": lambda: command("derive", name, "--out", derived, "--accept", "incomplete"),
            "fold": lambda: command("fold", name),
        }
    try:
        return {way: attempt(read) for way, read in ways.items()}
    finally:
        shutil.rmtree(derived, ignore_errors=True)


def _features(cache: Path) -> tuple[str, ...]:
    with open_reader(cache) as reader:
        return tuple(feature.name for feature in reader.manifest.identity.features)


def findings(outcomes: dict[str, Outcome]) -> list[str]:
    """What must not be: an exception of another kind than ours, and two paths that differ."""
    found = [f"{way}: {outcome.value}" for way, outcome in outcomes.items() if outcome.kind == "raw"]
    for way, outcome in outcomes.items():
        other = outcomes.get(way.replace("direct", "record"))
        if "direct" in way and other is not None and _comparable(outcome) != _comparable(other):
            found.append(f"{way}: {outcome}, by records: {other}")
    return found


def _comparable(outcome: Outcome) -> tuple[str, Any]:
    return outcome.kind, outcome.value if outcome.kind == "read" else None


def _loading(cache: Path, packing: str, direct: bool, verify: bool) -> Callable[[], str]:
    return lambda: loaded(cache, direct=direct, verify=verify, packing=packing, num_threads=0)


def _bytes(values: Any) -> bytes:
    return b"-" if values is None else str((values.dtype, values.shape)).encode() + np.ascontiguousarray(values).tobytes()


def _check_batch(batch: Batch, vocab_size: int) -> None:
    """Raise AssertionError where an index would lead out of a student's arrays."""
    flat_positions_P = batch.flat_positions_P
    ids_PK = batch.teacher.token_ids_PK
    assert ids_PK.size == 0 or -1 <= ids_PK.min() <= ids_PK.max() < vocab_size, "entries' ids"
    assert batch.input_ids_BT.size == 0 or 0 <= batch.input_ids_BT.min() <= batch.input_ids_BT.max() < vocab_size, "text's ids"
    assert ((batch.target_ids_BT == -100) | ((batch.target_ids_BT >= 0) & (batch.target_ids_BT < vocab_size))).all(), "labels"
    assert flat_positions_P.size == 0 or 0 <= flat_positions_P.min() <= flat_positions_P.max() < batch.input_ids_BT.size, "rows"
