"""Golden caches, made once by tools/make_golden.py, decode to the same values for ever: by the reader, by the decoder in the
spec, and by others' readers of Arrow files as far as they can see.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cache_making import assert_same_record

import kdcache.format.manifest as manifest_module
from kdcache.codec import CODECS
from kdcache.format.manifest import FORMAT_VERSION
from kdcache.format.record import Distributions, SequenceRecord, TokenSequence
from kdcache.store.reader import open_reader
from kdcache.store.verify import verify_cache

ROOT = Path(__file__).parents[2]
GOLDEN = sorted((ROOT / "tests/golden").glob("v*/*/expected.jsonl"))
SPEC = Path(manifest_module.__file__).with_name("README.md")

pytestmark = pytest.mark.parametrize("folder", [p.parent for p in GOLDEN], ids=lambda p: f"{p.parent.name}-{p.name}")


DTYPES = {
    "input_ids_N": np.int32,
    "supervised_N": bool,
    "roles_N": np.uint8,
    "turn_starts": np.int32,
    "token_ids_E": np.int32,
    "logprobs_E": np.float32,
    "offsets_P1": np.int64,
    "tail_mass_P": np.float32,
    "outside_target_logprobs": np.float32,
    "num_exact_P": np.int64,
    "log_z_PL": np.float32,
    "entropy_P": np.float32,
}
WRITTEN_AS = {"outside_target_logprobs": "outside_target_logprobs_M", "log_z_PL": "log_z_PT"}
"""Field -> its name in the golden files, where that is another; they are never made again."""


def kind_of(folder: Path) -> str:
    """The random selection of a golden cache, or "" for the plain one."""
    return folder.name.partition("-")[2]


def expected_records(folder: Path) -> list[SequenceRecord]:
    return [_record(json.loads(line)) for line in (folder / "expected.jsonl").read_text().splitlines()]


def _record(values: dict[str, Any]) -> SequenceRecord:
    written = {name: values.get(WRITTEN_AS.get(name, name)) for name in DTYPES}
    arrays = {name: np.array(values, DTYPES[name]) for name, values in written.items() if values is not None}
    distributions = {name: arrays.pop(name) for name in list(arrays) if name in Distributions.__dataclass_fields__}
    sequence = TokenSequence(**arrays, source=values["source"], key=bytes.fromhex(values["key"]))
    return SequenceRecord(sequence, Distributions(**distributions))


def assert_nearly(found: SequenceRecord, expected: SequenceRecord) -> None:
    # All exactly, but the tail mass of a codec that stores its logarithm: exp of float32 may differ on another processor.
    np.testing.assert_allclose(found.distributions.tail_mass_P, expected.distributions.tail_mass_P, rtol=1e-6)
    for name in ("num_exact_P", "log_z_PL", "entropy_P"):
        np.testing.assert_array_equal(getattr(found.distributions, name), getattr(expected.distributions, name))
    same = {"tail_mass_P": expected.distributions.tail_mass_P}
    if expected.distributions.num_exact_P is not None:  # log of a share of draws: the same
        np.testing.assert_allclose(found.distributions.logprobs_E, expected.distributions.logprobs_E, rtol=1e-6)
        same["logprobs_E"] = expected.distributions.logprobs_E
    assert_same_record(SequenceRecord(found.sequence, replace(found.distributions, **same)), expected)


def shards(folder: Path) -> list[Path]:
    return sorted((folder / "cache/data").iterdir())


def test_the_golden_caches_are_sound_and_decode_to_what_they_always_did(folder):
    report = verify_cache(folder / "cache")
    # Those of v1 hold corners of float32 and float16, which no teacher says together.
    assert [problem for problem in report.problems if "tail_mass sum to" not in problem] == []
    assert report.manifest.is_complete
    expected = expected_records(folder)
    with open_reader(folder / "cache") as reader:
        assert len(reader) == len(expected) == (3 if kind_of(folder) else 9)
        for found, record in zip(reader, expected, strict=True):
            assert_nearly(found, record)


def test_the_golden_caches_hold_the_corners(folder):
    if kind_of(folder):
        pytest.skip("as a teacher gave it")
    records = expected_records(folder)
    assert any(record.sequence.roles_N.any() for record in records)
    assert any(len(set(record.distributions.num_entries_P.tolist())) > 1 for record in records)
    assert any(record.distributions.num_positions == 0 for record in records)
    assert any(np.isneginf(record.distributions.logprobs_E).any() for record in records)
    assert any({0.0, 1.0} <= set(record.distributions.tail_mass_P.tolist()) for record in records)
    assert any(record.sequence.supervised_N[-1] for record in records)


def test_the_decoder_in_the_spec_gives_the_readers_answer(folder):
    blocks = [part.split("```")[0] for part in SPEC.read_text().split("```python\n")[1:]]
    (block,) = [block for block in blocks if "def decode_shard" in block]
    imported = {node.names[0].name for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Import)}
    assert imported <= {"json", "numpy", "pyarrow"}
    assert not [node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.ImportFrom)]
    namespace: dict = {}
    exec(block, namespace)
    if kind_of(folder) or folder.name == "archive":  # tests/codec compare archive_reference.py
        with pytest.raises(ValueError, match="takes more than these lines"):
            next(namespace["decode_shard"](str(shards(folder)[0])))
        return
    decoded = [row for path in shards(folder) for row in namespace["decode_shard"](str(path))]
    with open_reader(folder / "cache") as reader:
        for (source, input_ids, positions, entries, tail_mass), record in zip(decoded, reader, strict=True):
            d = record.distributions
            assert source == record.sequence.source
            assert input_ids == record.sequence.input_ids_N.tolist()
            np.testing.assert_array_equal(positions, record.sequence.positions_P)
            assert len(entries) == d.num_positions
            for p, (token_ids, logprobs) in enumerate(entries):
                of_p = slice(d.offsets_P1[p], d.offsets_P1[p + 1])
                np.testing.assert_array_equal(token_ids, d.token_ids_E[of_p])
                np.testing.assert_array_equal(logprobs, d.logprobs_E[of_p])
            np.testing.assert_allclose(tail_mass, d.tail_mass_P, rtol=1e-6)


def expected_texts(folder: Path) -> list[list[int]]:
    return [record.sequence.input_ids_N.tolist() for record in expected_records(folder)]


def test_pyarrow_opens_a_shard(folder):
    if kind_of(folder):
        pytest.skip("opens like the plain one")
    import pyarrow as pa

    rows = [row for path in shards(folder) for row in pa.ipc.open_file(path).read_all().to_pylist()]
    assert [row["input_ids"] for row in rows] == expected_texts(folder)


def test_polars_opens_a_shard(folder):
    if kind_of(folder):
        pytest.skip("opens like the plain one")
    polars = pytest.importorskip("polars")
    frames = [polars.read_ipc(path) for path in shards(folder)]
    assert [ids for frame in frames for ids in frame["input_ids"].to_list()] == expected_texts(folder)


def test_datasets_opens_the_shards(folder, tmp_path):
    if kind_of(folder):
        pytest.skip("opens like the plain one")
    datasets = pytest.importorskip("datasets")
    files = [str(path) for path in shards(folder)]
    dataset = datasets.load_dataset("arrow", data_files=files, split="train", cache_dir=str(tmp_path))
    assert dataset["input_ids"][:] == expected_texts(folder)
    assert dataset["source"][0] == expected_records(folder)[0].sequence.source


def test_no_golden_file_is_large(folder):
    assert max(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 20_000


def test_a_golden_cache_is_never_made_again(folder):
    if folder.parent.name != f"v{FORMAT_VERSION[0]}":
        pytest.skip("of an older version")
    assert {p.parent.name for p in GOLDEN if p.parent.parent == folder.parent} == set(CODECS) | {
        f"{codec}-{kind}" for codec in ("packed", "quantized", "archive") for kind in ("sampled", "threshold", "top_k_sampled")
    }
    before = (folder / "expected.jsonl").read_bytes()
    command = [sys.executable, str(ROOT / "tools/make_golden.py"), *filter(None, folder.name.partition("-")[::2])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "never made again" in done.stderr
    assert (folder / "expected.jsonl").read_bytes() == before
