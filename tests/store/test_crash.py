"""kill -9 at every fault point: see crash_probe.py for what is run and what is looked at."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kdcache.store.files import fs

FAULT_POINTS = {
    "directories made",
    "sidecar published",
    "temp file written",
    "temp file synced",
    "renamed",
    "renamed and synced",
    "linked",
    "linked and synced",
    "shard published",
    "journal published",
    "index published",
    "manifest published",
    "swept one",
}


def run_probe(folder: Path, occurrences: str, store: str | None = None) -> dict:
    probe = Path(__file__).with_name("crash_probe.py")
    task = json.dumps({"folder": str(folder), "store": store, "occurrences": occurrences})
    done = subprocess.run([sys.executable, probe], input=task, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_the_points_that_are_killed_at_are_all_there_are():
    assert set(fs.FAULT_POINTS) == FAULT_POINTS
    others = {*fs.REMOTE_FAULT_POINTS, *fs.BLOCK_FAULT_POINTS}  # see below and test_block_cache.py
    sources = "".join(path.read_text() for path in Path(fs.__file__).parents[1].rglob("*.py"))
    named = {part.split('"')[1] for part in sources.split("reached(")[1:] if part.startswith('"')}
    assert named == FAULT_POINTS | others


def test_a_kill_at_any_fault_point_leaves_a_sound_cache_and_the_rerun_ends_as_if_undisturbed(tmp_path):
    outcome = run_probe(tmp_path, "some")
    assert set(outcome["occurrences"]) == FAULT_POINTS, "a point that no run reaches is not tested"
    assert outcome["failures"] == []


@pytest.mark.slow
def test_a_kill_at_every_occurrence_of_every_fault_point_does_no_harm(tmp_path):
    assert run_probe(tmp_path, "every")["failures"] == []


@pytest.mark.slow
def test_a_kill_at_any_fault_point_of_a_capture_into_an_object_store_does_no_harm(s3, tmp_path):
    outcome = run_probe(tmp_path, "one", f"s3://{s3.bucket}")
    assert set(outcome["occurrences"]) == set(fs.REMOTE_FAULT_POINTS), "a point that no run reaches is not tested"
    assert outcome["failures"] == []
