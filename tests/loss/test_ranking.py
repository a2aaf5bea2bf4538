"""The ranking loss over the union of both tops: its definition, its limits, what it counts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from kdcache.errors import LossError
from kdcache.format.soft_targets import SoftTargets
from kdcache.kernels.divergences._torch_support import soft_ranks
from kdcache.loss.chunks import Head
from kdcache.loss.fused import Projection
from kdcache.loss.ranking import RankingMeasures, ranking_loss
from kdcache.loss.ranking_reference import ranking_loss_and_gradient

P, V, H = 12, 40, 6
ORACLE = json.loads((Path(__file__).parent / "oracles" / "soft_ranks.json").read_text())


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def soft_targets(log_p_PV: torch.Tensor, num_entries: int, *, shuffled: bool = False) -> SoftTargets[torch.Tensor]:
    logprobs_PK, ids_PK = log_p_PV.topk(num_entries, dim=1)
    if shuffled:
        order_K = torch.randperm(num_entries, generator=torch.Generator().manual_seed(3))
        logprobs_PK, ids_PK = logprobs_PK[:, order_K], ids_PK[:, order_K]
    tail_P = (1 - logprobs_PK.exp().sum(dim=1)).clamp_min(0)
    return SoftTargets.of(ids_PK, logprobs_PK.float(), tail_P.float(), entries="exact")


def by_definition(z_PV: torch.Tensor, teacher: SoftTargets[torch.Tensor], top: int, strength: float):
    entries = [
        dict(zip(ids, logprobs, strict=True))
        for ids, logprobs in zip(teacher.token_ids_PK.tolist(), teacher.logprobs_PK.double().tolist(), strict=True)
    ]
    tail_P = teacher.tail_mass_P.double().numpy()
    return ranking_loss_and_gradient(z_PV.detach().numpy(), entries, tail_P, top=top, strength=strength)


@pytest.mark.parametrize("strength", [0.1, 1.0, 5.0])
@pytest.mark.parametrize(("num_entries", "top"), [(8, 5), (5, 5), (V, 6), (V, V), (3, 7)])
def test_it_is_the_definition_with_its_gradient(num_entries, top, strength):
    """Also at K = V, where nothing is unknown: the definition is dense there."""
    teacher = soft_targets(draw(P, V, scale=2.0).log_softmax(dim=1), num_entries, shuffled=True)
    hidden_PH, weight_VH = draw(P, H, seed=1).requires_grad_(), draw(V, H, seed=2).requires_grad_()
    weights_P = torch.linspace(0.5, 2, P, dtype=torch.float64)
    projection = Projection(weight_VH, chunk_positions=5)
    loss = ranking_loss(hidden_PH, projection, teacher, top=top, strength=strength, weights=weights_P, reduction="sum")
    losses_P, slopes_PV = by_definition(hidden_PH @ weight_VH.T, teacher, top, strength)
    assert loss.item() == pytest.approx((losses_P * weights_P.numpy()).sum(), rel=1e-10)
    slopes_PV = torch.tensor(slopes_PV) * weights_P[:, None]
    expected = slopes_PV @ weight_VH.detach(), slopes_PV.T @ hidden_PH.detach()
    for found, wanted in zip(torch.autograd.grad(loss, (hidden_PH, weight_VH)), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)


def test_the_gradient_is_the_derivative():
    teacher = soft_targets(draw(P, V, scale=2.0).log_softmax(dim=1), 9)
    hidden_PH, weight_VH = draw(P, H, seed=1).requires_grad_(), draw(V, H, seed=2)
    (slope_PH,) = torch.autograd.grad(ranking_loss(hidden_PH, weight_VH, teacher, top=6), hidden_PH)
    direction_PH = draw(P, H, seed=5)
    with torch.no_grad():
        up, down = (ranking_loss(hidden_PH + s * 1e-6 * direction_PH, weight_VH, teacher, top=6) for s in (1, -1))
    assert (slope_PH * direction_PH).sum().item() == pytest.approx(((up - down) / 2e-6).item(), rel=1e-5)


@pytest.mark.parametrize("case", ORACLE, ids=lambda case: case["name"])
def test_soft_ranks_are_those_of_the_oracle(case):
    """Made by tests/loss/oracles/make_soft_ranks.py; also the derivative of sum(upstream * ranks)."""
    values_PK = torch.tensor([case["values"]], dtype=torch.float64, requires_grad=True)
    ranks_PK, _ = soft_ranks(values_PK / case["strength"], torch.ones_like(values_PK, dtype=torch.bool))
    np.testing.assert_allclose(ranks_PK[0].detach(), case["ranks"], atol=2e-6)
    if any(abs(gap - case["strength"]) < 1e-9 for gap in np.diff(sorted(case["values"]))):
        return  # a kink, where any slope between two is one
    upstream_PK = torch.tensor([case["upstream"]], dtype=torch.float64)
    (slope_PK,) = torch.autograd.grad((ranks_PK * upstream_PK).sum(), values_PK)
    np.testing.assert_allclose(slope_PK[0], case["slope"], atol=2e-6)


def test_the_golden_numbers():
    student, teacher = torch.tensor([[2.9, 0.1, 1.2, 1.0, -3.0]]), torch.tensor([[1.0, 0.5, 2.0, 0.4, 0.0]])
    everything = torch.ones(1, 5, dtype=torch.bool)
    np.testing.assert_allclose(soft_ranks(student, everything)[0][0], [5, 2.3333, 3.4333, 3.2333, 1], atol=1e-4)
    np.testing.assert_allclose(soft_ranks(teacher, everything)[0][0], [3.22, 2.72, 4.22, 2.62, 2.22], atol=1e-4)
    log_p_PV = teacher.log_softmax(dim=1)
    whole = SoftTargets.of(torch.arange(5)[None], log_p_PV, torch.zeros(1), entries="exact")
    loss = ranking_loss(student, torch.eye(5), whole, top=5)
    assert loss.item() == pytest.approx(0.420855, abs=1e-5)


def test_towards_strength_0_it_is_spearmans_correlation():
    log_p_PV, z_PV = draw(P, 9).log_softmax(dim=1), draw(P, 9, seed=1)
    losses = [
        ranking_loss(
            z_PV[i : i + 1], torch.eye(9, dtype=torch.float64), soft_targets(log_p_PV[i : i + 1], 9), top=9, strength=1e-7
        )
        for i in range(P)
    ]
    ranks = [values_PV.argsort(dim=1).argsort(dim=1).double() for values_PV in (log_p_PV, z_PV)]
    expected = [1 - torch.corrcoef(torch.stack(pair))[0, 1].item() for pair in zip(*ranks, strict=True)]
    np.testing.assert_allclose(torch.stack(losses), expected, atol=1e-6)


def test_the_order_of_entries_does_not_matter():
    log_p_PV = draw(P, V, scale=2.0).log_softmax(dim=1)
    hidden_PH, weight_VH = draw(P, H, seed=1), draw(V, H, seed=2)
    one, other = (ranking_loss(hidden_PH, weight_VH, soft_targets(log_p_PV, 8, shuffled=s), top=5) for s in (False, True))
    assert one.item() == pytest.approx(other.item(), rel=1e-12)


def test_an_id_in_both_tops_is_ranked_once_and_what_is_watched_is_counted():
    """Teacher's top 3: 0, 1, 2 of the entries 0..3. Student: the same at position 0; 0, 5, 3 at 1; position 2 has weight 0."""
    log_p_PV = torch.tensor([[5.0, 4, 3, 2, 1, 0]] * 3).log_softmax(dim=1)
    z_PV = torch.tensor([[50.0, 40, 30, 0, 0, 0], [3.0, -10, -10, 2.5, -10, 2.9], [0.0, 1, 2, 3, 4, 5]])
    measures, weights_P = RankingMeasures(), torch.tensor([1.0, 2.0, 0.0])
    ranking_loss(z_PV, torch.eye(6), soft_targets(log_p_PV, 4), top=3, weights=weights_P, measures=measures)
    assert float(measures.num_positions) == 2
    assert float(measures.num_ids) == 3 + 5
    assert float(measures.num_common) == 3 + 1
    assert float(measures.num_unknown) == 1
    assert float(measures.num_first) == 2
    assert float(measures.num_dead) == 3


