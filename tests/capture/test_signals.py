"""Signals end a capture after the unit in work, or at once; a stall ends it, if need be with its process. Real processes."""

import os
import signal
import time

import pytest
from capture_cases import LINES, content, make_config, start_command, wait_for_units, write_config

from kdcache.capture.executors.run import run_capture
from kdcache.capture.watch.signals import StopRequest, stopping_on_signals

SLOW = [f"{line} slow" for line in LINES]
"""Four fifths of a second for each of the five units."""


@pytest.fixture
def undisturbed(tmp_path):
    run_capture(make_config(tmp_path, SLOW, out=str(tmp_path / "undisturbed")))
    return content(tmp_path / "undisturbed")


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_unit_in_work_be_finished_and_says_what_is_left(tmp_path, undisturbed, sent):
    path = write_config(make_config(tmp_path, SLOW), tmp_path / "c.yaml")
    process = start_command(path)
    wait_for_units(tmp_path / "cache", 1, process)
    time.sleep(0.3)  # into the second unit
    process.send_signal(sent)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert "stopped with 3 units left; run the same command again to resume" in out
    assert f"{sent.name}: stopping after the current unit; send it again to stop at once" in err
    assert sorted(content(tmp_path / "cache")) == [*range(1, 9)]
    assert os.listdir(tmp_path / "cache/tmp") == []
    assert run_capture(make_config(tmp_path, SLOW)).num_units_captured == 3
    assert content(tmp_path / "cache") == undisturbed


def test_a_stopped_command_can_be_told_to_end_as_if_it_had_failed(tmp_path):
    process = start_command(write_config(make_config(tmp_path, SLOW), tmp_path / "c.yaml"), "--stop-status", 75)
    wait_for_units(tmp_path / "cache", 1, process)
    process.send_signal(signal.SIGTERM)
    assert "run the same command again" in process.communicate(timeout=30)[0]
    assert process.returncode == 75


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_stops_at_once_and_loses_nothing_published(tmp_path, undisturbed, sent, status):
    path = write_config(make_config(tmp_path, SLOW, shards={"unit_items": 10}), tmp_path / "c.yaml")
    process = start_command(path)
    wait_for_units(tmp_path / "cache", 1, process)
    time.sleep(0.3)  # into the second unit
    process.send_signal(sent)
    time.sleep(0.3)
    process.send_signal(sent)
    out, err = process.communicate(timeout=30)
    assert process.returncode == status, err
    assert out == ""
    assert "1 of 2 units are published" in err
    assert "Traceback" not in err
    assert sorted(content(tmp_path / "cache")) == [*range(1, 11)]
    run_capture(make_config(tmp_path, SLOW, shards={"unit_items": 10}))
    assert content(tmp_path / "cache") == undisturbed


def test_a_failure_while_stopping_is_left_for_the_next_run(tmp_path, caplog):
    class StopAtTheThirdUnit(StopRequest):
        is_requested = property(lambda self: len(os.listdir(tmp_path / "cache/journal")) >= 2, lambda self, value: None)

    lines = [*LINES[:8], "longer than the window " * 9, *LINES[9:]]
    config = make_config(tmp_path, lines, input={"window": {"size": 64, "policy": "error"}})
    stop = StopAtTheThirdUnit()
    summary = run_capture(config, stop=stop)
    assert summary.is_stopped
    assert (summary.num_units_captured, summary.num_units_left, summary.set_aside) == (2, 3, [])


def test_a_signal_before_the_first_unit_stops_at_once():
    stop = StopRequest()
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt) as caught, stopping_on_signals(stop):
        signal.raise_signal(signal.SIGTERM)
    assert caught.value.signum == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("fault", ["hang", "deaf"])
def test_a_stalled_command_ends_with_status_2_even_if_nothing_can_wake_it(tmp_path, fault):
    lines = [*LINES[:4], fault]
    path = write_config(make_config(tmp_path, lines, run={"stall_seconds": 3}), tmp_path / "c.yaml")
    process = start_command(path, GRACE_SECONDS="0.5")
    out, err = process.communicate(timeout=30)
    assert process.returncode == 2
    assert out == ""
    assert "in _faulty" in err, "the stacks are shown"
    (sentence,) = [line for line in err.splitlines() if line.startswith("kdcache: error: ")]
    assert "no progress for 3 seconds (run.stall_seconds) while capturing unit 1" in sentence
    assert ("the process does not respond and is ended" in sentence) == (fault == "deaf")
    assert len(os.listdir(tmp_path / "cache/journal")) == 1
