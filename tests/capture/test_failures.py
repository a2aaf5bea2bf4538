"""What fails is tried again, then set aside or traced to its sequences; the rest goes on, and nothing is left out unsaid."""

import errno
import json
import re
import signal
import threading
import time

import faulty_teacher
import pytest
from capture_cases import LINES, content, make_config, write_config
from hypothesis import given
from hypothesis import strategies as st

from kdcache import teacher as teachers
from kdcache.capture.executors.run import run_capture
from kdcache.capture.poison import find_poison
from kdcache.capture.watch.progress_file import ProgressFile, progress_path
from kdcache.cli.main import main
from kdcache.errors import CaptureError, InputError, StorageError, TeacherError
from kdcache.store.files import fs
from kdcache.store.summary import summarize_cache
from kdcache.store.verify import verify_cache


@pytest.fixture(autouse=True)
def faulty(monkeypatch):
    faulty_teacher.install(setitem=monkeypatch.setitem)
    faulty_teacher.met.clear()


def lines_with(faults):
    return [f"{line} {faults.get(n, '')}".strip() for n, line in enumerate(LINES, 1)]


def undisturbed(tmp_path, monkeypatch, lines):
    with monkeypatch.context() as patch:
        patch.setitem(teachers.BACKENDS, "fake", "kdcache.teacher.fake:FakeBackend")
        config = make_config(tmp_path, lines, out=str(tmp_path / "undisturbed"))
        run_capture(config)
    return content(tmp_path / "undisturbed")


def test_a_unit_that_fails_once_is_tried_again(tmp_path, monkeypatch, caplog):
    lines = lines_with({6: "flaky"})
    summary = run_capture(make_config(tmp_path, lines))
    assert summary.manifest.is_complete
    assert content(tmp_path / "cache") == undisturbed(tmp_path, monkeypatch, lines)
    assert "unit 1 failed, attempt 1" in caplog.text
    assert summary.num_tokens == summary.manifest.total("num_tokens")


def test_the_first_unit_that_keeps_failing_stops_the_capture_with_its_own_error(tmp_path, caplog):
    config = make_config(tmp_path, lines_with({6: "poison"}), run={"retries": 2})
    with pytest.raises(TeacherError, match=r"a\.txt:6: the teacher choked"):
        run_capture(config)
    assert sorted(content(tmp_path / "cache")) == [1, 2, 3, 4]
    assert "attempt 3" in caplog.text
    assert "attempt 4" not in caplog.text
    assert not (tmp_path / "cache/failed").exists()


def test_units_that_keep_failing_are_set_aside_and_done_by_the_next_run_that_can(tmp_path, monkeypatch, capsys):
    lines = lines_with({6: "poison", 20: "wrong"})
    config = make_config(tmp_path, lines, run={"max_failed": 2})
    summary = run_capture(config)
    assert [failed.unit for failed in summary.set_aside] == [1, 4]
    assert sorted(content(tmp_path / "cache")) == [*range(1, 5), *range(9, 17)]
    assert verify_cache(tmp_path / "cache").problems == []
    reasons = {failed.unit: failed.reason for failed in summarize_cache(tmp_path / "cache").set_aside}
    assert "a.txt:6: the teacher choked" in reasons[1]
    assert "gave a wrong answer" in reasons[4]
    assert main(["info", str(tmp_path / "cache")]) == 0
    assert "unit 1: " in capsys.readouterr().out
    again = run_capture(config)
    assert [failed.unit for failed in again.set_aside] == [1, 4]
    assert len(list((tmp_path / "cache/failed").iterdir())) == 2, "the same failure is written down once"
    monkeypatch.setitem(teachers.BACKENDS, "fake", "kdcache.teacher.fake:FakeBackend")
    assert run_capture(config).manifest.is_complete
    assert content(tmp_path / "cache") == undisturbed(tmp_path, monkeypatch, lines)
    assert list((tmp_path / "cache/failed").iterdir()) == []


def test_one_failure_more_than_allowed_stops_the_capture(tmp_path):
    config = make_config(tmp_path, lines_with({6: "poison", 10: "poison", 14: "poison"}), run={"max_failed": 1, "retries": 0})
    with pytest.raises(
        CaptureError, match=r"unit 2 failed, 1 attempts.*one more than run\.max_failed, 1; what is published"
    ) as e:
        run_capture(config)
    assert isinstance(e.value.__cause__, TeacherError)
    assert sorted(content(tmp_path / "cache")) == [1, 2, 3, 4]


def test_an_input_mistake_is_not_tried_again(tmp_path, caplog):
    config = make_config(tmp_path, [*LINES, "x" * 80], input={"window": {"size": 64, "policy": "error"}}, run={"retries": 5})
    with pytest.raises(InputError, match=r"a\.txt:21: 81 tokens"):
        run_capture(config)
    assert "attempt 2" not in caplog.text