def test_equal_logits_give_1_without_a_gradient_and_a_teacher_without_an_order_0():
    hidden_PH, weight_VH = torch.zeros(2, 3, requires_grad=True), torch.ones(7, 3)
    loss = ranking_loss(hidden_PH, weight_VH, soft_targets(draw(2, 7).log_softmax(dim=1), 7), top=7)
    assert loss.item() == 1.0
    assert not torch.autograd.grad(loss, hidden_PH)[0].any()
    even = SoftTargets.of(torch.arange(7).expand(2, 7), torch.full((2, 7), -float(np.log(7))), torch.zeros(2), entries="exact")
    loss = ranking_loss(draw(2, 3).float(), draw(7, 3).float(), even, top=7)
    assert loss.item() == 0.0


def test_estimates_are_not_read_and_positions_of_weight_0_neither():
    log_p_PV = draw(P, V, scale=2.0).log_softmax(dim=1)
    hidden_PH, weight_VH = draw(P, H, seed=1), draw(V, H, seed=2)
    exact = soft_targets(log_p_PV, 5)
    estimates_PK = torch.full((P, 2), -3.0)
    ids_PK = torch.cat([exact.token_ids_PK, log_p_PV.topk(7, dim=1).indices[:, 5:]], dim=1)
    mixed = SoftTargets.of(
        ids_PK, torch.cat([exact.logprobs_PK, estimates_PK], dim=1), exact.tail_mass_P, entries="mixed",
        num_exact_P=torch.full((P,), 5),
    )  # fmt: skip
    assert ranking_loss(hidden_PH, weight_VH, mixed, top=5) == ranking_loss(hidden_PH, weight_VH, exact, top=5)
    weights_P = torch.ones(P)
    weights_P[4] = 0
    spoiled_PH = hidden_PH.clone()
    spoiled_PH[4] = torch.nan
    one, other = (ranking_loss(h, weight_VH, exact, top=5, weights=weights_P) for h in (hidden_PH, spoiled_PH))
    assert one == other
    assert ranking_loss(spoiled_PH, weight_VH, exact, top=5).isnan()


