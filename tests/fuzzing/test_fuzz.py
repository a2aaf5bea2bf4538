"""A few seeds of each fuzzer, whatever was found before, and the command that runs them for longer."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import random
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from fuzzing import arrow_bytes
from fuzzing.guarded import Pages
from fuzzing.manifests import parts_of
from fuzzing.reading import Outcome, findings
from fuzzing.texts import READERS, read_one

ROOT = Path(__file__).parents[2]
CORPUS = sorted(path for path in (Path(__file__).parent / "corpus").rglob("*") if path.is_file())
NUM_TRIALS = {"manifests": 16, "arrow": 16, "generated": 16, "codecs": 150, "foreign_files": 30, "texts": 100}


@pytest.mark.parametrize("target", NUM_TRIALS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_hostile_inputs_are_read_or_refused_in_our_words(target, tmp_path):
    trial = import_module(f"fuzzing.{target}").trial
    found = {seed: trial(seed, tmp_path) for seed in range(NUM_TRIALS[target])}
    assert {seed: words for seed, words in found.items() if words} == {}


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_what_was_found_before_stays_mended(path, tmp_path):
    assert read_one(path.parent.name, path.read_bytes(), tmp_path) == []


def test_the_corpus_is_of_readers_that_there_are():
    assert {path.parent.name for path in CORPUS} <= set(READERS)
    assert len(CORPUS) > 10


def test_arrow_files_are_changed_where_it_matters():
    """A fuzzer whose changes miss finds nothing for another reason."""
    shard = parts_of("packed top_k").shards[0]
    batch = arrow_bytes.record_batch(bytearray(shard), arrow_bytes.blocks(bytearray(shard))[0])
    assert batch.length is not None
    assert len(batch.nodes) > 8
    assert len(batch.buffers) > 16
    changed = [arrow_bytes.mutated(shard, random.Random(seed)) for seed in range(50)]
    assert all(len(data) == len(shard) for data in changed)
    assert sum(data != shard for data in changed) > 40  # some changes put back what is there


@pytest.mark.parametrize(("outcomes", "words"), [
    ({"a": Outcome("raw", "KeyError: 'x'")}, "KeyError"),
    ({"none direct": Outcome("read", "1"), "none record": Outcome("read", "2")}, "by records"),
    ({"none direct": Outcome("read", "1"), "none record": Outcome("refused", "x")}, "by records"),
])  # fmt: skip
def test_what_must_not_be_is_a_finding(outcomes, words):
    (found,) = findings(outcomes)
    assert words in found


def test_what_is_refused_by_both_ways_is_none():
    assert findings({"none direct": Outcome("refused", "a"), "none record": Outcome("refused", "b")}) == []


@pytest.mark.parametrize("at_front", [False, True])
def test_a_byte_beyond_a_guarded_array_ends_the_process(at_front):
    pages = Pages(at_front=at_front)
    values = pages.copy(np.arange(5, dtype=np.int32))
    np.testing.assert_array_equal(values, np.arange(5))
    address = values.__array_interface__["data"][0] + (-1 if at_front else values.nbytes)
    child = os.fork()
    if not child:
        faulthandler.disable()
        ctypes.string_at(address, 1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    pages.free()
    assert os.WIFSIGNALED(status)


def test_the_command_tells_of_signals_hangs_memory_and_exceptions_and_keeps_what_was_read(tmp_path):
    limits = ["--timeout", "6", "--memory", "1", "--resident", "0.2", "--trials", "8", "--seed", "0", "--minutes", "1"]
    command = [sys.executable, "tools/fuzz.py", "fuzzing.misbehaving:trial", *limits, "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    for seed, words in ((1, "signal: SIGSEGV"), (2, "hang"), (3, "memory: "), (4, "MemoryError"), (5, "KeyError: 'x'")):
        assert f"seed {seed}: " in done.stdout
        assert words in (tmp_path / f"fuzzing.misbehaving:trial-{seed}/finding.txt").read_text()
        assert (tmp_path / f"fuzzing.misbehaving:trial-{seed}/input").read_text() == str(seed)
    assert "seed 6" not in done.stdout  # of the same kind as seed 5's
    assert "2 x fuzzing.misbehaving:trial: store/reader.py:1" in done.stdout
    assert "python tools/fuzz.py fuzzing.misbehaving:trial --seed 1 --trials 1" in done.stdout
