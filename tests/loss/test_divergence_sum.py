"""Several divergences in one loss: the sum of the single ones, for every entry point and backend."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kdcache.errors import LossError
from kdcache.format.soft_targets import SoftTargets
from kdcache.kernels import divergences as d
from kdcache.loss.divergence_sum import DivergenceSum, WeightedDivergence
from kdcache.loss.fused import fused_sparse_kd_loss
from kdcache.loss.prepare import LossSettings
from kdcache.loss.sparse_kd import sparse_kd_loss

V, H, P, K = 61, 8, 11, 5
RANDOM = torch.Generator().manual_seed(0)
HIDDEN_PH, WEIGHT_VH = (torch.randn(n, H, generator=RANDOM) for n in (P, V))
TARGETS_P = torch.randint(0, V, (P,), generator=RANDOM)
TARGETS_P[3] = -100
WEIGHTS_P = torch.rand(P, generator=RANDOM)
WEIGHTS_P[5] = 0.0
PER_POSITION_P = torch.rand(P, generator=RANDOM)


def teacher(num_exact: int | None = None) -> SoftTargets[torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    logprobs_PK, ids_PK = (2 * torch.randn(P, V, generator=random)).log_softmax(dim=1).topk(K, dim=1)
    num_exact_P = None if num_exact is None else torch.full((P,), num_exact)
    tail_P = 1 - logprobs_PK[:, : K if num_exact is None else num_exact].exp().sum(dim=1)
    return SoftTargets.of(
        ids_PK, logprobs_PK, tail_P, entries="exact" if num_exact is None else "mixed", num_exact_P=num_exact_P
    )


MIXTURES = {
    "one": [WeightedDivergence("forward_kl", 0.7)],
    "tails": [
        WeightedDivergence("forward_kl", 0.5, tail="drop"),
        WeightedDivergence("forward_kl", 0.25, tail="renormalize"),
        WeightedDivergence("forward_kl", 1.5, tail="uniform"),
        WeightedDivergence("reverse_kl", 2.0, tail="bucket"),
    ],
    "kinds": [WeightedDivergence(d.SkewKL(0.3)), WeightedDivergence("soft_spearman", 0.5), WeightedDivergence("hellinger")],
    "per position": [WeightedDivergence("reverse_kl", PER_POSITION_P), WeightedDivergence("forward_kl", 0.5)],
}


def single(call, part, **keywords):
    """One divergence alone, reduced to a sum over positions of weight * loss."""
    weights_P = keywords.pop("weights").double() * part.weight
    settings = LossSettings(tail=part.tail, entries=part.entries, reduction="sum", backend=keywords.pop("backend"))
    return call(divergence=part.divergence, weights=weights_P, settings=settings, **keywords)


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("entry", ["logits", "fused"])
@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("num_exact", [None, 3])
def test_a_sum_is_the_sum_of_its_parts(backend, entry, mixture, num_exact):
    hidden_PH, weight_VH = HIDDEN_PH.clone().requires_grad_(), WEIGHT_VH.clone().requires_grad_()
    here, parts = teacher(num_exact), MIXTURES[mixture]

    def call(**keywords):
        if entry == "fused":
            return fused_sparse_kd_loss(hidden_PH, weight_VH, here, target_ids=TARGETS_P, **keywords)
        return sparse_kd_loss(hidden_PH @ weight_VH.T, here, target_ids=TARGETS_P, **keywords)

    total = DivergenceSum(parts, cross_entropy=0.3)
    loss = call(divergence=total, weights=WEIGHTS_P, settings=LossSettings(reduction="sum", backend=backend))
    gradients = torch.autograd.grad(loss, (hidden_PH, weight_VH))
    singles = [single(call, part, weights=WEIGHTS_P, backend=backend) for part in parts]
    entropy = call(alpha=0.0, weights=WEIGHTS_P, settings=LossSettings(reduction="sum", backend=backend))
    expected = sum(singles) + 0.3 * entropy
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for found, wanted in zip(gradients, torch.autograd.grad(expected, (hidden_PH, weight_VH)), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert total.values is not None
    assert total.values.shape == (len(parts) + 1,)
    for value, part, alone in zip(total.values, parts, singles, strict=False):
        if isinstance(part.weight, float):
            torch.testing.assert_close(value * part.weight, alone.detach().double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(total.values[-1], entropy.detach().double(), rtol=1e-5, atol=1e-5)


def test_a_mean_divides_by_the_weights_alone():
    total = DivergenceSum([WeightedDivergence("forward_kl", 0.5), WeightedDivergence("reverse_kl", 2.0)])
    mean = fused_sparse_kd_loss(HIDDEN_PH, WEIGHT_VH, teacher(), divergence=total, weights=WEIGHTS_P)
    assert total.values is not None
    torch.testing.assert_close(mean.double(), (total.values * torch.tensor([0.5, 2.0, 0.0])).sum(), rtol=1e-5, atol=1e-6)
    whole = fused_sparse_kd_loss(
        HIDDEN_PH, WEIGHT_VH, teacher(), divergence=total, weights=WEIGHTS_P, settings=LossSettings(reduction="sum")
    )
    torch.testing.assert_close(whole / WEIGHTS_P.sum(), mean)


def test_reduction_none_gives_each_position():
    total = DivergenceSum([WeightedDivergence("forward_kl"), WeightedDivergence("reverse_kl", PER_POSITION_P)])
    losses_P = sparse_kd_loss(
        HIDDEN_PH @ WEIGHT_VH.T, teacher(), divergence=total, weights=WEIGHTS_P, settings=LossSettings(reduction="none")
    )
    assert losses_P.shape == (P,)
    assert total.values is not None
    assert total.values.shape == (3, P)
    torch.testing.assert_close(losses_P.double(), total.values[0] + total.values[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_no_position_gives_values_of_0(backend):
    total = DivergenceSum([WeightedDivergence("forward_kl"), WeightedDivergence("reverse_kl")], cross_entropy=0.1)
    ids_PK = torch.zeros(0, 3, dtype=torch.int64)
    nothing = SoftTargets.of(ids_PK, torch.zeros(0, 3), torch.zeros(0), entries="exact")
    targets_P, settings = torch.zeros(0, dtype=torch.int64), LossSettings(backend=backend)
    for student in ((HIDDEN_PH[:0], WEIGHT_VH), (HIDDEN_PH[:0] @ WEIGHT_VH.T,)):
        loss_of = fused_sparse_kd_loss if len(student) == 2 else sparse_kd_loss
        assert loss_of(*student, nothing, divergence=total, target_ids=targets_P, settings=settings) == 0
        assert total.values is not None
        assert total.values.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_each_temperature_is_a_pass_and_the_rest_is_shared(backend):
    here, random = teacher(), torch.Generator().manual_seed(1)
    log_p_PV = (2 * torch.randn(P, V, generator=random)).log_softmax(dim=1)
    here = replace(here, temperatures=(2.0,), log_z_PL=torch.logsumexp(log_p_PV / 2, dim=1)[:, None])
    parts = [
        WeightedDivergence("reverse_kl", 0.5, temperature=2.0),
        WeightedDivergence("forward_kl", PER_POSITION_P),
        WeightedDivergence("forward_kl", temperature=2.0, tail="uniform"),
    ]
    settings, total = LossSettings(reduction="sum", backend=backend), DivergenceSum(parts, cross_entropy=0.3)
    hidden_PH, weight_VH = HIDDEN_PH.clone().requires_grad_(), WEIGHT_VH.clone().requires_grad_()
    loss = fused_sparse_kd_loss(hidden_PH, weight_VH, here, divergence=total, target_ids=TARGETS_P, settings=settings)
    over_logits = DivergenceSum(parts, cross_entropy=0.3)
    again = sparse_kd_loss(hidden_PH @ weight_VH.T, here, divergence=over_logits, target_ids=TARGETS_P, settings=settings)
    alone = []
    for part in parts:
        how = LossSettings(reduction="sum", backend=backend, tail=part.tail)
        weights_P = part.weight if isinstance(part.weight, torch.Tensor) else torch.full((P,), part.weight)
        asked = {"divergence": part.divergence, "temperature": part.temperature or 1.0, "weights": weights_P, "settings": how}
        alone.append(fused_sparse_kd_loss(hidden_PH, weight_VH, here, **asked))
    alone.append(0.3 * fused_sparse_kd_loss(hidden_PH, weight_VH, here, alpha=0.0, target_ids=TARGETS_P, settings=settings))
    torch.testing.assert_close(loss, sum(alone), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(again, loss, rtol=1e-5, atol=1e-5)
    assert total.values is not None
    torch.testing.assert_close(
        (total.values * torch.tensor([0.5, 1.0, 1.0, 0.3])).sum().float(), loss.detach(), rtol=1e-5, atol=1e-5
    )
    expected = torch.autograd.grad(sum(alone), (hidden_PH, weight_VH))
    for one in (loss, again):
        for found, wanted in zip(torch.autograd.grad(one, (hidden_PH, weight_VH)), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_wrong_sums_are_refused():
    with pytest.raises(LossError, match="a DivergenceSum has no parts"):
        DivergenceSum([])
    with pytest.raises(LossError, match="must be a WeightedDivergence"):
        DivergenceSum(["forward_kl"])
    z_PV = HIDDEN_PH @ WEIGHT_VH.T
    total = DivergenceSum([WeightedDivergence("reverse_kl")])
    with pytest.raises(LossError, match=r"alpha is 0.5, but a DivergenceSum has weights of its own"):
        sparse_kd_loss(z_PV, teacher(), divergence=total, alpha=0.5, target_ids=TARGETS_P)
    with pytest.raises(LossError, match=r"settings.tail is given, but each part of a DivergenceSum has its own"):
        sparse_kd_loss(z_PV, teacher(), divergence=total, settings=LossSettings(tail="bucket"))
    with pytest.raises(LossError, match=r"cross_entropy is 0.5, which mixes in .* but target_ids is missing"):
        sparse_kd_loss(z_PV, teacher(), divergence=DivergenceSum(total.parts, 0.5))
    negative_P = PER_POSITION_P.clone()
    negative_P[2] = -1.0
    with pytest.raises(LossError, match=r"position 2 has the weight -1.0 in a DivergenceSum"):
        sparse_kd_loss(z_PV, teacher(), divergence=DivergenceSum([WeightedDivergence("forward_kl", negative_P)]))
    with pytest.raises(LossError, match=r"the weight of part 0 has the shape \(3,\), but must have \(11,\)"):
        sparse_kd_loss(z_PV, teacher(), divergence=DivergenceSum([WeightedDivergence("forward_kl", torch.ones(3))]))
    with pytest.raises(LossError, match=r"the weight of forward_kl is -1, but must be"):
        DivergenceSum([WeightedDivergence("forward_kl", -1)])
