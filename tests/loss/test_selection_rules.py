"""Which loss may be computed from which selection, and that the losses agree."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import kdcache.loss
from kdcache.errors import LossError
from kdcache.format.selection import SELECTION_KINDS, entries_of
from kdcache.format.soft_targets import SoftTargets
from kdcache.kernels.divergences import DIVERGENCES
from kdcache.loss.prepare import LossSettings
from kdcache.loss.selection_rules import Reading, allowed, reading_for, rules_table
from kdcache.loss.sparse_kd import sparse_kd_loss


@pytest.mark.parametrize("selection", ["top_k", "top_p_k"])
def test_exact_entries_are_enough_for_all_but_the_tails_shape(selection):
    answers = allowed(selection)
    assert set(DIVERGENCES) - set(answers) == {"tail_aware_kl"}
    assert {use for tails in answers.values() for use in tails.values()} == {"exact"}


def test_draws_alone_are_enough_for_the_forward_kl_alone():
    assert allowed("sampled") == {"forward_kl": {"drop": "unbiased"}}


@pytest.mark.parametrize("selection", ["threshold", "top_k_sampled"])
def test_an_exact_head_beside_estimates_is_enough_for_everything(selection):
    answers = allowed(selection)
    assert set(answers) == set(DIVERGENCES)
    unbiased = {(name, tail) for name, tails in answers.items() for tail, use in tails.items() if use == "unbiased"}
    assert unbiased == {("forward_kl", "drop"), ("tail_aware_kl", "bucket")}


@pytest.mark.parametrize(
    ("selection", "options", "sentence"),
    [
        ("top-k", {}, "selection is 'top-k', but must be one of 'top_k', 'top_p_k'"),
        (
            "sampled",
            {"divergence": "reverse_kl"},
            "unbiased only in a loss linear in p, and reverse_kl is not; use 'forward_kl'",
        ),
        (
            "sampled",
            {"tail": "bucket"},
            "tail 'bucket' would count the tail that they stand for once more",
        ),
        (
            "sampled",
            {"tail": "drop", "temperature": 2.0},
            "temperature is 2.0, but the sampled entries .* alone; use temperature 1.0",
        ),
        ("threshold", {"tail": "drop", "temperature": 2.0}, "use tail 'bucket', which reads the exact entries alone"),
        ("sampled", {"divergence": "tail_aware_kl"}, "selection 'sampled', which has no exact head: the shape of the tail"),
        ("top_k", {"divergence": "tail_aware_kl"}, "selection 'top_k', which has no sample of the tail: the shape of the tail"),
        ("threshold", {"divergence": "reverse_kl", "tail": "drop"}, "reverse_kl with tail 'drop' would be wrong"),
        ("threshold", {"divergence": "kl"}, "divergence is 'kl'"),
        (
            "top_k",
            {"entries": "unbiased"},
            "'top_k' has exact entries only; use 'exact'",
        ),
        ("sampled", {"entries": "exact"}, "'sampled' has estimates only; use 'unbiased'"),
        (
            "threshold",
            {"divergence": "reverse_kl", "entries": "unbiased"},
            "use entries 'exact', which leaves",
        ),
        (
            "threshold",
            {"entries": "unbiased", "tail": "bucket"},
            "would count it twice; use 'drop'",
        ),
    ],
)
def test_what_is_refused_says_why_and_what_to_do(selection, options, sentence):
    with pytest.raises(LossError, match=sentence):
        reading_for(selection, **options)


def test_at_another_temperature_the_exact_entries_of_a_random_selection_are_used():
    for divergence in ("forward_kl", "reverse_kl"):
        assert reading_for("top_k_sampled", divergence, temperature=2.0) == Reading("bucket", "exact")


@pytest.mark.parametrize(
    ("selection", "reading"),
    [
        ("top_k", Reading("bucket", "exact")),
        ("top_p_k", Reading("bucket", "exact")),
        ("sampled", Reading("drop", "unbiased")),
        ("threshold", Reading("drop", "unbiased")),
        ("top_k_sampled", Reading("drop", "unbiased")),
    ],
)
def test_the_default_is_one_bucket_for_exact_entries_and_all_entries_of_random_ones(selection, reading):
    assert reading_for(selection) == reading


@pytest.mark.parametrize("selection", SELECTION_KINDS)
def test_the_loss_takes_all_that_is_allowed_and_nothing_that_is_not(selection):
    answers, entries = allowed(selection), entries_of(selection)
    teacher = SoftTargets.of(
        torch.tensor([[1, 2, 4]]),
        torch.tensor([[0.5, 0.25, 0.1]]).log(),
        torch.tensor([0.25]),
        entries=entries,
        num_exact_P=torch.tensor([2]) if entries == "mixed" else None,
    )
    teacher = replace(teacher, target_logprobs_P=torch.tensor([-3.0]))
    target_ids = torch.tensor([5])
    for name in DIVERGENCES:
        for tail, use in answers.get(name, {}).items():
            settings = LossSettings(tail=tail, entries=use)
            assert sparse_kd_loss(
                torch.zeros(1, 6), teacher, divergence=name, settings=settings, target_ids=target_ids
            ).isfinite()
        if name not in answers:
            with pytest.raises(LossError):
                sparse_kd_loss(torch.zeros(1, 6), teacher, divergence=name, target_ids=target_ids)


def test_readme_holds_the_table_of_rules():
    assert rules_table() in Path(kdcache.loss.__file__).with_name("README.md").read_text()