def test_poison_is_left_out_by_name_and_the_rest_of_its_unit_published(tmp_path, monkeypatch, capsys, caplog):
    lines = [*lines_with({6: "poison", 7: "wrong", 20: "poison"}), "x" * 80]
    policy = {"window": {"size": 64, "policy": "error"}}
    config = make_config(tmp_path, lines, input=policy, run={"skip_failing": True})
    summary = run_capture(config)
    assert summary.manifest.is_complete
    assert [s.source.rpartition(":")[2] for s in summary.skipped] == ["6", "7", "20", "21"]
    assert [s.reason[-18:] for s in summary.skipped[:3:2]] == ["the teacher choked"] * 2
    expected = undisturbed(tmp_path, monkeypatch, lines[:20])
    assert content(tmp_path / "cache") == {n: record for n, record in expected.items() if n not in (6, 7, 20)}
    assert verify_cache(tmp_path / "cache").problems == []
    assert summary.counts.num_skipped == 4
    assert summary.counts.num_sequences == summary.manifest.total("num_sequences") == 17
    assert caplog.text.count("is left out: ") == 4
    assert summarize_cache(tmp_path / "cache").skipped == tuple(summary.skipped)
    main(["info", str(tmp_path / "cache"), "--skipped"])
    assert "a.txt:21: 81 tokens, but input.window.size is 64" in capsys.readouterr().out


def test_a_teacher_that_fails_at_everything_is_not_taken_for_poison(tmp_path):
    config = make_config(tmp_path, ["poison"] * 12, shards={"unit_items": 12}, run={"skip_failing": True, "retries": 0})
    with pytest.raises(CaptureError, match=r"9 of 12 sequences also fail alone.*the teacher is at fault, not the text"):
        run_capture(config)


def test_an_engine_that_a_failure_has_killed_is_loaded_again(tmp_path, caplog):
    config = make_config(tmp_path, lines_with({6: "broken"}), run={"max_failed": 1})
    summary = run_capture(config)
    assert sorted(content(tmp_path / "cache")) == [*range(1, 5), *range(9, 21)]
    assert [failed.attempts for failed in summary.set_aside] == [2]
    assert "is closed); loading it again" in caplog.text


def test_an_engine_that_does_not_come_back_ends_the_capture(tmp_path, monkeypatch):
    loaded = []

    def load_once(config):
        if loaded:
            raise TeacherError("out of memory")
        loaded.append(faulty_teacher.FaultyTeacher(config))
        return loaded[0]

    monkeypatch.setattr("kdcache.capture.teacher_slot.load_teacher", load_once)
    with pytest.raises(CaptureError, match="could not be loaded again: out of memory"):
        run_capture(make_config(tmp_path, lines_with({6: "broken"}), run={"max_failed": 9}))
    assert sorted(content(tmp_path / "cache")) == [1, 2, 3, 4]


