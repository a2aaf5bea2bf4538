"""Several workers over one plan: static ranks as real processes, and a real local Ray. The content is one process's."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from capture_cases import LINES, content, make_config, start_command, wait_for_units, write_config

from kdcache.capture.executors.run import run_capture
from kdcache.capture.executors.tally import units_before_fold
from kdcache.cli.main import main
from kdcache.errors import ConfigError
from kdcache.store import chain
from kdcache.store.verify import verify_cache

CONFIGS = Path(__file__).parents[2] / "configs"
SLOW = [f"{line} slow" for line in LINES]


def shards(cache):
    return sorted(os.listdir(cache / "data"))


def undisturbed(tmp_path, lines):
    run_capture(make_config(tmp_path, lines, out=str(tmp_path / "undisturbed")))
    return tmp_path / "undisturbed"


def wait_for(process):
    try:
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, err
    return out


def test_ranks_share_the_units_and_the_last_one_folds(tmp_path):
    alone = undisturbed(tmp_path, LINES)
    captured = {}
    for rank in (2, 0, 1):
        summary = run_capture(make_config(tmp_path, run={"rank": rank, "world_size": 3}))
        captured[rank] = summary.num_units_captured
        assert (tmp_path / f"cache.rank-{rank}.progress.json").exists()
        newest = chain.newest_manifest(tmp_path / "cache")
        assert [shard.unit for shard in newest.shards] == {2: [], 0: [0, 2, 3], 1: [0, 1, 2, 3, 4]}[rank]
    assert captured == {0: 2, 1: 2, 2: 1}
    assert shards(tmp_path / "cache") == shards(alone)
    assert content(tmp_path / "cache") == content(alone)
    assert verify_cache(tmp_path / "cache").problems == []


def test_a_rank_whose_units_are_done_does_not_load_its_teacher(tmp_path, monkeypatch, capsys):
    path = write_config(make_config(tmp_path), tmp_path / "c.yaml")
    assert main(["capture", str(path), "--rank", "1", "--world-size", "2"]) == 0
    assert "this rank is done; 5 units of the others are not visible yet" in capsys.readouterr().out
    monkeypatch.setattr("kdcache.capture.teacher_slot.load_teacher", None)
    assert main(["capture", str(path), "--rank", "1", "--world-size", "2"]) == 0
    assert "nothing to do; rank 1's share of 5 units is published" in capsys.readouterr().out


def test_what_a_rank_published_is_folded_by_hand(tmp_path, capsys):
    path = write_config(make_config(tmp_path), tmp_path / "c.yaml")
    assert main(["capture", str(path), "--rank", "1", "--world-size", "2"]) == 0
    capsys.readouterr()
    assert main(["fold", str(tmp_path / "cache")]) == 0
    assert "2 units added, 2 of 5 units in snapshot 1 (not complete)" in capsys.readouterr().out
    assert sorted(content(tmp_path / "cache")) == [*range(5, 9), *range(13, 17)]
    assert main(["fold", str(tmp_path / "nowhere")]) == 2


def test_another_number_of_ranks_goes_on_with_what_is_left(tmp_path):
    run_capture(make_config(tmp_path, run={"rank": 1, "world_size": 2}))
    for rank in range(3):
        run_capture(make_config(tmp_path, run={"rank": rank, "world_size": 3}))
    assert verify_cache(tmp_path / "cache").manifest.is_complete
    assert shards(tmp_path / "cache") == shards(undisturbed(tmp_path, LINES))


def test_folds_on_the_way_cost_five_last_folds_in_all(tmp_path):
    folded, sizes = 0, []
    while folded < 10**6:
        folded += units_before_fold(folded)
        sizes.append(folded)
    assert sum(sizes) < 5.1 * sizes[-1]
    assert len(sizes) < 60


@pytest.mark.parametrize(
    ("run", "sentence"),
    [
        ({"rank": 2, "world_size": 2}, "rank is 2, but must be below world_size, 2"),
        ({"executor": "ray", "world_size": 2}, "spreads the units itself"),
        ({"replicas": 2}, "for executor 'ray' only"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(tmp_path, run, sentence):
    with pytest.raises(ConfigError, match=sentence):
        make_config(tmp_path, run=run)


def test_two_ranks_at_once_one_of_them_stopped_and_started_again_make_one_process_cache(tmp_path):
    alone = undisturbed(tmp_path, SLOW)
    path = write_config(make_config(tmp_path, SLOW), tmp_path / "c.yaml")
    ranks = [start_command(path, "--rank", rank, "--world-size", 2) for rank in range(2)]
    wait_for_units(tmp_path / "cache", 2, ranks[0])
    ranks[1].send_signal(signal.SIGTERM)
    stopped = wait_for(ranks[1])
    assert re.search(r"stopped with \d units? left", stopped) or "this rank is done" in stopped
    again = start_command(path, "--rank", 1, "--world-size", 2)
    wait_for(again)
    wait_for(ranks[0])
    assert verify_cache(tmp_path / "cache").problems == []
    assert chain.newest_manifest(tmp_path / "cache").is_complete
    assert shards(tmp_path / "cache") == shards(alone)
    assert content(tmp_path / "cache") == content(alone)


def test_the_slurm_example_runs_a_rank_for_each_task(tmp_path):
    path = write_config(make_config(tmp_path), tmp_path / "c.yaml")
    (tmp_path / "srun").write_text('#!/bin/sh\nexec "$@"\n')
    (tmp_path / "kdcache").write_text(f'#!/bin/sh\nexec {sys.executable} -m kdcache "$@"\n')
    for name in ("srun", "kdcache"):
        (tmp_path / name).chmod(0o755)
    for task in ("0", "1"):
        array = {"SLURM_ARRAY_TASK_ID": task, "SLURM_ARRAY_TASK_COUNT": "2", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
        command = ["bash", str(CONFIGS / "slurm-capture.sh"), str(path), "--max-failed", "1"]
        subprocess.run(command, env=os.environ | array, check=True, capture_output=True)
    assert chain.newest_manifest(tmp_path / "cache").is_complete


def test_the_kubernetes_example_runs_a_rank_for_each_index(tmp_path):
    path = write_config(make_config(tmp_path), tmp_path / "c.yaml")
    job = yaml.safe_load((CONFIGS / "kubernetes-capture.yaml").read_text())["spec"]
    (container,) = job["template"]["spec"]["containers"]
    kdcache, *command = container["command"] + container["args"]
    assert kdcache == "kdcache"
    assert command[command.index("--world-size") + 1] == str(job["completions"])
    assert int(command[command.index("--stop-status") + 1]) in job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"]
    for index in range(job["completions"]):
        swap = {"/config/capture.yaml": str(path), "$(JOB_COMPLETION_INDEX)": str(index)}
        assert main([swap.get(part, part) for part in command]) == 0
    assert chain.newest_manifest(tmp_path / "cache").is_complete


MANY = [f"{n} " + "many words " * 150 for n in range(120)]


@pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed")
class TestRay:
    """A local Ray of two replicas."""

    def start(self, tmp_path):
        path = write_config(self.config(tmp_path, "cache"), tmp_path / "c.yaml")
        return start_command(path, "--executor", "ray", "--replicas", 2, "--set", "run.ray_address=local", teacher=None)

    def config(self, tmp_path, name):
        # Units of about a third of a second.
        return make_config(tmp_path, MANY, out=str(tmp_path / name), shards={"unit_items": 10})

    def state(self, tmp_path):
        with suppress(FileNotFoundError):
            return json.loads((tmp_path / "cache.progress.json").read_text())
        return {"workers": {}}

    def wait_for_workers(self, tmp_path, process):
        """Both are at work on a unit."""
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline and process.poll() is None:
            workers = self.state(tmp_path)["workers"]
            if len(workers) == 2:
                return workers
            time.sleep(0.02)
        raise AssertionError(process.communicate(timeout=10))

    @pytest.mark.slow
    def test_a_worker_killed_in_the_middle_of_a_unit_is_replaced_and_the_content_is_one_process(self, tmp_path):
        process = self.start(tmp_path)
        workers = self.wait_for_workers(tmp_path, process)
        victim = next(iter(workers.values()))
        os.kill(victim["pid"], signal.SIGKILL)
        out = wait_for(process)
        assert "1 worker died; others did their units" in out
        assert self.state(tmp_path)["units"] == {"to_do": 12, "published": 12, "set_aside": 0}
        run_capture(self.config(tmp_path, "undisturbed"))
        assert verify_cache(tmp_path / "cache").problems == []
        assert chain.newest_manifest(tmp_path / "cache").is_complete
        # A shard's name is the hash of its bytes, which verify has compared.
        assert shards(tmp_path / "cache") == shards(tmp_path / "undisturbed")

    @pytest.mark.slow
    def test_a_signal_lets_the_workers_finish_their_units_and_the_next_run_goes_on_without_them(self, tmp_path):
        process = self.start(tmp_path)
        self.wait_for_workers(tmp_path, process)
        process.send_signal(signal.SIGTERM)
        left = int(re.search(r"stopped with (\d+) units? left", wait_for(process))[1])
        assert 0 < left < 12
        assert os.listdir(tmp_path / "cache/tmp") == []
        summary = run_capture(self.config(tmp_path, "cache"))
        assert summary.num_units_captured == left
        assert summary.manifest.is_complete

    def test_no_cluster_at_an_address_is_one_sentence(self, tmp_path, capsys):
        path = write_config(make_config(tmp_path), tmp_path / "c.yaml")
        process = start_command(path, "--executor", "ray", "--set", "run.ray_address='127.0.0.1:1'", teacher=None)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 2
        assert "kdcache: error: run.ray_address: no Ray cluster at '127.0.0.1:1'" in err
