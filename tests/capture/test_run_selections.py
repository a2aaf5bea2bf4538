"""From the command line to a cache whose records are those of the definition, for every selection and engine."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from contracts.selection import check_draws

import kdcache
from kdcache.cli.main import main
from kdcache.config.teacher import FakeConfig, TeacherConfig
from kdcache.format.record import SequenceRecord
from kdcache.format.selection import has_estimates
from kdcache.teacher.fake import FakeTeacher
from kdcache.teacher.select.reference import select_reference
from kdcache.teacher.select.uniforms import position_states

SETTINGS = {
    "top_k": ["selection.k=9"],
    "top_p_k": ["selection.p=0.7", "selection.k=30"],
    "sampled": ["selection.num_draws=40", "selection.seed=3"],
    "threshold": ["selection.tau=0.015", "selection.seed=-3"],
    "top_k_sampled": ["selection.k=4", "selection.num_draws=20"],
}
FAKE = {"backend": "fake", "fake": {"vocab_size": 300, "context_length": 64}}


def capture(folder: Path, teacher: dict[str, object], *settings: str) -> list[SequenceRecord]:
    """The records of a capture by the command line, verified."""
    (folder / "a.txt").write_text("".join(f"line {n} says {'la ' * (n % 9)}\n" for n in range(12)))
    config = {
        "input": {"format": "lines", "paths": [str(folder / "a.txt")], "window": {"size": 40}},
        "teacher": {"model": "fake"} | teacher,
        "selection": {"temperatures": [2.0, 0.7], "entropy": True},
        "codec": {"id": "raw"},
        "out": str(folder / "cache"),
        "shards": {"unit_items": 5},
    }
    (folder / "c.yaml").write_text(json.dumps(config))
    sets = [part for setting in settings for part in ("--set", setting)]
    assert main(["capture", str(folder / "c.yaml"), *sets]) == 0
    assert main(["verify", str(folder / "cache")]) == 0
    with kdcache.open(folder / "cache") as reader:
        return [reader[number] for number in range(len(reader))]


def check(records, logits_of, selection, *, error: float) -> None:
    """Each record is the definition's, of logits that are known up to `error` nats."""
    assert len(records) == 12
    for record in records:
        sequence, found = record.sequence, record.distributions
        dense_PV = logits_of(sequence)[sequence.supervised_N]
        states_P = position_states(selection.params.get("seed", 0), sequence.key, sequence.positions_P)
        expected = select_reference(dense_PV, sequence.target_ids_P, selection, states_P)
        for name in ("tail_mass_P", "outside_target_logprobs", "log_z_PL", "entropy_P"):
            np.testing.assert_allclose(getattr(found, name), getattr(expected, name), atol=10 * error + 1e-6)
        exact_E, expected_E = found.is_exact_E, expected.is_exact_E
        np.testing.assert_allclose(found.logprobs_E[exact_E], expected.logprobs_E[expected_E], atol=error + 1e-6)
        if error == 0:
            np.testing.assert_array_equal(found.token_ids_E, expected.token_ids_E)
        elif has_estimates(selection):
            logprobs_PV = dense_PV - np.log(np.exp(dense_PV).sum(axis=-1, keepdims=True))
            check_draws(found, logprobs_PV, selection, states_P, edge=2e-6 + 2 * error)
            shared = np.intersect1d(keyed(found), keyed(expected))
            assert len(shared) >= 0.99 * expected.num_entries


def keyed(distributions) -> np.ndarray:
    rows_E = np.repeat(np.arange(distributions.num_positions), distributions.num_entries_P)
    return rows_E * 2**32 + distributions.token_ids_E


