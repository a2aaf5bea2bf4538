"""Clusters that have too little, and actors that hang: a real local Ray that is told what it has."""

import os
import re
import signal
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from capture_cases import content, make_config, start_command, write_config

from kdcache.capture.executors.run import run_capture
from kdcache.store.verify import verify_cache

pytestmark = [pytest.mark.slow, pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed")]

ON_RAY = ("--executor", "ray", "--set", "run.ray_address=local")
ASKED = "not been placed by the Ray cluster for 0.1 seconds: each asks for 1 CPU and 1 GPU on one machine, and the cluster has "


def test_with_room_for_one_a_replica_that_hangs_in_loading_is_ended_and_the_one_that_waited_does_the_work(s3, tmp_path):
    teacher = {"model": str(tmp_path / "hangs-once")}
    run_capture(make_config(tmp_path, teacher=teacher))
    uri = f"s3://{s3.bucket}/elastic"
    run = {"progress_path": str(tmp_path / "progress.json"), "load_stall_seconds": 6}
    path = write_config(make_config(tmp_path, teacher=teacher, out=uri, run=run), tmp_path / "c.yaml")
    (tmp_path / "hangs-once").touch()
    (tmp_path / "sitecustomize.py").write_text("import faulty_teacher\nfaulty_teacher.install()\n")  # in the actors too
    process = start_command(
        path, *ON_RAY, "--replicas", 2, "--gpus-per-replica", 1,
        RAY_OVERRIDE_RESOURCES='{"CPU": 1, "GPU": 1}', PLACE_WARN_SECONDS="0.1",
        PYTHONPATH=f"{tmp_path}:{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}",
    )  # fmt: skip
    try:
        _, err = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert err.count(f"{ASKED}1 CPU and 1 GPU, of which ") == 1
    assert re.search(r"no progress for 6 seconds \(run\.load_stall_seconds\) while loading the teacher '.*hangs-once'", err)
    assert content(uri) == content(tmp_path / "cache")
    report = verify_cache(uri)
    assert report.problems == []
    assert report.manifest.is_complete


def test_a_cluster_without_room_for_any_replica_is_said_and_a_signal_ends_the_wait(tmp_path):
    path = write_config(make_config(tmp_path), tmp_path / "c.yaml")
    flags = (*ON_RAY, "--gpus-per-replica", 1)
    process = start_command(path, *flags, RAY_OVERRIDE_RESOURCES='{"CPU": 2}', PLACE_WARN_SECONDS="0.1")
    said = ""
    while "not been placed" not in said and process.poll() is None:
        said = process.stderr.readline()
    assert f"1 replica has {ASKED}2 CPUs and 0 GPUs, of which " in said
    time.sleep(1.5)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "not been placed" not in err, "it is said once"
