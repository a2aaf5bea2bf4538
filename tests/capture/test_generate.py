"""The teacher answers prompts: what is asked, what is recorded of it, and a capture of it that survives as any other does."""

import json
import os
import signal
import time

import faulty_teacher
import msgspec
import numpy as np
import pytest
from capture_cases import make_config, start_command, wait_for_units, write_config

import kdcache
from kdcache.capture.estimate import estimate_capture
from kdcache.capture.executors.run import run_capture
from kdcache.capture.generate import make_prompts, writer_of
from kdcache.cli.main import main
from kdcache.config.capture import CaptureConfig
from kdcache.config.load import convert_config
from kdcache.config.loader import LoaderConfig
from kdcache.config.teacher import FakeConfig, TeacherConfig
from kdcache.errors import ConfigError, InputError, MismatchError
from kdcache.format.record import ROLES
from kdcache.inputs.chat import Chat
from kdcache.inputs.content import Item, Start
from kdcache.store.summary import summarize_cache
from kdcache.store.verify import verify_cache
from kdcache.teacher.fake import BOS_ID, END_ID, FakeTeacher, FakeTokenizer
from kdcache.teacher.generation import filtered_probabilities

TOKENIZER = FakeTokenizer()
GENERATE = {"max_tokens": 12, "stop_token_ids": list(range(0, 300, 9))}
USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}


def config(tmp_path, lines=tuple(f"prompt {n}" for n in range(10)), **sections):
    return make_config(tmp_path, lines, **{"generate": GENERATE, "shards": {"unit_items": 3}} | sections)


def records_of(path):
    with kdcache.open(path) as reader:
        return [reader[n] for n in range(len(reader))]


def written(path):
    """What a cache holds of answers: where it came from, its tokens, how it ended, what the teacher said of it."""
    records = records_of(path)
    return sorted(
        (s.source, s.key, s.input_ids_N.tolist(), s.finish, r.distributions.logprobs_E.tolist())
        for r in records
        for s in [r.sequence]
    )


def prompts(content, **generate):
    kind = {str: "text", list: "messages"}.get(type(content[0]), "ids")
    items = [
        Item(Chat(value) if isinstance(value, list) else value, f"x:{n}", Start(0, n, n)) for n, value in enumerate(content)
    ]
    fields = {
        "input": {"format": "jsonl", "paths": ["x"], "content": kind, "window": {"size": 40}},
        "teacher": {"model": "fake", "backend": "fake"},
        "generate": {"max_tokens": 10} | generate,
        "out": "cache",
    }
    return make_prompts(items, tokenizer=TOKENIZER, config=convert_config(fields, CaptureConfig), vocab_size=300)


def test_texts_chats_and_ids_are_asked_up_to_where_the_answer_starts():
    ((text,), _), ((ids,), _) = prompts(["ab"]), prompts([np.array([5, 6])])
    assert text.sequence.input_ids_N.tolist() == [BOS_ID, 97, 98]
    assert ids.sequence.input_ids_N.tolist() == [5, 6]
    assert text.sequence.turn_starts.tolist() == [0, 3]
    ((chat,), _) = prompts([[USER, ASSISTANT, USER]])
    assert (
        TOKENIZER.decode(chat.sequence.input_ids_N.tolist()) == "<bos><user>hi<end><assistant>ho<end><user>hi<end><assistant>"
    )
    assert not chat.sequence.supervised_N.any()


def test_each_answer_has_a_seed_of_its_own_by_what_is_asked_and_not_where():
    some, counts = prompts(["a", "b", "a"], n=2)
    assert [prompt.source for prompt in some] == ["x:0~0", "x:0~1", "x:1~0", "x:1~1", "x:2~0", "x:2~1"]
    assert counts.num_sequences == 6
    seeds = [prompt.seed for prompt in some]
    assert seeds[:2] == seeds[4:]
    assert len(set(seeds)) == 4
    assert {prompt.seed for prompt in prompts(["a", "b"], n=2, seed=1)[0]} & set(seeds) == set()