def selection_of(folder: Path):
    with kdcache.open(folder / "cache") as reader:
        return reader.manifest.identity.selection


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_capture_with_the_fake_teacher_holds_the_definitions_records(tmp_path, kind, capsys):
    records = capture(tmp_path, FAKE, f"selection.kind={kind}", *SETTINGS[kind])
    teacher = FakeTeacher(TeacherConfig(model="fake", backend="fake", fake=FakeConfig(vocab_size=300, context_length=64)))
    check(records, teacher.dense_logprobs, selection_of(tmp_path), error=0)
    capsys.readouterr()
    assert main(["info", str(tmp_path / "cache")]) == 0
    shown = capsys.readouterr().out
    assert ("unbiased estimates" in shown) == has_estimates(selection_of(tmp_path))
    good_for, other = (shown.split(name)[1].splitlines()[0] for name in ("\ngood for ", "\nor choose "))
    assert ("forward KL" in good_for, "every divergence" in good_for) == (
        kind not in ("top_k", "top_p_k"),
        kind in ("top_k", "top_p_k"),
    )
    assert other.strip().startswith("top_k:" if kind == "threshold" else "threshold:")
    assert f"training   at temperature 1{'; ' if kind == 'sampled' else ''}" in shown
    assert ("0.7" in shown.split("training")[1].splitlines()[0]) == (kind != "sampled")


def test_a_capture_that_is_cut_otherwise_stores_the_same(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    first = capture(tmp_path / "one", FAKE, "selection.kind=threshold")
    other = capture(tmp_path / "two", FAKE, "selection.kind=threshold", "shards.unit_items=1", "teacher.tokens_per_forward=7")
    for one, two in zip(first, other, strict=True):
        np.testing.assert_array_equal(one.distributions.token_ids_E, two.distributions.token_ids_E)


def float32_logits(folder: Path):
    """sequence -> (N, V) float32 logits of the model in the folder, by transformers, one sequence at a time."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()

    def logits(sequence) -> np.ndarray:
        with torch.inference_mode():
            ids = torch.from_numpy(sequence.input_ids_N.astype(np.int64))[None]
            return model(ids, use_cache=False).logits[0].double().numpy()

    return logits


@pytest.mark.slow
@pytest.mark.parametrize("kind", SETTINGS)
def test_a_capture_with_transformers_holds_the_definitions_records(tmp_path, kind, tiny_model_dir):
    teacher = {"model": str(tiny_model_dir), "backend": "transformers", "dtype": "float32", "num_threads": 1}
    records = capture(tmp_path, teacher, f"selection.kind={kind}", *SETTINGS[kind])
    check(records, float32_logits(tiny_model_dir), selection_of(tmp_path), error=2e-5)


@pytest.mark.slow
@pytest.mark.vllm
def test_a_capture_inside_vllms_worker_holds_the_definitions_records(tmp_path, tiny_model_dir):
    pytest.importorskip("vllm")
    teacher = {"model": str(tiny_model_dir), "backend": "vllm", "dtype": "float32", "num_threads": 1,
               "vllm": {"route": "worker"}, "tokens_per_forward": 32, "chunk_positions": 11}  # fmt: skip
    records = capture(tmp_path, teacher, "selection.kind=threshold", *SETTINGS["threshold"])
    check(records, float32_logits(tiny_model_dir), selection_of(tmp_path), error=5e-5)


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("selection.k=301", r"selection.k is 301, but must be from 1 to the teacher's vocabulary of 300"),
        ("selection.tau=0", "selection.tau: expected a number > 0.0, got 0"),
        ("selection.tau=1.5", "selection.tau: expected a number <= 1.0, got 1.5"),
        ("selection.tau=1e-9", "'threshold' has tau = 1e-09, expected a number from"),
        ("selection.num_draws=0", "selection.num_draws: expected a whole number >= 1, got 0"),
        ("selection.p=0", "selection.p: expected a number > 0.0, got 0"),
        ("selection.temperatures=[0]", "selection.temperatures[0]: expected a number > 0.0, got 0"),
        ("selection.temperatures=[1e9]", "has the temperature 1000000000.0, expected one above 0"),
    ],
)
def test_a_wrong_request_gets_one_sentence_and_nothing_is_written(tmp_path, setting, sentence, capsys):
    kind = "top_k_sampled" if "selection.k=" in setting else "threshold"
    (tmp_path / "a.txt").write_text("a line\n")
    (tmp_path / "c.yaml").write_text(
        json.dumps(
            {
                "input": {"format": "lines", "paths": [str(tmp_path / "a.txt")], "window": {"size": 40}},
                "teacher": {"model": "fake"} | FAKE,
                "out": str(tmp_path / "cache"),
            }
        )
    )
    assert main(["capture", str(tmp_path / "c.yaml"), "--set", f"selection.kind={kind}", "--set", setting]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("kdcache: error: ")]
    assert sentence in line
    assert not (tmp_path / "cache").exists()
