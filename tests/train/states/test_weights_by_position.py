"""Weights by position are refused by terms that would not read them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from states_cases import batch_of, info_of, manifest_of, setting_of, states_of, tiny, with_features

from kdcache.config.load import convert_config
from kdcache.config.train import LossConfig
from kdcache.errors import ConfigError
from kdcache.train.terms.engine import LossTerms

TEACHER = tiny(0)
POOLED = info_of("pooled", TEACHER, dtype="float32", pooling="mean")
ALL = info_of("all", TEACHER, dtype="float32", positions="all")
BY_ROLE = {"by": "role", "values": {"user": 0.0}, "otherwise": 1.0}
UNWEIGHTED = [
    ("hidden_states", {"feature": "pooled"}),
    ("hidden_states", {"feature": "all", "positions": "all"}),
    ("rkd", {"feature": "pooled"}),
]


def terms_of(term: str, options: dict[str, Any], **more: Any) -> LossTerms:
    fields = {"terms": [{"term": term, "options": options} | more, {"term": "cross_entropy", "weight": 0.0}]}
    return LossTerms(convert_config(fields, LossConfig))


def value_of(terms: LossTerms, **given: Any) -> float:
    student = tiny(1)
    batch = with_features(batch_of([[11, 9], [20]]), TEACHER, POOLED, ALL)
    terms.set_up(setting_of(student, POOLED, ALL))
    varied = {name: {"weight": torch.zeros_like(batch.weights_P)} for name in terms.names} if given.get("varied") else None
    return float(terms(states_of(student, batch, *terms.reads), batch, varied=varied).detach())


@pytest.mark.parametrize(("term", "options"), UNWEIGHTED)
def test_weights_that_a_term_would_not_read_are_refused(term: str, options: dict[str, Any]) -> None:
    terms_of(term, options).check(manifest_of(POOLED, ALL))
    with pytest.raises(ConfigError, match=f"loss term '{term}' counts sequences or all vectors alike, so per_position would"):
        terms_of(term, options, per_position=BY_ROLE).check(manifest_of(POOLED, ALL))
    with pytest.raises(ConfigError, match=f"loss term '{term}' counts .*, so a weight by position would have no effect"):
        value_of(terms_of(term, options), varied=True)
    assert value_of(terms_of(term, options)) > 0


def test_weights_that_a_term_reads_are_read() -> None:
    terms_of("hidden_states", {"feature": "all"}, per_position=BY_ROLE).check(manifest_of(POOLED, ALL))
    assert value_of(terms_of("hidden_states", {"feature": "all"}), varied=True) == 0
    assert value_of(terms_of("hidden_states", {"feature": "all"})) > 0


def test_crd_attention_and_relations_say_whether_they_read_weights() -> None:
    def reads(term: str, **options: Any) -> bool:
        (made,) = terms_of(term, options).members()
        return made.reads_weights

    assert not reads("crd", feature="pooled")
    for term, options in (("attention", {"feature": "a"}), ("relations", {"queries": "q"})):
        assert reads(term, **options)
        assert not reads(term, positions="all", **options)
