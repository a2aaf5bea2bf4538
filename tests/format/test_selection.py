"""Selection kinds: their parameters, how many entries they make, which of them are exact."""

from __future__ import annotations

import pytest

from kdcache.config.selection import SelectionConfig
from kdcache.errors import FormatError
from kdcache.format.manifest import SelectionInfo
from kdcache.format.selection import (
    SELECTION_KINDS,
    check_selection,
    fixed_entries,
    fixed_exact,
    has_estimates,
    most_entries,
    selection_params,
    stores_num_exact,
)


def of_kind(kind: str, **params) -> SelectionInfo:
    return SelectionInfo(kind=kind, params=params)


GOOD = {
    "top_k": {"k": 5},
    "top_p_k": {"p": 0.9, "k": 5},
    "sampled": {"num_draws": 7, "seed": 0},
    "threshold": {"tau": 0.3, "seed": 0},
    "top_k_sampled": {"k": 5, "num_draws": 7, "seed": 0},
}


@pytest.mark.parametrize("kind", SELECTION_KINDS)
def test_every_kind_that_can_be_asked_for_is_known_with_its_parameters(kind):
    asked = SelectionConfig(kind=kind)
    seed = {"seed": asked.seed} if "seed" in selection_params(kind) else {}
    check_selection(of_kind(kind, **asked.params, **seed))
    check_selection(of_kind(kind, **GOOD[kind]))


@pytest.mark.parametrize(
    ("kind", "params", "sentence"),
    [
        ("top_q", {"k": 5}, "'top_q' is unknown"),
        ("top_k", {}, "has the parameters"),
        ("top_k", {"k": 5, "p": 0.5}, "has the parameters"),
        ("top_k", {"k": -1}, "k = -1"),
        ("top_k", {"k": 1.0}, "k = 1.0"),
        ("top_p_k", {"p": 1.5, "k": 5}, "p = 1.5"),
        ("top_p_k", {"p": float("nan"), "k": 5}, "p = nan"),
        ("sampled", {"num_draws": 0, "seed": 0}, "num_draws = 0"),
        ("sampled", {"num_draws": 65536, "seed": 0}, "num_draws = 65536"),
        ("threshold", {"tau": 0.0, "seed": 0}, "tau = 0.0"),
        ("threshold", {"tau": 1e-9, "seed": 0}, "tau = 1e-09"),
        ("threshold", {"tau": True, "seed": 0}, "tau = True"),
    ],
)
def test_parameters_that_mean_nothing_are_refused_by_name(kind, params, sentence):
    with pytest.raises(FormatError, match=sentence):
        check_selection(of_kind(kind, **params))


def test_a_temperature_must_be_above_zero():
    with pytest.raises(FormatError, match=r"temperature 0\.0"):
        check_selection(SelectionInfo(kind="top_k", params={"k": 5}, temperatures=(2.0, 0.0)))


@pytest.mark.parametrize(
    ("kind", "fixed", "most", "exact", "estimates"),
    [
        ("top_k", 5, 5, None, False),
        ("top_p_k", None, 5, None, False),
        ("sampled", None, 7, 0, True),
        ("threshold", None, 4, None, True),
        ("top_k_sampled", None, 12, 5, True),
    ],
)
def test_what_a_kind_says_of_its_entries(kind, fixed, most, exact, estimates):
    selection = of_kind(kind, **GOOD[kind])
    assert fixed_entries(selection) == fixed
    assert most_entries(selection, 97) == most
    assert most_entries(selection, 3) == 3
    assert fixed_exact(selection) == exact
    assert has_estimates(selection) == estimates
    assert stores_num_exact(selection) == (kind == "threshold")
