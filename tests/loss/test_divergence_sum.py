"""Several divergences in one loss: the sum of the single ones, for every entry point and backend."""

from __future__ import annotations

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


def test_wrong_sums_are_refused():
    with pytest.raises(LossError, match="a DivergenceSum has no parts"):
        DivergenceSum([])
    with pytest.raises(LossError, match="must be a WeightedDivergence"):
        DivergenceSum(["forward_kl"])
