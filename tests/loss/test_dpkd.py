"""DPKD from two numbers per answer: its golden number, TRL's own loss, and gradients without whole logits."""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

from kdcache.errors import LossError
from kdcache.loss.chunks import Head
from kdcache.loss.fused import Projection
from kdcache.loss.states.dpkd import Answers, dpkd_loss, pair_losses


class Case:
    """Five sequences: two pairs, and one answer alone."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(5)
        self.hidden_PH = torch.randn((23, 7), generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        self.weight_VH = torch.randn((31, 7), generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        self.target_ids_P = torch.randint(0, 31, (23,), generator=generator)
        self.teacher_P = -torch.rand(23, generator=generator)
        sequences_P = torch.tensor([0] * 4 + [1] * 7 + [2] * 3 + [3] * 5 + [4] * 4)
        self.answers = Answers(sequences_P, torch.tensor([[0, 3], [4, 1]]), 5)
        self.weights_P = torch.rand(23, generator=generator)
        self.weights_P[5] = 0
        self.target_ids_P[10], self.teacher_P[10] = -100, math.nan

    def loss(self, beta: float = 0.1) -> torch.Tensor:
        projection = Projection(self.weight_VH, head=Head(logit_scale=1.5), chunk_positions=6)
        arguments = self.target_ids_P, self.teacher_P, self.answers, self.weights_P
        return dpkd_loss(self.hidden_PH, projection, *arguments, beta)

    def plain(self, beta: float = 0.1) -> torch.Tensor:
        """The formula over whole logits, sequence by sequence."""
        logprobs_PV = (1.5 * self.hidden_PH @ self.weight_VH.T).log_softmax(dim=1)
        means = []
        for sequence in range(5):
            inside_P = (self.answers.sequences_P == sequence) & (self.target_ids_P >= 0) & (self.weights_P > 0)
            weights = self.weights_P[inside_P].double()
            student = logprobs_PV[inside_P].gather(1, self.target_ids_P[inside_P][:, None])[:, 0]
            both = torch.stack([student, self.teacher_P[inside_P].double()])
            means.append((both * weights).sum(dim=1) / weights.sum())
        total = torch.zeros((), dtype=torch.float64)
        for chosen, rejected in self.answers.pairs.tolist():
            (lq_w, lp_w), (lq_l, lp_l) = means[chosen], means[rejected]
            total = total - torch.nn.functional.logsigmoid(beta * ((lq_w - lq_l) - (lp_w - lp_l)))
        return total


def test_golden_number() -> None:
    found = pair_losses(torch.tensor([[-1.0, -2.0]]), torch.tensor([[-0.5, -3.0]]), 0.1)
    assert found.item() == pytest.approx(0.770957, abs=1e-6)


@pytest.mark.parametrize("beta", [0.1, 3.0])
def test_value_and_gradients_are_those_of_whole_logits(beta: float) -> None:
    case = Case()
    found, right = case.loss(beta), case.plain(beta)
    assert found.item() == pytest.approx(right.item(), rel=1e-12)
    leaves = case.hidden_PH, case.weight_VH
    for gradient, expected in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(right, leaves), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-14)


def test_bfloat16_is_within_its_rounding() -> None:
    case = Case(torch.bfloat16)
    case.loss(3.0).backward()
    exact = Case()
    exact.loss(3.0).backward()
    for found, right in ((case.hidden_PH.grad, exact.hidden_PH.grad), (case.weight_VH.grad, exact.weight_VH.grad)):
        assert found is not None
        assert right is not None
        assert (found.double() - right).norm() < 0.02 * right.norm()


@pytest.mark.slow
def test_equals_trls_dpo_with_the_teacher_as_reference() -> None:
    """TRL's own loss with precomputed reference logprobs; answers of one token, whose sums are means."""
    trl = pytest.importorskip("trl")
    generator = torch.Generator().manual_seed(0)
    student, teacher = -torch.rand((6, 2), generator=generator), -torch.rand((6, 2), generator=generator)
    same = MagicMock(device=torch.device("cpu"), num_processes=1)
    same.gather_for_metrics = same.gather = lambda values: values
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=same, aux_loss_enabled=False, ld_alpha=None, beta=0.1,
        precompute_ref_logps=True, f_divergence_type="reverse_kl", loss_types=["sigmoid"], loss_weights=[1.0],
        label_smoothing=0.0, use_weighting=False,
        _metrics=defaultdict(lambda: defaultdict(list)), _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    numbers = {name: torch.ones(12, 1) for name in ("entropy", "mean_logits")} | {"is_top1": torch.ones(12, 1) > 0}
    outputs = MagicMock(log_probs=student.T.reshape(-1, 1), **numbers)
    inputs = {
        "input_ids": torch.zeros((12, 2), dtype=torch.long), "attention_mask": torch.ones((12, 2)),
        "completion_mask": torch.tensor([[0, 1]] * 12), "ref_chosen_logps": teacher[:, 0], "ref_rejected_logps": teacher[:, 1],
    }  # fmt: skip
    right = trl.DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, return_outputs=False)
    torch.testing.assert_close(pair_losses(student, teacher, 0.1).mean(), right, rtol=1e-6, atol=0)


def test_an_answer_of_which_nothing_counts_has_no_pair() -> None:
    case = Case()
    case.weights_P[case.answers.sequences_P == 3] = 0
    assert case.answers.is_counted(case.weights_P).tolist() == [False, True]
    alone = Case()
    alone.weights_P = case.weights_P
    alone.answers = Answers(case.answers.sequences_P, case.answers.pairs[1:], 5)
    assert case.loss().item() == alone.loss().item()


def test_a_pair_is_not_pulled_by_its_lengths() -> None:
    """Means, not sums: an answer said twice over is worth the same."""
    case = Case()
    twice = Answers(torch.cat([case.answers.sequences_P] * 2), case.answers.pairs, 5)
    tensors = case.target_ids_P, case.teacher_P
    weights_P = case.weights_P
    once = dpkd_loss(case.hidden_PH, case.weight_VH, *tensors, case.answers, weights_P)
    doubled = [torch.cat([tensor] * 2) for tensor in (case.hidden_PH, *tensors)]
    again = dpkd_loss(doubled[0], case.weight_VH, doubled[1], doubled[2], twice, torch.cat([weights_P] * 2))
    assert again.item() == pytest.approx(once.item(), rel=1e-12)


def test_no_pairs_and_no_positions() -> None:
    case = Case()
    case.answers = Answers(case.answers.sequences_P, torch.zeros((0, 2), dtype=torch.int64), 5)
    loss = case.loss()
    loss.backward()
    assert loss.item() == 0
    assert case.hidden_PH.grad is not None
    assert not case.hidden_PH.grad.any()
    nothing = torch.zeros(0)
    empty = Answers(nothing.long(), torch.zeros((0, 2), dtype=torch.int64), 0)
    assert dpkd_loss(case.hidden_PH[:0], case.weight_VH, nothing.long(), nothing, empty, nothing).item() == 0


def test_refusals() -> None:
    case = Case()
    with pytest.raises(LossError, match=r"beta is 0, but must be above 0"):
        case.loss(0)
    case.teacher_P = case.teacher_P[:4]
    with pytest.raises(LossError, match=r"has the shape \(4,\), but must have \(23,\)"):
        case.loss()
