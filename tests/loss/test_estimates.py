"""Records with sampled entries, end to end: the mean over all outcomes of the draw against the dense teacher, exactly.

Every outcome is a row, its probability the row's weight: the loss of the batch is then the expectation, nothing statistical.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from loose_calls import fused_sparse_kd_loss, sparse_kd_loss
from torch import Tensor

from kdcache.errors import LossError

V, HEAD, TAU, WEIGHT = 9, 3, 0.17, 1.7
LABEL = 4
Outcome = tuple[float, list[int], list[float], int]
"""Probability, ids, values, number of exact entries."""


def teacher() -> Tensor:
    """(V,) float64, falling, three of them at least TAU."""
    return torch.tensor([0.3, 0.22, 0.18, 0.1, 0.08, 0.05, 0.04, 0.02, 0.01], dtype=torch.float64)


def student() -> Tensor:
    return torch.randn(V, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def threshold_outcomes() -> list[Outcome]:
    """Every token of TAU or more, each of the others with the probability p / TAU and then the value TAU."""
    p_V, outcomes = teacher(), []
    for kept in itertools.product([False, True], repeat=V - HEAD):
        inclusions = [p / TAU if keep else 1 - p / TAU for p, keep in zip(p_V[HEAD:].tolist(), kept, strict=True)]
        sampled = [HEAD + i for i, keep in enumerate(kept) if keep]
        values = [*p_V[:HEAD].tolist(), *[TAU] * len(sampled)]
        outcomes.append((math.prod(inclusions), [*range(HEAD), *sampled], values, HEAD))
    return outcomes


def drawn_outcomes(num_exact: int) -> list[Outcome]:
    """The first tokens exactly, and two draws with replacement of the others, each worth half of their mass; merged by id."""
    p_V, outcomes = teacher(), []
    tail_mass = p_V[num_exact:].sum().item()
    for draws in itertools.product(range(num_exact, V), repeat=2):
        probability = math.prod(p_V[i].item() / tail_mass for i in draws)
        sampled = sorted(set(draws))
        values = [*p_V[:num_exact].tolist(), *[tail_mass * draws.count(i) / 2 for i in sampled]]
        outcomes.append((probability, [*range(num_exact), *sampled], values, num_exact))
    return outcomes


def as_targets(outcomes: list[Outcome], row_weight: float = 1.0) -> dict[str, Tensor]:
    """Outcomes of one position as rows, in the columns of a loader's batch."""
    num_positions, width = len(outcomes), max(len(ids) for _, ids, _, _ in outcomes)
    ids_PK, logprobs_PK = torch.full((num_positions, width), -1), torch.full((num_positions, width), float("nan"))
    for row, (_, ids, values, _) in enumerate(outcomes):
        ids_PK[row, : len(ids)] = torch.tensor(ids)
        logprobs_PK[row, : len(ids)] = torch.tensor(values).log()
    num_exact_P = torch.tensor([exact for *_, exact in outcomes])
    return {
        "token_ids_PK": ids_PK,
        "logprobs_PK": logprobs_PK,
        "tail_mass_P": torch.tensor([1 - teacher()[:exact].sum().item() for *_, exact in outcomes]).float(),
        "num_exact_P": num_exact_P,
        "weights_P": torch.tensor([probability for probability, *_ in outcomes], dtype=torch.float64) * row_weight,
        "target_ids_P": torch.full((num_positions,), LABEL),
        "reduction": "sum",
    }


def dense(z_V: Tensor, kind: str, alpha: float, row_weight: float) -> Tensor:
    """The loss with the whole teacher at hand."""
    p_V, log_q_V = teacher(), z_V.log_softmax(dim=0)
    loss = (p_V * (p_V.log() - log_q_V)).sum()
    if kind == "tail_aware_kl":
        r, log_tail = p_V[HEAD:].sum(), log_q_V[HEAD:].logsumexp(dim=0)
        within = (p_V * ((p_V / r).log() - log_q_V + log_tail))[HEAD:].sum()
        loss = loss + (WEIGHT - 1) * within  # the chain rule: the KL is that of the buckets plus 1 x within
    return row_weight * (alpha * loss - (1 - alpha) * log_q_V[LABEL])


def options_of(kind: str, alpha: float) -> dict:
    from kdcache.kernels.divergences import TailAwareKL

    if kind == "tail_aware_kl":
        return {"divergence": TailAwareKL(WEIGHT), "alpha": alpha, "entries": "unbiased"}
    return {"alpha": alpha, "entries": "unbiased", "tail": "drop"}


