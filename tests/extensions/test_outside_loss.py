"""A loss term, and a divergence, that another package brings, in a training by the command line."""

from __future__ import annotations

import json
from functools import partial

import pytest

pytest.importorskip("transformers")

from contracts import terms as contract

from kdcache.cli.main import main
from kdcache.config.terms import TermConfig
from kdcache.loss.fused import fused_sparse_kd_loss
from kdcache.loss.prepare import LossSettings
from kdcache.train.terms.engine import make_term


def our_own(student, batch, weights_P, **loss):
    settings = LossSettings(reduction="sum")
    return fused_sparse_kd_loss(
        student.hidden_PH, student.projection, batch.teacher, target_ids=batch.target_ids_P, weights=weights_P,
        settings=settings, **loss,
    )  # fmt: skip


@pytest.mark.parametrize("promise", contract.PROMISES, ids=lambda promise: promise.__name__)
@pytest.mark.parametrize("alpha", [1.0, 0.3])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jensen_shannon"])
def test_our_own_loss_keeps_the_promises_of_a_term(promise, divergence, alpha):
    promise(partial(our_own, divergence=divergence, alpha=alpha))


@pytest.mark.parametrize("promise", contract.PROMISES, ids=lambda promise: promise.__name__)
def test_it_keeps_the_promises_of_a_term(toys, promise):
    term = make_term(TermConfig(term="top_token_error", options={"power": 2.0}))
    promise(term)


def metrics(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def train(toys, tmp_path, tiny_model_dir):
    """Capture from the tiny model by the command line, then train a student of its shape; the exit status, or the losses."""

    def run(out, selection="top_k", **loss):
        (tmp_path / "text.txt").write_text("def f(x): return x + 1\n" * 40)
        capture = {
            "input": {"format": "lines", "paths": [str(tmp_path / "text.txt")], "window": {"size": 128}},
            "teacher": {"model": str(tiny_model_dir), "backend": "transformers", "dtype": "float32"},
            "selection": {"kind": selection},
            "out": str(tmp_path / f"cache_{selection}"),
        }
        (tmp_path / "capture.yaml").write_text(json.dumps(capture))
        assert main(["capture", str(tmp_path / "capture.yaml")]) == 0
        student = {
            "cache": capture["out"], "out": str(tmp_path / out), "student": {"model": str(tiny_model_dir)}, "steps": 3,
            "loader": {"seq_len": 32, "batch_rows": 2}, "loss": loss,
        }  # fmt: skip
        (tmp_path / "train.yaml").write_text(json.dumps(student))
        status = main(["train", str(tmp_path / "train.yaml")])
        return status or [line["loss"] for line in metrics(tmp_path / out) if "loss" in line]

    return run


def test_a_student_is_trained_with_them_by_name(train):
    plain = train("plain")
    with_term = train("term", terms=[{"term": "top_token_error", "weight": 2.0}])
    assert len(plain) == len(with_term) == 3
    assert 0.5 < with_term[0] - plain[0] < 2.0  # a new student errs nearly always
    assert train("divergence", divergence="squared_distance", divergence_options={"scale": 2.0})[0] < 2.0


def test_wrong_requests_end_in_a_sentence_each(train, capsys):
    assert train("a", terms=[{"term": "top_token_error", "options": {"power": -1}}]) == 2
    assert "loss term 'top_token_error' does not take the options {'power': -1}: power is -1" in capsys.readouterr().err
    assert train("b", terms=[{"term": "unheard_of"}]) == 2
    assert "loss.terms[0]: term is 'unheard_of', but must be one of ours or of an installed package" in capsys.readouterr().err
    assert train("c", "sampled", terms=[{"term": "top_token_error"}]) == 2
    assert "needs the teacher's most probable token; capture with 'top_k'" in capsys.readouterr().err
