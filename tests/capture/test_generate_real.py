"""Real teachers answer chats: what is captured is what they drew, token for token, and resuming adds nothing else."""

import json
import shutil

import numpy as np
import pytest

import kdcache
from kdcache.capture.executors.run import run_capture
from kdcache.capture.watch.progress import CaptureProgress
from kdcache.capture.watch.signals import StopRequest
from kdcache.config.capture import CaptureConfig
from kdcache.config.load import convert_config
from kdcache.store.verify import verify_cache
from kdcache.teacher import load_tokenizer
from kdcache.teacher.select.reference import filter_reference

pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

BACKENDS = ["transformers", pytest.param("vllm", marks=pytest.mark.vllm)]
WORDS = ("list", "string", "index", "value", "return", "class")


@pytest.fixture(params=BACKENDS)
def ask(request, tmp_path, tiny_model_dir):
    """A config of chats for the tiny model, with changes."""
    if request.param == "vllm":
        pytest.importorskip("vllm")
    chats = [[{"role": "user", "content": f"What is a {word}?"}] for word in WORDS]
    (tmp_path / "c.jsonl").write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))

    def config(**generate):
        fields = {
            "input": {
                "format": "jsonl", "paths": [str(tmp_path / "c.jsonl")], "content": "messages", "window": {"size": 100},
            },
            "teacher": {"model": str(tiny_model_dir), "backend": request.param, "num_threads": 1, "tokens_per_forward": 512},
            "generate": {"max_tokens": 40} | generate,
            "selection": {"k": 8},
            "codec": {"id": "raw"},
            "out": str(tmp_path / "cache"), "shards": {"unit_items": 2},
        }  # fmt: skip
        return convert_config(fields, CaptureConfig)

    return config


class StopAfterOneUnit(CaptureProgress):
    def __init__(self, stop):
        self.stop = stop

    def published(self, shard):
        self.stop.request()


def records_of(config):
    with kdcache.open(config.out) as reader:
        return [reader[n] for n in range(len(reader))]


def float32_logits(folder):
    """sequence -> (P, V) of its supervised positions: one forward of transformers, without a batch, as float64."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()

    def logits(sequence):
        with torch.inference_mode():
            logits_1NV = model(torch.from_numpy(sequence.input_ids_N.astype(np.int64))[None], use_cache=False).logits
        return logits_1NV[0].double().numpy()[sequence.positions_P]

    return logits


def test_what_was_drawn_from_is_the_definition_on_the_float32_logits(ask, tiny_model_dir):
    filters = {"temperature": 0.7, "top_k": 30, "top_p": 0.9, "min_p": 0.01}
    config = ask(capture_filtered=True, n=2, seed=3, **filters)
    run_capture(config)
    logits, num_kept = float32_logits(tiny_model_dir), []
    for record in records_of(config):
        sequence, found = record.sequence, record.distributions
        kept_PV = np.array([filter_reference(logits_V, filters) for logits_V in logits(sequence)])
        exp_PV = np.exp(kept_PV - kept_PV.max(axis=-1, keepdims=True))
        expected_PV = exp_PV / exp_PV.sum(axis=-1, keepdims=True)
        entries_PK, logprobs_PK = found.padded()
        # A padded entry has the logprob -inf, and so the probability 0.
        top_PK = np.take_along_axis(expected_PV, entries_PK.astype(np.int64), axis=-1)
        np.testing.assert_allclose(np.exp(logprobs_PK), np.where(np.isfinite(logprobs_PK), top_PK, 0), atol=2e-5)
        np.testing.assert_allclose(np.exp(logprobs_PK), -np.sort(-expected_PV, axis=-1)[:, :8], atol=2e-5)
        np.testing.assert_allclose(found.tail_mass_P, 1 - np.exp(logprobs_PK).sum(axis=-1), atol=2e-5)
        drawn_P = np.take_along_axis(expected_PV, sequence.target_ids_P[:, None].astype(np.int64), axis=-1)[:, 0]
        assert (drawn_P > 0).all()
        np.testing.assert_allclose(np.exp(found.target_logprobs(sequence.target_ids_P)), drawn_P, atol=2e-5)
        num_kept += (expected_PV > 0).sum(axis=-1).tolist()
    assert min(num_kept) < 8 < max(num_kept) < 30, "the filters decide, here before and there after the selection"
    assert verify_cache(config.out).problems == []


def test_greedy_answers_are_the_top_of_what_is_captured(ask, tiny_model_dir):
    config = ask(temperature=0)
    run_capture(config)
    tokenizer = load_tokenizer(str(tiny_model_dir))
    for record in records_of(config):
        sequence, found = record.sequence, record.distributions
        # A tie of the engine's numerics may fall either way; there is none among these.
        assert found.token_ids_E[::8].tolist() == sequence.target_ids_P.tolist()
        asked = tokenizer.decode(sequence.input_ids_N[: sequence.positions_P[0] + 1].tolist())
        assert asked.startswith("<s><|user|>\nWhat is a ")
        assert asked.endswith("?<|end|>\n<|assistant|>\n")
        assert sequence.input_ids_N[sequence.turn_starts[-1]] == tokenizer.encode("<|assistant|>", False)[0]
    assert verify_cache(config.out).problems == []


@pytest.mark.parametrize("ask", ["transformers"], indirect=True)  # vLLM's: tests/teacher/test_vllm_generation.py
def test_stop_strings_lengths_and_several_answers_and_a_resume_that_gives_the_same(ask, tmp_path):
    config = ask(n=3, stop=["e"], seed=5)

    stop = StopRequest()
    assert run_capture(config, StopAfterOneUnit(stop), stop).num_units_captured == 1
    assert run_capture(config).num_units_captured == 2
    resumed = records_of(config)
    shutil.rmtree(config.out)
    run_capture(config)
    undisturbed = records_of(config)
    assert [r.sequence.key for r in resumed] == [r.sequence.key for r in undisturbed]
    for ours, theirs in zip(resumed, undisturbed, strict=True):
        np.testing.assert_array_equal(ours.distributions.logprobs_E, theirs.distributions.logprobs_E)
    tokenizer = load_tokenizer(config.teacher.model)
    for record in undisturbed:
        known = [i for i in record.sequence.target_ids_P.tolist() if i < tokenizer.identity.vocab_size]
        ended = record.sequence.target_ids_P[-1] in tokenizer.end_ids
        assert record.sequence.finish == ("stop" if "e" in tokenizer.decode(known) or ended else "length")
        assert record.sequence.finish == "stop" or len(record.distributions.tail_mass_P) == 40
        assert "e" not in tokenizer.decode(known[:-1])
    assert {r.sequence.finish for r in undisturbed} >= {"stop"}
    answers = {tuple(r.sequence.target_ids_P.tolist()) for r in undisturbed}
    assert len(undisturbed) == 18
    assert len(answers) > 12
