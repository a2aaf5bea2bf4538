from pathlib import Path

import numpy as np
import pytest
import torch
from train_caches import load_teacher_model
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedModel

from kdcache.config.train import StudentConfig
from kdcache.errors import MismatchError
from kdcache.train.evaluation.heldout import HeldoutSequence
from kdcache.train.evaluation.scores import heldout_nats_per_token, score_models
from kdcache.train.student import build_student

GENERATOR = np.random.Generator(np.random.Philox(key=1))
SEQUENCES = [HeldoutSequence(GENERATOR.integers(0, 512, size=n), num_bytes=3 * n, text=i) for i, n in enumerate((2, 30, 17))]


@pytest.fixture(scope="module")
def teacher(tiny_model_dir: Path) -> PreTrainedModel:
    return load_teacher_model(tiny_model_dir)


@pytest.fixture(scope="module")
def student(tiny_model_dir: Path) -> PreTrainedModel:
    config = StudentConfig(model=str(tiny_model_dir), overrides={"hidden_size": 32, "vocab_size": 530})
    return build_student(config, seed=0).eval()


@torch.no_grad()
def _reference(teacher: PreTrainedModel, model: PreTrainedModel, sequence: HeldoutSequence) -> list[float]:
    """The four sums in float64, by the formulas, position by position."""
    ids = torch.from_numpy(sequence.input_ids_N)[None]
    p = torch.softmax(teacher(ids).logits[0].double(), dim=-1).numpy()
    q = torch.softmax(model(ids).logits[0].double(), dim=-1).numpy()
    nll = kl = agreement = correct = 0.0
    for t, target in enumerate(sequence.input_ids_N[1:]):
        nll -= np.log(q[t, target])
        kl += sum(p_v * np.log(p_v / q_v) for p_v, q_v in zip(p[t], q[t], strict=False))
        agreement += p[t].argmax() == q[t].argmax()
        correct += q[t].argmax() == target
    return [nll, kl, agreement, correct]


@pytest.mark.parametrize("chunk_positions", [1, 7, 256])
def test_scores_are_the_formulas_for_any_chunk_size(
    teacher: PreTrainedModel, student: PreTrainedModel, chunk_positions: int
) -> None:
    scores = score_models(teacher, {"student": student}, SEQUENCES, chunk_positions=chunk_positions)
    for name, model in (("teacher", teacher), ("student", student)):
        s = scores[name]
        ours = np.stack([s.nll_S, s.kl_S, s.agreement_S, s.correct_S], axis=1)
        np.testing.assert_allclose(ours, [_reference(teacher, model, q) for q in SEQUENCES], rtol=1e-5, atol=1e-5)


def test_the_teacher_agrees_with_itself(teacher: PreTrainedModel) -> None:
    scores = score_models(teacher, {"copy": teacher}, SEQUENCES)["copy"]
    assert scores.kl_S.tolist() == [0, 0, 0]
    assert scores.agreement_S.tolist() == [s.num_targets for s in SEQUENCES]


def test_capped_logits_are_scored_as_the_model_gives_them(student: PreTrainedModel) -> None:
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8}
    capped = Gemma2ForCausalLM(Gemma2Config(vocab_size=530, **small, num_key_value_heads=1, final_logit_softcapping=0.5)).eval()
    scores = score_models(capped, {"student": student}, SEQUENCES, chunk_positions=5)["student"]
    np.testing.assert_allclose(scores.kl_S, [_reference(capped, student, s)[1] for s in SEQUENCES], rtol=1e-4)


def test_the_mean_loss_is_that_of_the_scores_and_leaves_the_mode(teacher: PreTrainedModel, student: PreTrainedModel) -> None:
    student.train()
    mean = heldout_nats_per_token(student, SEQUENCES, chunk_positions=5)
    assert student.training
    student.eval()
    nll_S = score_models(teacher, {"student": student}, SEQUENCES)["student"].nll_S
    assert mean == pytest.approx(nll_S.sum() / sum(s.num_targets for s in SEQUENCES), rel=1e-6)


def test_a_student_with_fewer_ids_than_the_teacher_is_refused(teacher: PreTrainedModel, student: PreTrainedModel) -> None:
    with pytest.raises(MismatchError, match="student 'small' has a vocabulary of 520, the teacher one of 530 tokens"):
        score_models(student, {"small": teacher}, SEQUENCES)