CASES = [
    ("forward_kl", threshold_outcomes()),
    ("forward_kl", drawn_outcomes(HEAD)),
    ("forward_kl", drawn_outcomes(0)),
    ("tail_aware_kl", threshold_outcomes()),
    ("tail_aware_kl", drawn_outcomes(HEAD)),
]
CASE_IDS = ["kl-threshold", "kl-top_k_sampled", "kl-sampled", "tail_aware-threshold", "tail_aware-top_k_sampled"]


@pytest.mark.parametrize("backend", ["numba", "torch", "fused numba", "fused torch"])
@pytest.mark.parametrize("alpha", [1.0, 0.6])
@pytest.mark.parametrize(("kind", "outcomes"), CASES, ids=CASE_IDS)
def test_the_mean_gradient_over_all_draws_is_that_of_the_dense_teacher(kind, outcomes, alpha, backend):
    z_V, row_weight = student().requires_grad_(), 2.5
    (wanted_V,) = torch.autograd.grad(dense(z_V, kind, alpha, row_weight), z_V)
    z_PV = z_V.detach().expand(len(outcomes), V).float().requires_grad_()
    targets, options = as_targets(outcomes, row_weight), options_of(kind, alpha)
    if "fused" in backend:
        loss = fused_sparse_kd_loss(z_PV, torch.eye(V), **targets, **options, backend=backend.split()[1], chunk_positions=7)
    else:
        loss = sparse_kd_loss(z_PV, **targets, **options, backend=backend)
    gradient_V = torch.autograd.grad(loss, z_PV)[0].double().sum(dim=0)
    torch.testing.assert_close(gradient_V, wanted_V, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("kind", "outcomes"), CASES, ids=CASE_IDS)
def test_the_value_is_off_by_a_number_that_no_student_changes(kind, outcomes):
    """What the docstrings say of values: sum p log p is not linear in p."""
    offsets = []
    for z_V in (student(), 2 * student() + 1, torch.zeros(V, dtype=torch.float64)):
        z_PV = z_V.expand(len(outcomes), V)
        loss = sparse_kd_loss(z_PV, **as_targets(outcomes), **options_of(kind, 1.0), backend="torch")
        offsets.append(loss.item() - dense(z_V, kind, 1.0, 1.0).item())
    assert max(offsets) - min(offsets) < 1e-6
    assert offsets[0] > 1e-3


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_exact_targets_leave_the_estimates_out(backend):
    """Of a threshold record, a divergence that is not linear gets the head and the exact mass of all else."""
    outcomes, z_V = threshold_outcomes(), student()
    z_PV = z_V.expand(len(outcomes), V).float().requires_grad_()
    targets = as_targets(outcomes)
    loss = sparse_kd_loss(z_PV, **targets, divergence="reverse_kl", backend=backend)
    head = {name: targets[name] for name in ("tail_mass_P", "weights_P", "reduction")}
    head |= {name: targets[name][:, :HEAD] for name in ("token_ids_PK", "logprobs_PK")}
    expected = sparse_kd_loss(z_PV, **head, divergence="reverse_kl", backend=backend)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, z_PV)[0], torch.autograd.grad(expected, z_PV)[0])


def test_without_estimates_in_the_draw_the_tail_aware_loss_is_the_bucket_one():
    outcomes = [(1.0, [0, 1, 2], teacher()[:HEAD].tolist(), HEAD)]
    z_PV = student().float()[None]
    targets = as_targets(outcomes)
    loss = sparse_kd_loss(z_PV, **targets, **options_of("tail_aware_kl", 1.0))
    del targets["num_exact_P"]
    torch.testing.assert_close(loss, sparse_kd_loss(z_PV, **targets))


def test_an_id_that_was_drawn_twice_must_come_as_one_entry():
    targets = as_targets(drawn_outcomes(HEAD)[:1])
    targets["token_ids_PK"] = torch.tensor([[0, 1, 2, 3, 3]])
    targets["logprobs_PK"] = torch.tensor([[0.3, 0.22, 0.18, 0.15, 0.15]]).log()
    with pytest.raises(LossError, match="position 0 has the token id 3, twice; entries of one position must be distinct"):
        sparse_kd_loss(student().float()[None], **targets, **options_of("forward_kl", 1.0))
