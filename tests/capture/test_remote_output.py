"""A capture straight into an S3 server: its content is that of a capture to disk, killed or not."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from capture_cases import content, make_config, start_command, write_config
from fault_proxy import FaultProxy, Request

from kdcache.capture.estimate import estimate_capture
from kdcache.capture.executors.run import run_capture
from kdcache.capture.watch.progress import CaptureProgress
from kdcache.cli.main import main
from kdcache.errors import ConfigError
from kdcache.store.verify import verify_cache


def assert_whole(uri: str, wanted: Path) -> None:
    """The cache in the store is complete, sound, and of the same content."""
    assert content(uri) == content(wanted)
    report = verify_cache(uri)
    assert report.problems == []
    assert report.manifest.is_complete


def test_a_capture_into_a_store_is_the_one_to_disk_and_the_commands_take_its_uri(s3: FaultProxy, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    uri = f"s3://{s3.bucket}/caches/one"
    run_capture(make_config(tmp_path))
    config = make_config(tmp_path, out=uri)
    assert estimate_capture(config, CaptureProgress()).num_units_before == 0
    run_capture(config)
    assert content(uri) == content(tmp_path / "cache")
    assert (tmp_path / "one.progress.json").exists()
    for command in ("verify", "info", "fold"):
        assert main([command, uri]) == 0
    assert f"{uri}: sound (complete)" in capsys.readouterr().out
    s3.requests.clear()
    summary = run_capture(config)
    assert summary.num_units_captured == 0
    assert not [request for request in s3.requests if request.method == "PUT"]


def test_a_store_that_cannot_put_if_absent_is_refused_before_a_model_is_loaded(tmp_path):
    with pytest.raises(ConfigError, match="a cache can be read from such a store but not written into it"):
        run_capture(make_config(tmp_path, out="hf://datasets/someone/cache", teacher={"model": "none"}))


def test_an_unknown_scheme_is_named(tmp_path, capsys):
    assert main(["verify", "ftp://host/cache"]) == 2
    assert "unknown scheme 'ftp'; expected a path or one of file://, s3://, gs://, hf://, memory://" in capsys.readouterr().err


@pytest.mark.slow
def test_a_capture_into_a_store_that_is_killed_again_and_again_ends_as_if_undisturbed(s3: FaultProxy, tmp_path):
    uri = f"s3://{s3.bucket}/killed"
    run = {"progress_path": str(tmp_path / "progress.json")}  # by default in the working directory, which is no test's
    path = write_config(make_config(tmp_path, out=uri, run=run), tmp_path / "config.yaml")
    run_capture(make_config(tmp_path))
    # Which request is the last one: answered never, or done and never answered.
    for part, fault in (("/data/000001", "reset"), ("/journal/000002", "lost"), ("/manifests/000001", "lost")):
        process, killed = start_command(path, teacher=None, PWD=str(tmp_path)), []

        def kill(request: Request, part=part, fault=fault, killed=killed, process=process) -> str | None:
            if request.method != "PUT" or part not in request.path:
                return None
            killed.append(request.path)
            os.kill(process.pid, signal.SIGKILL)
            return fault

        s3.choose = kill
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
        assert len(killed) == 1
        s3.choose = lambda request: None
        assert verify_cache(uri).problems == []
    process = start_command(path, teacher=None)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert_whole(uri, tmp_path / "cache")


@pytest.mark.slow
def test_two_ranks_at_once_into_a_store_make_the_cache_of_one_process(s3: FaultProxy, tmp_path):
    uri = f"s3://{s3.bucket}/ranks"
    run_capture(make_config(tmp_path))
    paths = []
    for rank in range(2):
        run = {"progress_path": str(tmp_path / f"{rank}.json"), "rank": rank, "world_size": 2}
        paths.append(write_config(make_config(tmp_path, out=uri, run=run), tmp_path / f"{rank}.yaml"))
    for process in [start_command(path, teacher=None) for path in paths]:
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
    assert_whole(uri, tmp_path / "cache")
    units = [json.loads((tmp_path / f"{rank}.json").read_text())["units"]["published"] for rank in range(2)]
    assert units == [3, 2], "each did its own"
