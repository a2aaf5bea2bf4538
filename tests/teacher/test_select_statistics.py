"""What random selections promise of many draws: no bias, masses, sizes, and a variance that pays for itself.

Shape letters: R repetitions, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

torch = pytest.importorskip("torch")

from selection_cases import BACKENDS, of_kind, select  # noqa: E402

from kdcache.format.record import Distributions  # noqa: E402

R, V = 6000, 60
LOGITS_V = torch.linspace(3.0, -6.0, V)[torch.randperm(V, generator=torch.Generator().manual_seed(1))]
P_V = LOGITS_V.double().softmax(dim=-1).numpy()
MAX_Z = 4.5
"""Of 60 tokens, three kinds and two backends the largest |z| of unbiased draws is below this in 998 of 1000 worlds."""


def repeat(kind: str, backend: str, **params: float) -> Distributions:
    """The same distribution at R positions, each with draws of its own."""
    return select(LOGITS_V.expand(R, -1).contiguous(), of_kind(kind, **params), backend)


def estimates(record: Distributions) -> NDArray[np.float64]:
    """(R, V) what the entries stand for; 0 where there is none."""
    dense_RV = np.zeros((R, V))
    rows_E = np.repeat(np.arange(R), record.num_entries_P)
    dense_RV[rows_E, record.token_ids_E] = np.exp(record.logprobs_E.astype(np.float64))
    return dense_RV


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("kind", "params"),
    [
        ("sampled", {"num_draws": 12}),
        ("threshold", {"tau": 0.06}),
        ("threshold", {"tau": 0.3}),
        ("top_k_sampled", {"k": 3, "num_draws": 5}),
    ],
    ids=str,
)
def test_every_tokens_estimate_is_unbiased(kind: str, params: dict[str, float], backend: str):
    record = repeat(kind, backend, **params)
    dense_RV = estimates(record)
    exact_ids = set(record.token_ids_E[record.is_exact_E].tolist())
    rest = 1.0 if kind == "sampled" else float(record.tail_mass_P[0])
    unit = params["tau"] if kind == "threshold" else rest / params["num_draws"]
    num_tested = 0
    for token, p in enumerate(P_V):
        if token in exact_ids:
            np.testing.assert_allclose(dense_RV[:, token], p, rtol=1e-5)
        elif p * R / unit > 30:  # kept often enough for the mean to be normal
            # The variance that the kind's formula says, not the one that was found: a token that never came would have none.
            variance = p * (unit - p) if kind == "threshold" else unit * p * (1 - p / rest)
            z = (dense_RV[:, token].mean() - p) / np.sqrt(variance / R)
            assert abs(z) < MAX_Z, (token, p, z)
            assert dense_RV[:, token].var() == pytest.approx(variance, rel=0.5)
            num_tested += 1
    assert num_tested >= 20
    # The others together: their number of hits is Poisson's, or less varied.
    rare_V = (P_V * R / unit <= 30) & ~np.isin(np.arange(V), list(exact_ids))
    hits, expected = dense_RV[:, rare_V].sum() / unit, P_V[rare_V].sum() * R / unit
    assert abs(hits - expected) < MAX_Z * np.sqrt(expected) + 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_draws_of_different_positions_do_not_go_together(backend: str):
    dense_RV = estimates(repeat("threshold", backend, tau=0.1))
    varying = dense_RV[:, (dense_RV > 0).mean(axis=0) < 0.99]
    varying = varying[:, (varying > 0).sum(axis=0) > 30]
    before, after = varying[:-1], varying[1:]
    correlation = [np.corrcoef(before[:, i], after[:, i])[0, 1] for i in range(varying.shape[1])]
    assert np.abs(correlation).max() * np.sqrt(R) < MAX_Z


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tau", [0.3, 0.06, 0.011])
def test_a_threshold_record_has_mass_within_tau_of_1_and_at_most_one_entry_per_tau_and_one(tau: float, backend: str):
    record = repeat("threshold", backend, tau=tau)
    mass_R = estimates(record).sum(axis=-1)
    assert np.abs(mass_R - 1).max() < tau
    assert mass_R.mean() == pytest.approx(1.0, abs=4.5 * tau / np.sqrt(R))
    assert record.num_entries_P.max() <= int(1 / tau) + 1
    # The number of entries is that of the exact ones and the tail's mass over tau, rounded up or down.
    expected = record.num_exact_P + record.tail_mass_P / tau  # type: ignore[operator]
    assert np.abs(record.num_entries_P - expected).max() < 1 + 1e-3
    estimated_E = record.logprobs_E[~record.is_exact_E]
    np.testing.assert_allclose(estimated_E, np.log(tau), rtol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_draws_with_replacement_have_exactly_the_mass_that_they_share(backend: str):
    sampled = repeat("sampled", backend, num_draws=9)
    np.testing.assert_allclose(estimates(sampled).sum(axis=-1), 1.0, atol=1e-6)
    assert (sampled.tail_mass_P == 1.0).all()
    assert sampled.num_entries_P.max() <= 9
    headed = repeat("top_k_sampled", backend, k=4, num_draws=7)
    np.testing.assert_allclose(estimates(headed).sum(axis=-1), 1.0, atol=2e-6)
    assert headed.num_entries_P.max() <= 11
    assert (headed.num_exact_P == 4).all()


def test_at_equal_entries_a_threshold_varies_less_than_draws_with_replacement():
    threshold = repeat("threshold", "numba", tau=0.03)
    sampled = repeat("sampled", "numba", num_draws=52)
    entries, sampled_entries = threshold.num_entries_P.mean(), sampled.num_entries_P.mean()
    assert sampled_entries >= entries  # the draws have the advantage
    variance, sampled_variance = (((estimates(r) - P_V) ** 2).sum(axis=-1).mean() for r in (threshold, sampled))
    print(f"{entries:.1f} entries: variance {variance:.2e}; {sampled_entries:.1f} drawn ones: {sampled_variance:.2e}")
    assert variance < sampled_variance / 2