def test_a_full_disk_is_no_fault_of_a_unit(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(fs, "publish_file", full)
    with pytest.raises(StorageError, match=r"unit 0 could not be written.*No space left"):
        run_capture(make_config(tmp_path, run={"max_failed": 9, "skip_failing": True}))


@given(st.data())
def test_halving_finds_just_the_sequences_that_fail_alone(data):
    num_sequences = data.draw(st.integers(2, 100))
    poison = data.draw(st.sets(st.integers(0, num_sequences - 1), max_size=min(8, num_sequences - 1)))
    tried = []

    def attempt(start, stop):
        tried.append((start, stop))
        return next((ValueError(n) for n in range(start, stop) if n in poison), None)

    assert sorted(find_poison(num_sequences, attempt)) == sorted(poison)
    failing = sum(any(start <= n < stop for n in poison) for start, stop in tried)
    assert failing <= max(1, len(poison)) * (num_sequences.bit_length() + 1)


def test_sequences_that_fail_together_and_not_alone_are_no_poison():
    assert find_poison(6, lambda start, stop: ValueError() if stop - start > 3 else None) == {}


@pytest.mark.parametrize("in_main_thread", [True, False])
def test_a_teacher_that_stalls_is_shown_and_stopped(tmp_path, capfd, in_main_thread):
    config = make_config(tmp_path, lines_with({6: "hang"}), run={"stall_seconds": 2.0})
    caught = []

    def capture():
        try:
            run_capture(config)
        except CaptureError as error:
            caught.append(str(error))

    if in_main_thread:
        capture()
    else:
        thread = threading.Thread(target=capture)
        thread.start()
        thread.join(20)
    (sentence,) = caught
    assert sentence.startswith(
        "no progress for 2 seconds (run.stall_seconds) while capturing unit 1; 1 of 5 units are published"
    )
    assert "run the same command again" in sentence
    err = capfd.readouterr().err
    assert "faulty_teacher.py" in err, "the stacks are shown"
    assert sorted(content(tmp_path / "cache")) == [1, 2, 3, 4]
    assert json.loads(progress_path(config).read_text())["state"] == "failed"


def test_a_stalled_teacher_is_stopped_in_a_background_job_that_ignores_sigint_too(tmp_path):
    config = make_config(tmp_path, lines_with({6: "hang"}), run={"stall_seconds": 2.0})
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pytest.raises(CaptureError, match="no progress for 2 seconds"):
            run_capture(config)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_teacher_that_hangs_while_it_is_loaded_is_shown_and_stopped_and_loads_the_next_time(tmp_path, capfd):
    (tmp_path / "hangs-once").touch()
    run = {"stall_seconds": 60, "load_stall_seconds": 1}
    config = make_config(tmp_path, teacher={"model": str(tmp_path / "hangs-once")}, run=run)
    with pytest.raises(CaptureError) as caught:
        run_capture(config)
    assert re.fullmatch(
        r"no progress for 1 seconds \(run\.load_stall_seconds\) while loading the teacher '.*hangs-once'; run the same "
        r"command again, with a higher limit if it needs longer",
        str(caught.value),
    )
    assert "faulty_teacher.py" in capfd.readouterr().err, "the stacks are shown"
    assert run_capture(config).manifest.is_complete


def test_a_limit_for_loading_is_none_for_the_units_and_the_other_way_round(tmp_path, monkeypatch):
    run = {"stall_seconds": None, "load_stall_seconds": 0.5}
    assert run_capture(make_config(tmp_path, lines_with(dict.fromkeys(range(1, 5), "slow")), run=run)).manifest.is_complete

    def load_slowly(config):
        time.sleep(0.8)
        return faulty_teacher.FaultyTeacher(config)

    monkeypatch.setattr("kdcache.capture.teacher_slot.load_teacher", load_slowly)
    other = {"run": {"stall_seconds": 0.6, "load_stall_seconds": None}, "out": str(tmp_path / "other")}
    assert run_capture(make_config(tmp_path, **other)).manifest.is_complete


def test_each_units_time_is_in_the_manifest_and_summed_by_info(tmp_path, capsys):
    config = make_config(tmp_path, lines_with({6: "slow"}))
    accounts = [shard.account for shard in run_capture(config).manifest.shards]
    assert accounts[1].wall_seconds > 0.2
    assert all(account.cpu_seconds >= 0 and account.skipped == () for account in accounts)
    cost = summarize_cache(tmp_path / "cache").cost
    assert cost.wall_seconds == pytest.approx(sum(account.wall_seconds for account in accounts))
    assert cost.gpu_seconds is None, "the fake teacher holds none"
    main(["info", str(tmp_path / "cache")])
    assert " of work, " in capsys.readouterr().out


def test_the_state_of_a_run_is_a_file_beside_the_cache(tmp_path, monkeypatch):
    seen = []
    write = ProgressFile._write

    def read_back(self):
        write(self)
        seen.append(json.loads((tmp_path / "cache.progress.json").read_text()))

    monkeypatch.setattr(ProgressFile, "_write", read_back)
    monkeypatch.setattr("kdcache.capture.watch.progress_file.SECONDS_BETWEEN_WRITES", 0)
    run_capture(make_config(tmp_path, lines_with({6: "poison"}), run={"max_failed": 1}))
    assert {state["state"] for state in seen[:-1]} == {"capturing"}
    last = seen[-1]
    assert last["state"] == "finished"
    assert last["units"] == {"to_do": 5, "published": 4, "set_aside": 1}
    assert last["set_aside"][0]["unit"] == 1
    assert last["num_tokens"] == summarize_cache(tmp_path / "cache").num_tokens
    assert last["num_bytes"] == sum(path.stat().st_size for path in (tmp_path / "cache/data").iterdir())
    middle = seen[len(seen) // 2]
    assert middle["unit_in_work"] is not None
    assert middle["num_tokens_left"] > 0
    assert middle["eta_seconds"] >= 0  # rounded: the fake teacher needs less than that
    assert last["gpus"] == []


def test_a_state_that_cannot_be_written_costs_a_warning_and_nothing_else(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    config = make_config(tmp_path, run={"progress_path": str(tmp_path / "file/progress.json")})
    assert run_capture(config).manifest.is_complete
    assert caplog.text.count("cannot be written") == 1


def test_the_command_ends_with_status_1_where_units_were_set_aside_and_says_which(tmp_path, capsys):
    path = write_config(make_config(tmp_path, lines_with({6: "poison"})), tmp_path / "c.yaml")
    assert main(["capture", str(path), "--max-failed", "1"]) == 1
    out = capsys.readouterr().out
    assert "set aside  unit 1: " in out
    assert "1 unit left; run the same command again to retry" in out
    assert main(["capture", str(path), "--set", "run.skip_failing=true"]) == 0
    assert "1 sequence that made units fail (" in capsys.readouterr().out
    assert content(tmp_path / "cache").keys() == {*range(1, 21)} - {6}
