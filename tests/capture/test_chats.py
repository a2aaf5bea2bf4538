"""Captures of chats through a real tokenizer and its template; the fake teacher reads them."""

from __future__ import annotations

import json
import sys
from datetime import datetime
from pathlib import Path

import pytest

import kdcache
from kdcache.config.capture import CaptureConfig
from kdcache.config.load import convert_config
from kdcache.errors import ConfigError, InputError

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[1] / "teacher"))

from chat_families import CHATML, LLAMA, QWEN, write_tokenizer

from kdcache.capture import job
from kdcache.capture.estimate import estimate_capture
from kdcache.capture.executors.run import run_capture

USER = {"role": "user", "content": "hi"}
THOUGHT = [{"role": "assistant", "content": f"<think>\n{thought}\n</think>\n\n{word}"} for thought, word in ("ab", "cd")]


@pytest.fixture
def make_config(tmp_path):
    def make(template, rows, run=None, unit_items=1, **fields):
        write_tokenizer(tmp_path / "tokenizer", "bytes", template)
        (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        tokenizer = str(tmp_path / "tokenizer")
        given = {"format": "jsonl", "paths": [str(tmp_path / "x.jsonl")], "content": "messages", "supervise": "assistant"}
        return convert_config(
            {
                "input": given | fields,
                "teacher": {"model": "fake", "backend": "fake", "fake": {"vocab_size": 600}, "tokenizer": tokenizer},
                "selection": {"k": 4}, "out": str(tmp_path / "cache"), "shards": {"unit_items": unit_items}, "run": run or {},
            },
            CaptureConfig,
        )  # fmt: skip

    return make


def read(config):
    """(source, text, what is learnt) of each sequence."""
    tokenizer = job.load_job_tokenizer(config)
    with kdcache.open(config.out) as cache:
        sequences = [cache[index].sequence for index in range(len(cache))]
    return [
        (s.source.rpartition(":")[2], tokenizer.decode(s.input_ids_N.tolist()),
         tokenizer.decode([int(s.input_ids_N[t + 1]) for t in s.positions_P if t + 1 < s.num_tokens]))
        for s in sequences
    ]  # fmt: skip


class Later(datetime):
    """A clock of another day."""

    @classmethod
    def now(cls, tz=None):
        return cls(2031, 5, 7)


def test_the_clock_stands_still_for_all_ranks_and_resumes(make_config, monkeypatch):
    rows = [{"messages": [USER, {"role": "assistant", "content": "yes"}]}] * 2
    run_capture(make_config(LLAMA, rows, run={"rank": 0, "world_size": 2}))
    monkeypatch.setattr(job, "datetime", Later)
    config = make_config(LLAMA, rows, run={"rank": 1, "world_size": 2})
    summary = run_capture(config)
    noted = summary.manifest.config["notes"]["template_time"]
    texts = [text for _, text, _ in read(config)]
    assert len(set(texts)) == 1
    assert datetime.fromisoformat(noted).strftime("%d %b %Y") in texts[0]
    assert "2031" not in noted


def test_the_clock_can_be_set(make_config):
    config = make_config(LLAMA, [{"messages": [USER, {"role": "assistant", "content": "yes"}]}], template_time="2027-03-04")
    assert run_capture(config).manifest.config["notes"]["template_time"] == "2027-03-04T00:00:00"
    assert "04 Mar 2027" in read(config)[0][1]


def test_earlier_thoughts_are_learnt_where_each_answer_is_an_item(make_config):
    rows = [{"messages": [USER, THOUGHT[0], USER, THOUGHT[1]]}]
    config = make_config(QWEN, rows)
    run_capture(config)
    assert [learnt for _, _, learnt in read(config)] == ["b<|im_end|><think>\nc\n</think>\n\nd<|im_end|>"]
    config = make_config(QWEN, rows, one_item_per="answer")
    config = convert_config(json.loads(json.dumps(_plain(config, "apart"))), CaptureConfig)
    run_capture(config)
    assert [(source, learnt) for source, _, learnt in read(config)] == [
        ("1@1", "<think>\na\n</think>\n\nb<|im_end|>"),
        ("1@3", "<think>\nc\n</think>\n\nd<|im_end|>"),
    ]


def _plain(config, name):
    from kdcache.config.load import config_to_builtins

    plain = config_to_builtins(config)
    return plain | {"out": plain["out"] + name}


def test_weights_count_whatever_is_supervised_and_unused_columns_are_named(make_config):
    rows = [{"messages": [USER, THOUGHT[0] | {"weight": 0}, USER, THOUGHT[1]], "label": True, "tools": [{"name": "f"}]}]
    for supervise, learnt in (("assistant", "<think>\nc\n</think>\n\nd<|im_end|>"), ("all", None)):
        config = make_config(CHATML, rows, supervise=supervise)
        config = convert_config(json.loads(json.dumps(_plain(config, supervise))), CaptureConfig)
        notes = {
            "'label' of the item is not used": 1,
            "'tools' of the item: the chat template does not read it": 1,
        }
        assert estimate_capture(config).notes == notes
        assert run_capture(config).counts.notes == notes
        got = read(config)[0][2]
        assert got == learnt if learnt else "<think>\na" not in got and got.count("<|im_start|>") == 3


def test_a_chat_that_proves_nothing_ends_the_capture_or_is_left_out_by_name(make_config):
    hiding = CHATML.replace("{{ m.content }}", "{{ m.content if 'odd' not in m.content else '%s' % ('ODD',) }}")
    rows = [{"messages": [USER, {"role": "assistant", "content": word}]} for word in ("yes", "odd", "no")]
    with pytest.raises(InputError, match=r"x.jsonl:2: it cannot be proven .* message 1 is: the template writes something else"):
        run_capture(make_config(hiding, rows, unit_items=10))
    config = make_config(hiding, rows, unit_items=10, run={"skip_failing": True})
    assert [note.split(" as in ")[0] for note in estimate_capture(config).notes] == ["left out by run.skip_failing,"]
    summary = run_capture(config)
    assert [skipped.source.rpartition(":")[2] for skipped in summary.skipped] == ["2"]
    assert [learnt for _, _, learnt in read(config)] == ["yes<|im_end|>", "no<|im_end|>"]


def test_arguments_go_to_the_template_or_are_refused(make_config):
    rows = [{"messages": [USER, {"role": "assistant", "content": "yes"}]}]
    config = make_config(QWEN, rows, template_arguments={"enable_thinking": False})
    run_capture(config)
    assert read(config)[0][2] == "yes<|im_end|>"
    with pytest.raises(ConfigError, match=r"reads no variable 'enable_thinkin'; it reads .*enable_thinking"):
        run_capture(make_config(QWEN, rows, template_arguments={"enable_thinkin": False}))