def test_scale_cap_and_padding_of_the_head_count():
    teacher = soft_targets(draw(P, 30, scale=2.0).log_softmax(dim=1), 8)
    hidden_PH, weight_VH = draw(P, H, seed=1), draw(V, H, seed=2)
    head = Head(logit_scale=0.5, softcap=2.0, vocab_size=30)
    found = ranking_loss(hidden_PH, Projection(weight_VH, head=head), teacher, top=5)
    z_PV = 2.0 * torch.tanh(0.5 * (hidden_PH @ weight_VH[:30].T) / 2.0)
    expected = ranking_loss(z_PV, torch.eye(30, dtype=torch.float64), teacher, top=5)
    assert found.item() == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"top": 0}, "top is 0 and strength 1.0, but both must be above 0"),
        ({"strength": 0.0}, "top is 15 and strength 0.0"),
        ({"reduction": "none"}, "reduction is 'none', but must be 'mean' or 'sum'"),
    ],
)
def test_wrong_arguments_are_refused(options, sentence):
    teacher = soft_targets(draw(P, V).log_softmax(dim=1), 5)
    with pytest.raises(LossError, match=sentence):
        ranking_loss(draw(P, H), draw(V, H), teacher, **options)


def test_draws_alone_are_refused():
    drawn = SoftTargets.of(torch.tensor([[1, 2]]), torch.tensor([[-1.0, -1.0]]), torch.zeros(1), entries="unbiased")
    with pytest.raises(LossError, match="the entries are unbiased estimates, which are in no order"):
        ranking_loss(draw(1, H), draw(V, H), drawn)