def test_a_prompt_without_room_for_its_answer_is_refused_or_counted():
    fits, long = "x" * 29, "x" * 30  # and a BOS
    assert prompts([fits])[1].num_sequences == 1
    with pytest.raises(InputError, match=r"x:1: a prompt of 31 tokens, .* has room for 30 besides generate\.max_tokens \(10\)"):
        prompts([fits, long])
    some, counts = prompts([fits, long, ""], long_prompts="skip")
    assert (len(some), counts.num_long_prompts, counts.num_empty_items) == (1, 1, 1)


def test_a_chat_that_is_answered_already_is_refused_or_answered_anew():
    with pytest.raises(InputError, match="x:0: the chat ends with the assistant's words"):
        prompts([[USER, ASSISTANT]])
    some, counts = prompts([[USER, ASSISTANT, ASSISTANT], [ASSISTANT], [USER]], last_answer="skip")
    assert [prompt.sequence.input_ids_N.tolist() for prompt in some] == [some[1].sequence.input_ids_N.tolist()] * 2
    assert (counts.num_dropped_answers, counts.num_empty_items) == (2, 1)


def test_the_answers_tokens_are_supervised_and_nothing_else(tmp_path):
    run_capture(config(tmp_path))
    for record in records_of(tmp_path / "cache"):
        sequence = record.sequence
        asked = TOKENIZER.encode(f"prompt {int(sequence.source.rpartition(':')[2]) - 1}", True)
        answer = sequence.input_ids_N[len(asked) :]
        assert sequence.input_ids_N[: len(asked)].tolist() == asked
        assert sequence.positions_P.tolist() == list(range(len(asked) - 1, sequence.num_tokens - 1))
        assert sequence.target_ids_P.tolist() == answer.tolist()
        assert [ROLES[code] for code in sequence.roles_N] == ["none"] * len(asked) + ["assistant"] * len(answer)
        assert sequence.turn_starts.tolist() == [0, len(asked)]
        ended = answer[-1] % 9 == 0 or answer[-1] == END_ID
        assert sequence.finish == ("stop" if ended else "length")
        assert ended or len(answer) == 12
    assert verify_cache(tmp_path / "cache").problems == []


def test_the_distributions_are_those_of_scoring_the_same_text(tmp_path):
    run_capture(config(tmp_path))
    teacher = FakeTeacher(TeacherConfig(model="fake", backend="fake", fake=FakeConfig(vocab_size=300, context_length=64)))
    for record in records_of(tmp_path / "cache"):
        with kdcache.open(tmp_path / "cache") as reader:
            (scored,) = teacher.score([record.sequence], reader.manifest.identity.selection)
        np.testing.assert_array_equal(scored.logprobs_E, record.distributions.logprobs_E)
        np.testing.assert_array_equal(scored.token_ids_E, record.distributions.token_ids_E)


def test_at_temperature_0_every_answer_is_the_most_probable_token_of_its_position(tmp_path):
    run_capture(config(tmp_path, generate={"max_tokens": 12, "temperature": 0}))
    for record in records_of(tmp_path / "cache"):
        assert record.distributions.token_ids_E[::4].tolist() == record.sequence.target_ids_P.tolist()
        assert len(record.distributions.outside_target_logprobs) == 0


def test_a_chat_is_answered_in_the_assistants_turn(tmp_path):
    chats = [{"messages": [USER, ASSISTANT, USER | {"content": f"and {n}"}]} for n in range(4)]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, chats)))
    given = {"format": "jsonl", "paths": [str(tmp_path / "c.jsonl")], "content": "messages"}
    run_capture(config(tmp_path, input=given))
    for record in records_of(tmp_path / "cache"):
        sequence = record.sequence
        assert sequence.input_ids_N[sequence.turn_starts[-1]] == END_ID + ROLES.index("assistant")
        assert sequence.positions_P[0] == sequence.turn_starts[-1]  # the header's one token is the last of the prompt
        assert (sequence.roles_N[sequence.turn_starts[-1] + 1 :] == ROLES.index("assistant")).all()


