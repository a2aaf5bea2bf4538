"""Any damage to any file of a cache: no wrong value is ever given, no crash, no foreign error; verify names every one.

The damaged caches are read in a process of their own (damage_probe.py), so that a segmentation fault would be a failure.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from cache_making import make_cache

BATCH_SIZES = {"a record batch per sequence": 1, "one record batch": 10**6}


def probe(cache: Path, name: str, flips: list[int], cuts: list[int]) -> list[list[str]]:
    task = json.dumps({"cache": str(cache), "name": name, "flips": flips, "cuts": cuts})
    command = [sys.executable, str(Path(__file__).with_name("damage_probe.py"))]
    done = subprocess.run(command, input=task, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"died of {done.returncode} at {done.stderr[-1000:]}"
    outcomes = json.loads(done.stdout)
    assert len(outcomes) == len(flips) + len(cuts)
    return outcomes


def probe_in_halves(cache: Path, name: str, flips: list[int]) -> list[list[str]]:
    """As `probe`, in two processes, each with a copy of the cache."""
    caches = [shutil.copytree(cache, cache.with_name(f"{cache.name}-{half}")) for half in range(2)]
    with ThreadPoolExecutor(2) as pool:
        done = pool.map(lambda half: probe(caches[half], name, flips[half::2], []), range(2))
        return [outcome for outcomes in done for outcome in outcomes]


def newest_file(cache: Path, directory: str) -> Path:
    return max((cache / directory).iterdir())


def flips_of(path: Path, count: int) -> list[int]:
    """Bits to flip: some anywhere, and some in Arrow's framing at both ends."""
    num_bytes = path.stat().st_size
    rng = np.random.default_rng(0)
    ends = [*range(16), *range(num_bytes - 16, num_bytes)]
    return [*rng.integers(0, 8 * num_bytes, count).tolist(), *(8 * byte + byte % 8 for byte in ends)]


def cuts_of(path: Path, count: int) -> list[int]:
    num_bytes = path.stat().st_size
    # Not the last byte alone: that is the line break behind the JSON of a manifest, which means nothing.
    return sorted({0, 1, 7, 8, num_bytes - 2, num_bytes - 8, *np.linspace(2, num_bytes - 2, count, dtype=int).tolist()})


def assert_no_harm(outcomes: list[list[str]]) -> None:
    assert {reading for reading, _ in outcomes} <= {"refused", "equal"}
    assert {verify for _, verify in outcomes} == {"refused"}, "verify must name every damage"


@pytest.mark.parametrize("codec_id", ["raw", "packed"])
@pytest.mark.parametrize("layout", BATCH_SIZES)
def test_a_damaged_shard_never_gives_wrong_values(tmp_path, codec_id, layout):
    cache = make_cache(tmp_path / "c", codec_id, num_units=1, record_batch_bytes=BATCH_SIZES[layout])
    shard = newest_file(cache, "data")
    outcomes = probe(cache, f"data/{shard.name}", flips_of(shard, 200), cuts_of(shard, 25))
    assert_no_harm(outcomes)
    assert ["equal", "refused"] in outcomes, "some bits (padding) carry no value: else the probe does not compare"
    assert ["refused", "refused"] in outcomes


@pytest.mark.parametrize("directory", ["index", "manifests"])
def test_a_damaged_index_or_manifest_is_never_used(tmp_path, directory):
    cache = make_cache(tmp_path / "c", num_units=2)
    path = newest_file(cache, directory)
    outcomes = probe(cache, f"{directory}/{path.name}", flips_of(path, 100), cuts_of(path, 10))
    assert {tuple(outcome) for outcome in outcomes} == {("refused", "refused")}


@pytest.mark.parametrize("directory", ["journal", "manifests"])
def test_damage_to_what_a_reader_does_not_need_harms_no_reader_and_is_named_by_verify(tmp_path, directory):
    cache = make_cache(tmp_path / "c", num_units=2)
    path = min((cache / directory).iterdir())
    outcomes = probe(cache, f"{directory}/{path.name}", flips_of(path, 60), cuts_of(path, 6))
    assert {tuple(outcome) for outcome in outcomes} == {("equal", "refused")}


@pytest.mark.slow
@pytest.mark.parametrize(("codec_id", "step"), [("raw", 4), ("packed", 1)])
def test_no_byte_of_a_shard_can_be_damaged_to_harm(tmp_path, codec_id, step):
    """A record batch per sequence, two of them: a third is read as the second."""
    cache = make_cache(tmp_path / "c", codec_id, num_units=1, num_sequences=2)
    shard = newest_file(cache, "data")
    bits = [8 * byte + byte * 7 % 8 for byte in range(0, shard.stat().st_size, step)]
    assert_no_harm(probe_in_halves(cache, f"data/{shard.name}", bits))


CUT_WHILE_MAPPED = """
import os, sys
import numpy as np
import kdcache
from kdcache.errors import CorruptCacheError
cache, shard = kdcache.open(sys.argv[1]), sys.argv[2]
cache[0], cache.reader.mapped(np.arange(2))
if sys.argv[3] == "deleted":
    os.unlink(shard)
    print(cache[1].sequence.num_tokens > 0, cache.reader.mapped(np.arange(2)) is not None)
else:
    os.truncate(shard, 64)
    print(cache.reader.mapped(np.arange(2)) is None)
    for read in (lambda: cache[0], lambda: cache.reader.encoded(1)):
        try:
            read()
        except CorruptCacheError as error:
            print(error)
"""


@pytest.mark.parametrize("harm", ["cut", "deleted"])
def test_a_shard_that_is_cut_while_it_is_mapped_is_named(tmp_path, harm):
    make_cache(tmp_path / "cache", "packed", record_batch_bytes=10**6)
    shard = min((tmp_path / "cache" / "data").iterdir())
    command = [sys.executable, "-c", CUT_WHILE_MAPPED, str(tmp_path / "cache"), str(shard), harm]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"died of {done.returncode} at {done.stderr[-1000:]}"
    if harm == "deleted":  # its bytes are there as long as somebody has them mapped
        assert done.stdout == "True True\n"
    else:
        said = done.stdout.splitlines()
        assert said[0] == "True"
        assert len(said) == 3
        assert all(f"{shard}: has 64 bytes" in line for line in said[1:])
