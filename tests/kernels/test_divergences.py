"""The table of divergences: options, what each needs of the record, and that docs and backends have all of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import kdcache.kernels
from kdcache.errors import LossError
from kdcache.kernels import divergences as d
from kdcache.kernels.base import Objective
from kdcache.kernels.divergences import reference as reference_divergences


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (d.ReverseKL, {"floor": 0.0}),
        (d.JensenShannon, {"beta": 1.1}),
        (d.JensenShannon, {"beta": float("nan")}),
        (d.SkewKL, {"skew": 1.0}),
        (d.SkewReverseKL, {"skew": 0.0}),
        (d.SelfEvolution, {"max_share": 1.0}),
        (d.SelfEvolution, {"softness": float("inf")}),
        (d.SkewKL, {"skew": np.array([0.1, 1.5])}),
        (d.SkewKL, {"skew": "0.1"}),
        (d.JensenShannon, {"gkd_scale": np.ones(2)}),
        (d.AdaptiveKL, {"head_mass": 0.0}),
        (d.AlphaBeta, {"a": 0.0}),
        (d.AlphaBeta, {"b": -1.0}),
        (d.DecoupledTopK, {"inner_temperature": 0.0}),
        (d.TailAwareKL, {"tail_weight": -1.0}),
        (d.HingeRanking, {"margin": -1.0}),
        (d.SoftSpearman, {"strength": 0.0}),
    ],
)
def test_options_outside_their_range_are_refused_by_name(kind, options):
    with pytest.raises(LossError, match=f"{kind.name}: {next(iter(options))} is "):
        kind(**options)


def test_unknown_names_and_options_are_refused_with_the_known_ones():
    assert d.get_divergence("skew_kl", skew=0.2) == d.SkewKL(0.2)
    assert d.get_divergence(d.SkewKL(0.3)) == d.SkewKL(0.3)
    with pytest.raises(LossError, match=r"'kl', but must be one of 'forward_kl'"):
        d.get_divergence("kl")
    with pytest.raises(LossError, match=r"skew_kl has no option 'beta'; it has 'skew'"):
        d.get_divergence("skew_kl", beta=0.2)


def test_readme_holds_the_table_of_requirements():
    readme = Path(kdcache.kernels.__file__).with_name("README.md").read_text()
    assert d.requirements_table() in readme


def test_every_divergence_is_either_computed_or_refused_everywhere():
    for kind in d.DIVERGENCES.values():
        tails = [tail for tail in d.TAIL_POLICIES if tail in kind.requirements.tails]
        for tail in d.TAIL_POLICIES:
            if tail in tails:
                Objective(tail, divergence=kind())
            else:
                with pytest.raises(LossError, match=kind.name):
                    Objective(tail, divergence=kind())
        is_alone = kind in (d.TailAwareKL, d.SelfEvolution)  # these are told which entries are estimates, or the target id
        assert (kind in reference_divergences._FORMULAS) != is_alone


def test_only_divergences_linear_in_the_teacher_take_unbiased_targets():
    """Linear: the gradient of a mixture of teachers is the mixture of the gradients. Checked, not believed."""
    log_q = np.log([[0.5, 0.3, 0.2]])
    teachers = [np.array([[0.7, 0.2, 0.1]]), np.array([[0.2, 0.3, 0.5]])]
    for kind in d.DIVERGENCES.values():
        if kind not in reference_divergences._FORMULAS:
            continue

        def slope(p, kind=kind):
            h = reference_divergences.compute(kind(), np.log(p), log_q)[1]
            return h - h.sum() * np.exp(log_q)

        mixed = slope((teachers[0] + teachers[1]) / 2)
        is_linear = np.allclose(mixed, (slope(teachers[0]) + slope(teachers[1])) / 2, atol=1e-9)
        assert kind.requirements.unbiased <= is_linear, kind.name