def test_a_loader_trains_on_the_answers_alone_and_its_labels_are_their_tokens(tmp_path):
    run_capture(config(tmp_path))
    records = records_of(tmp_path / "cache")
    options = LoaderConfig(seq_len=64, batch_rows=2)
    labels = []
    with kdcache.open(tmp_path / "cache") as reader, kdcache.Loader(reader, options) as loader:
        for batch in loader:
            flat = batch.target_ids_BT.reshape(-1)
            assert np.array_equal(np.flatnonzero(flat >= 0), batch.flat_positions_P)
            labels += flat[batch.flat_positions_P].tolist()
            # The token of each label is the next one of the row.
            following = np.roll(batch.input_ids_BT, -1, axis=1).reshape(-1)
            assert np.array_equal(following[batch.flat_positions_P], flat[batch.flat_positions_P])
    assert sorted(labels) == sorted(t for record in records for t in record.sequence.target_ids_P.tolist())


def test_what_was_drawn_from_can_be_recorded_in_place_of_the_teachers_own(tmp_path):
    asked = config(tmp_path, generate=GENERATE | {"temperature": 0.7, "top_p": 0.9, "top_k": 40, "capture_filtered": True})
    run_capture(asked)
    with kdcache.open(tmp_path / "cache") as reader:
        assert reader.manifest.identity.selection.filters == {"temperature": 0.7, "top_p": 0.9, "top_k": 40}
    teacher = FakeTeacher(asked.teacher)
    for record in records_of(tmp_path / "cache"):
        found, positions_P = record.distributions, record.sequence.positions_P
        dense_PV = teacher.dense_logprobs(record.sequence)[positions_P]
        expected_PV = np.array([filtered_probabilities(dense_V, asked.generate) for dense_V in dense_PV])
        kept_PK = np.take_along_axis(expected_PV, found.token_ids_E.reshape(-1, 4), axis=-1)
        np.testing.assert_allclose(np.exp(found.logprobs_E.reshape(-1, 4)), kept_PK, atol=1e-6)
        np.testing.assert_allclose(found.tail_mass_P, 1 - kept_PK.sum(axis=-1), atol=1e-6)
        # Every token of the answer was drawn from among what the filters left.
        assert np.isfinite(found.target_logprobs(record.sequence.target_ids_P)).all()
    assert verify_cache(tmp_path / "cache").problems == []


def test_several_answers_to_a_prompt_differ_and_the_same_capture_gives_the_same(tmp_path):
    asked = {"generate": GENERATE | {"n": 3}}
    summary = run_capture(config(tmp_path, **asked))
    assert summary.counts.num_sequences == 30
    first = written(tmp_path / "cache")
    assert len({tuple(ids) for _, _, ids, _, _ in first}) > 27
    run_capture(config(tmp_path, **asked, out=str(tmp_path / "again"), shards={"unit_items": 10}))
    assert written(tmp_path / "again") == first
    run_capture(config(tmp_path, generate=asked["generate"] | {"seed": 1}, out=str(tmp_path / "other")))
    assert written(tmp_path / "other") != first


def test_other_settings_are_another_capture_and_the_difference_is_shown(tmp_path):
    run_capture(config(tmp_path))
    for change, shown in (
        ({"temperature": 0.5}, r"generation\.temperature: 1\.0 != 0\.5"),
        ({"seed": 3}, r"seeds\.generate: 0 != 3"),
        ({"stop": ["."]}, r"generation\.stop: \(\) != \('\.',\)"),
        ({"capture_filtered": True, "top_k": 3}, r"selection\.filters\.top_k: None != 3"),
    ):
        with pytest.raises(MismatchError, match=shown):
            run_capture(config(tmp_path, generate=GENERATE | change))
    with pytest.raises(MismatchError, match=r"generation\.max_tokens: 12 != None"):
        run_capture(msgspec.structs.replace(config(tmp_path), generate=None))
    assert run_capture(config(tmp_path)).num_units_captured == 0


def test_killed_while_it_writes_it_goes_on_and_gives_the_same(tmp_path):
    lines = [f"prompt {n} writes" for n in range(12)]
    undisturbed = config(tmp_path, lines, out=str(tmp_path / "undisturbed"))
    run_capture(undisturbed)
    asked = config(tmp_path, lines)
    process = start_command(write_config(asked, tmp_path / "c.yaml"))
    wait_for_units(tmp_path / "cache", 1, process)
    time.sleep(0.3)  # into the answers of the second unit
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGKILL
    done = len(os.listdir(tmp_path / "cache/journal"))
    assert 1 <= done < 4
    assert run_capture(asked).num_units_captured == 4 - done
    assert written(tmp_path / "cache") == written(tmp_path / "undisturbed")


def test_prompts_that_the_teacher_cannot_answer_or_read_back_are_left_out_and_named(tmp_path, monkeypatch):
    faulty_teacher.install(setitem=monkeypatch.setitem)
    lines = [f"prompt {n} {({3: 'mute', 7: 'poison'}).get(n, '')}" for n in range(10)]
    summary = run_capture(config(tmp_path, lines, run={"skip_failing": True, "retries": 0}, shards={"unit_items": 10}))
    assert {s.source.rpartition(":")[2]: s.reason.partition(": ")[2] for s in summary.skipped} == {
        "4": "the teacher has nothing to say",
        "8": "the teacher choked",
    }
    assert summary.counts.num_sequences == summary.manifest.total("num_sequences") == 8


def test_ranks_write_what_one_process_writes(tmp_path):
    run_capture(config(tmp_path, out=str(tmp_path / "one")))
    for rank in (1, 0):
        run_capture(config(tmp_path, run={"rank": rank, "world_size": 2}))
    assert written(tmp_path / "cache") == written(tmp_path / "one")


def test_the_dry_run_says_how_many_answers_and_how_long_they_may_be(tmp_path, capsys):
    asked = config(tmp_path, generate=GENERATE | {"n": 2})
    estimate = estimate_capture(asked)
    assert estimate.num_sequences == 20
    assert estimate.num_positions == 20 * 12
    assert estimate.num_tokens == 20 * (len("prompt 0") + 1 + 12)
    run_capture(asked)
    found = summarize_cache(tmp_path / "cache")
    assert found.num_tokens < estimate.num_tokens
    assert found.num_bytes < estimate.num_bytes * 1.1
    assert main(["capture", str(write_config(asked, tmp_path / "c.yaml")), "--dry-run"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "at most 240 in answers, 20 answers (2 per prompt)" in out


def test_progress_counts_the_tokens_as_they_are_written_and_ends_with_all(tmp_path):
    from kdcache.capture.watch.progress import CaptureProgress

    class Counting(CaptureProgress):
        total, calls, guesses = 0, 0, ()

        def advance(self, num_tokens):
            self.total, self.calls = self.total + num_tokens, self.calls + 1

        def start_unit(self, unit, num_tokens):
            self.guesses = (*self.guesses, num_tokens)

    seen = Counting()
    summary = run_capture(config(tmp_path), seen)
    assert seen.total == summary.num_tokens == summary.manifest.total("num_tokens")
    assert sum(seen.guesses[1::2]) == seen.total  # after each unit, what it came to
    assert seen.guesses[0] >= seen.guesses[1]
    assert seen.calls >= 20


def test_info_says_how_answers_were_made_and_how_they_ended(tmp_path, capsys):
    run_capture(config(tmp_path, generate=GENERATE | {"temperature": 0.8}))
    assert main(["info", str(tmp_path / "cache")]) == 0
    out = " ".join(capsys.readouterr().out.split())
    finishes = [record.sequence.finish for record in records_of(tmp_path / "cache")]
    assert f"{finishes.count('stop')} ended by stop" in out
    assert "generation seed=0, temperature=0.8, n=1, max_tokens=12, stop_token_ids=" in out
    assert main(["info", str(tmp_path / "cache"), "--json"]) == 0
    fields = json.loads(capsys.readouterr().out)
    assert fields["num_finished"] == {name: finishes.count(name) for name in sorted(set(finishes))}
    assert fields["manifest"]["identity"]["generation"]["temperature"] == 0.8


def test_a_teacher_that_only_reads_is_refused_in_words():
    class Reader:
        identity = FakeTeacher(TeacherConfig(model="fake", backend="fake")).identity

        def score(self, sequences, selection, features=()):
            raise AssertionError

        def close(self):
            raise AssertionError

    with pytest.raises(ConfigError, match="the fake teacher only reads"):
        writer_of(Reader())
    served = {"model": "m", "backend": "served", "server": {"url": "http://127.0.0.1:9/v1"}}
    fields = {"input": {"format": "lines", "paths": ["x"]}, "teacher": served, "out": "x", "generate": {}}
    with pytest.raises(ConfigError, match="a served teacher can only read"):  # before any server is asked
        convert_config(fields, CaptureConfig)
