"""The grammar of terms, their weights over time and positions, and what their sum is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

pytest.importorskip("transformers")

import term_cases
from adapter_cases import OPTIONS, first_batches, make_student
from contracts import terms as contract

from kdcache import extensions
from kdcache.config.load import convert_config
from kdcache.config.terms import TermConfig, Varying, WeightSchedule
from kdcache.config.train import LossConfig
from kdcache.errors import ConfigError, LossError
from kdcache.loader.cache import open_cache
from kdcache.loader.torch_batches import TorchBatch
from kdcache.train.body import hidden_states, output_projection
from kdcache.train.packed import logits_head
from kdcache.train.step import BatchLoss
from kdcache.train.terms import Term
from kdcache.train.terms.engine import LossTerms, make_term, with_needs
from kdcache.train.terms.inner import reading
from kdcache.train.terms.schedule import weight_at
from kdcache.train.terms.setting import set_up_terms
from kdcache.train.terms.varying import values_P

REVERSE = {"term": "divergence", "options": {"divergence": "reverse_kl", "tail": "bucket"}}
LABELS = {"term": "cross_entropy"}
NO_LABELS = {"term": "cross_entropy", "weight": 0}
"""Makes a list replace the short form."""

CODES = {"term": "codes", "weight": 0.5}


@pytest.fixture(autouse=True)
def codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(extensions.OWN, "losses", dict(extensions.OWN["losses"]))
    term_cases.register()


@pytest.fixture(scope="module")
def batch(small_cache: Path) -> TorchBatch:
    return first_batches(small_cache, OPTIONS, 1)[0]


def loss_config(*terms: dict[str, Any], **fields: Any) -> LossConfig:
    return convert_config(fields | ({"terms": list(terms)} if terms else {}), LossConfig)


class Evaluated:
    """A loss of the same student and batch: its value, its terms' report, its gradients by name."""

    def __init__(self, cache: Path, batch: TorchBatch, config: LossConfig, **how: Any) -> None:
        model = make_student()
        self.loss_of = BatchLoss(config, logits_head(model))
        with open_cache(cache) as opened:
            set_up_terms(self.loss_of.terms, model, [opened], seed=3)
        with reading(model, self.loss_of.terms.reads) as inner:
            hidden_BTH = hidden_states(model, batch.input_ids_BT, batch.position_ids_BT)
        loss = self.loss_of(hidden_BTH, output_projection(model), batch, dtype=torch.float32, inner=inner, **how)
        loss.backward()
        self.loss, self.report = float(loss.detach()), self.loss_of.terms.report()
        named = list(model.named_parameters())
        for name, term in zip(self.loss_of.terms.names, self.loss_of.terms.members(), strict=True):
            named += [(f"{name}.{own}", p) for own, p in term.named_parameters()]
        self.gradients = {name: p.grad for name, p in named if p.grad is not None}


def assert_sum(total: Evaluated, *parts: tuple[float, Evaluated]) -> None:
    """The loss and its gradients are those of the parts, each times a number."""
    assert total.loss == pytest.approx(sum(weight * part.loss for weight, part in parts), rel=1e-5)
    for name, gradient in total.gradients.items():
        wanted = sum(weight * part.gradients[name] for weight, part in parts if name in part.gradients)
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-7)


def test_the_list_says_what_the_short_form_says(small_cache: Path, batch: TorchBatch) -> None:
    short = Evaluated(small_cache, batch, loss_config(alpha=0.7, divergence="reverse_kl", tail="bucket"))
    terms = loss_config(REVERSE | {"weight": 0.7}, LABELS | {"weight": 0.3})
    assert_sum(Evaluated(small_cache, batch, terms), (1.0, short))
    assert short.report.keys() == {"divergence", "cross_entropy"}


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_the_ends_of_alpha_are_one_term_to_the_bit(small_cache: Path, batch: TorchBatch, alpha: float) -> None:
    short = Evaluated(small_cache, batch, loss_config(alpha=alpha, divergence="reverse_kl", tail="bucket"))
    alone = Evaluated(small_cache, batch, loss_config(REVERSE if alpha else LABELS))
    assert short.loss == alone.loss
    assert all(torch.equal(short.gradients[name], alone.gradients[name]) for name in short.gradients)


def test_a_loss_is_the_sum_of_its_terms(small_cache: Path, batch: TorchBatch) -> None:
    forward = {"term": "divergence", "options": {"tail": "bucket"}}
    named = {"forward": forward, "reverse": REVERSE, "labels": LABELS}
    alone = {name: Evaluated(small_cache, batch, loss_config(term)) for name, term in named.items()}
    codes = Evaluated(small_cache, batch, loss_config(CODES | {"weight": 1}, NO_LABELS))
    terms = [forward | {"weight": 0.5}, REVERSE | {"weight": 2}, LABELS | {"weight": 0.25}, CODES]
    total = Evaluated(small_cache, batch, loss_config(*terms))
    # Where not all terms are of targets, a position without one counts for all of them alike.
    share = float((batch.target_ids_P >= 0).float().mean())
    assert_sum(total, (0.5, alone["forward"]), (2, alone["reverse"]), (0.25 * share, alone["labels"]), (0.5, codes))
    assert total.report["divergence"] == pytest.approx(alone["forward"].loss, rel=1e-5)
    assert total.report["divergence_2"] == pytest.approx(alone["reverse"].loss, rel=1e-5)
    assert total.report["cross_entropy"] == pytest.approx(share * alone["labels"].loss, rel=1e-5)
    assert total.report["codes"] == pytest.approx(codes.loss, rel=1e-5)
    assert total.report["codes.largest"] > total.report["codes"]
    assert total.gradients["codes.projector"].abs().max() > 0


def test_a_term_of_weight_0_adds_nothing_and_is_not_made(small_cache: Path, batch: TorchBatch) -> None:
    without, weightless = (
        Evaluated(small_cache, batch, loss_config(REVERSE, *rest)) for rest in ((), (CODES | {"weight": 0},))
    )
    assert weightless.loss == without.loss
    assert weightless.gradients.keys() == without.gradients.keys()
    rising = {"schedule": "linear", "start": 0.0, "end": 1.0}
    first = Evaluated(small_cache, batch, loss_config(REVERSE, CODES | {"weight": rising}), at=(0, 10))
    assert first.loss == without.loss
    assert not first.gradients["codes.projector"].any(), "wrappers wait for it"
    assert "codes" not in first.report


def test_a_balanced_term_is_as_large_as_the_first_and_the_ratio_is_a_constant(small_cache: Path, batch: TorchBatch) -> None:
    reverse, codes = (
        Evaluated(small_cache, batch, loss_config(*terms)) for terms in ([REVERSE], [CODES | {"weight": 1}, NO_LABELS])
    )
    total = Evaluated(small_cache, batch, loss_config(REVERSE, CODES | {"balance": "equal"}))
    ratio = reverse.loss / codes.loss
    assert total.loss == pytest.approx(1.5 * reverse.loss, rel=1e-5)
    assert_sum(total, (1.0, reverse), (0.5 * ratio, codes))
    assert total.report["codes.weight"] == pytest.approx(0.5 * ratio, rel=1e-5)
    labels = Evaluated(small_cache, batch, loss_config(LABELS))
    other = Evaluated(small_cache, batch, loss_config(REVERSE, LABELS | {"balance": "equal"}))
    assert_sum(other, (1.0, reverse), (reverse.loss / labels.loss, labels))
    assert other.loss == pytest.approx(2 * reverse.loss, rel=1e-5)


def test_a_term_that_counts_sequences_is_their_mean(small_cache: Path, batch: TorchBatch) -> None:
    by_position, by_sequence = (
        Evaluated(small_cache, batch, loss_config(CODES | {"options": {"per_sequence": each}}, NO_LABELS))
        for each in (False, True)
    )
    assert by_sequence.loss == pytest.approx(by_position.loss * len(batch.flat_positions_P) / batch.num_sequences, rel=1e-5)


OURS = {
    "divergence": {"divergence": "skew_kl", "divergence_options": {"skew": 0.2}},
    "cross_entropy": {},
    "codes": {"layer": 1},
}


@pytest.mark.parametrize("promise", [*contract.PROMISES, *contract.OF_MODULES], ids=lambda promise: promise.__name__)
@pytest.mark.parametrize("name", OURS)
def test_our_terms_keep_the_promises_of_a_term(name: str, promise: Callable[[Term], None]) -> None:
    term = make_term(TermConfig(term=name, options=OURS[name]))
    term.set_up(contract.setting())
    promise(term)


STEPS = [
    ({"schedule": "linear", "start": 1.0, "end": 0.0}, [1.0, 0.75, 0.5, 0.25, 0.0]),
    ({"schedule": "warmup_stable_decay", "peak": 0.8, "warmup": 0.4, "decay": 0.4, "end": 0.2}, [0.0, 0.4, 0.8, 0.5, 0.2]),
    ({"schedule": "warmup_stable_decay", "start": 0.5, "peak": 1.0, "decay": 1.0, "end": 0.5}, [0.9, 0.8, 0.7, 0.6, 0.5]),
    ({"schedule": "warmup_stable_decay", "peak": 2.0, "warmup": 0.4, "decay": 0.4}, [0.0, 1.0, 2.0, 1.0, 0.0]),
    (2, [2.0] * 5),
]


@pytest.mark.parametrize(("weight", "expected"), STEPS)
def test_the_weight_of_each_step(weight: Any, expected: list[float]) -> None:
    asked = weight if isinstance(weight, int) else convert_config(weight, WeightSchedule)
    assert [weight_at(asked, step, 5) for step in range(5)] == pytest.approx(expected)
    assert weight_at(asked, 0, 1) >= 0, "a run of one step"


def test_numbers_go_by_what_a_position_is(batch: TorchBatch) -> None:
    roles_P = torch.tensor([0, 1, 3, 255] + [0] * (len(batch.flat_positions_P) - 4), dtype=torch.uint8)
    some = replace(batch, roles_P=roles_P)
    by_role = Varying(by="role", values={"assistant": 1.0, "system": 0.5}, otherwise=0.25)
    assert values_P(by_role, some)[:5].tolist() == [0.25, 0.5, 1.0, 0.25, 0.25]
    kept = Varying(by="kept_mass", low=(0.5, 0.0), high=(1.0, 2.0))
    wanted = ((1 - batch.teacher.tail_mass_P - 0.5) / 0.5).clamp(0, 1) * 2
    torch.testing.assert_close(values_P(kept, batch), wanted)


def test_numbers_go_by_nll_and_domain_of_a_loaders_batch(small_cache: Path) -> None:
    nll = Varying(by="nll", low=(0.0, 0.0), high=(100.0, 100.0), otherwise=7.0)
    options = msgspec.structs.replace(OPTIONS, with_target_logprobs=True, with_domains=True)
    (read,) = first_batches(small_cache, options, 1)
    assert read.domains == ("",) * read.num_sequences
    found_P, last_P = values_P(nll, read), read.target_ids_P < 0
    within_PK = read.teacher.token_ids_PK == read.target_ids_P[:, None]
    exact_P, has_P = -torch.where(within_PK, read.teacher.logprobs_PK, 0.0).sum(dim=1), within_PK.any(dim=1)
    assert has_P.any()
    torch.testing.assert_close(found_P[has_P], exact_P[has_P])
    assert (found_P[last_P] == 7.0).all()
    named = replace(read, domains=("code",) + ("wiki",) * (read.num_sequences - 1))
    by_domain = values_P(Varying(by="domain", values={"code": 2.0, "news": 9.0}, otherwise=0.5), named)
    length = int((named.segment_ids_BT[0] == 1).sum())
    assert by_domain.tolist() == [2.0] * length + [0.5] * (len(by_domain) - length)


def test_weights_by_position_are_factors(small_cache: Path, batch: TorchBatch) -> None:
    by_mass = {"by": "kept_mass", "low": [0.3, 1.0], "high": [0.9, 0.0]}
    factor_P = values_P(convert_config(by_mass, Varying), batch)
    for term, rest in ((REVERSE, []), (CODES, [NO_LABELS])):
        varying = Evaluated(small_cache, batch, loss_config(term | {"per_position": by_mass}, *rest))
        name = str(term["term"])
        given = Evaluated(small_cache, batch, loss_config(term, *rest), varied={name: {"weight": factor_P}})
        lighter = Evaluated(small_cache, replace(batch, weights_P=batch.weights_P * factor_P), loss_config(term, *rest))
        share = float(factor_P.sum() / len(factor_P))
        assert_sum(varying, (1.0, given))
        assert_sum(varying, (share, lighter))


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_weights_by_position_are_the_same_in_chunks(small_cache: Path, batch: TorchBatch, backend: str) -> None:
    by_mass = {"by": "kept_mass", "low": [0.3, 1.0], "high": [0.9, 0.0]}
    terms = [REVERSE | {"per_position": by_mass}, LABELS | {"weight": 0.5, "per_position": by_mass}]
    whole = Evaluated(small_cache, batch, loss_config(*terms, backend=backend))
    chunked = Evaluated(small_cache, batch, loss_config(*terms, backend=backend, chunk_positions=16))
    assert_sum(chunked, (1.0, whole))
    assert chunked.report == pytest.approx(whole.report, rel=1e-5)


def test_an_option_may_differ_by_position(small_cache: Path, batch: TorchBatch) -> None:
    roles_P = (torch.arange(len(batch.flat_positions_P)) % 5).to(torch.uint8)
    mixed = replace(batch, roles_P=roles_P)
    stretch = {"by": "role", "values": {"user": 2.0}, "otherwise": 0.5}
    named = Evaluated(small_cache, mixed, loss_config(CODES | {"options": {"stretch": stretch}}, NO_LABELS))
    number_P = torch.where(roles_P == 2, 2.0, 0.5)
    given = Evaluated(small_cache, mixed, loss_config(CODES, NO_LABELS), varied={"codes": {"stretch": number_P}})
    assert_sum(named, (1.0, given))
    assert named.loss != pytest.approx(Evaluated(small_cache, mixed, loss_config(CODES, NO_LABELS)).loss)


def test_an_option_of_a_divergence_may_differ_by_role(small_cache: Path, batch: TorchBatch) -> None:
    roles_P = (torch.arange(len(batch.flat_positions_P)) % 3).to(torch.uint8)
    mixed = replace(batch, roles_P=roles_P)

    def skewed(skew: Any) -> dict[str, Any]:
        return {"term": "divergence", "options": {"divergence": "skew_kl", "divergence_options": {"skew": skew}}}

    varying = Evaluated(small_cache, mixed, loss_config(skewed({"by": "role", "values": {"user": 0.2}, "otherwise": 0.7})))
    is_user_P = roles_P == 2
    parts = [
        Evaluated(small_cache, replace(mixed, weights_P=mixed.weights_P * where), loss_config(skewed(skew)))
        for skew, where in ((0.2, is_user_P), (0.7, ~is_user_P))
    ]
    share = float(is_user_P.float().mean())
    assert_sum(varying, (share, parts[0]), (1 - share, parts[1]))


def test_an_option_of_a_divergence_may_be_given_for_each_position_by_a_program(small_cache: Path, batch: TorchBatch) -> None:
    """As the skew of each answer that DistiLLM-2 has."""
    term = {"term": "divergence", "options": {"divergence": "skew_kl"}}
    skew_P = torch.linspace(0.01, 0.1, len(batch.flat_positions_P))
    given = Evaluated(small_cache, batch, loss_config(term), varied={"divergence": {"skew": skew_P}})
    ends = [
        Evaluated(
            small_cache, batch, loss_config({**term, "options": {**term["options"], "divergence_options": {"skew": s}}})
        ).loss
        for s in (0.01, 0.1)
    ]
    assert min(ends) < given.loss < max(ends)


def test_self_evolution_asks_the_loader_for_its_logprobs_and_reports_the_hard_share(small_cache: Path) -> None:
    term = {"term": "divergence", "options": {"divergence": "self_evolution", "divergence_options": {"threshold": 0.5}}}
    asked = with_needs(OPTIONS, LossTerms(loss_config(term)).needs())
    assert asked.with_target_logprobs
    batch = first_batches(small_cache, asked, 1)[0]
    found = Evaluated(small_cache, batch, loss_config(term, LABELS))
    assert 0 < found.report["divergence.hard_share"] <= 1
    everywhere = term["options"] | {"divergence_options": {"threshold": 0.0, "softness": 0.0, "max_share": 0.5}}
    hard = Evaluated(small_cache, batch, loss_config(term | {"options": everywhere}))
    has_target_P = batch.target_ids_P >= 0
    assert hard.report["divergence.hard_share"] == pytest.approx(float(has_target_P.float().mean()), abs=0.1)


def by(what: str, **more: Any) -> dict[str, Any]:
    return {"by": what} | more


WSD = {"schedule": "warmup_stable_decay", "peak": 1.0}
WRONG = [
    ({"alpha": 0.5, "terms": [REVERSE]}, "alpha is 0.5, but terms has 'divergence', which replaces it; give alpha as"),
    ({"temperature": 2.0, "terms": [LABELS]}, "temperature is 2.0, but terms has 'cross_entropy', which replaces it"),
    ({"terms": [REVERSE | {"balance": "equal"}, LABELS]}, r"terms\[0\] \(divergence\) has balance: equal, but the others"),
    ({"terms": [NO_LABELS, REVERSE | {"balance": "equal"}]}, r"terms\[1\] \(divergence\) has balance: equal, but the others"),
    (
        {"terms": [REVERSE | {"weight": {"schedule": "linear", "start": 0, "end": 1}}, CODES | {"balance": "equal"}]},
        r"terms\[0\] \(divergence\) has a weight schedule, which the term 'codes' with balance: equal would not follow; give",
    ),
    ({"terms": [{"term": "divergance"}]}, "term is 'divergance', but must be one of ours"),
    *(
        ({"terms": [REVERSE | more]}, sentence)
        for more, sentence in (
            ({"weight": -1}, r"terms\[0\]\.weight: "),
            ({"weight": {"schedule": "linear", "peak": 1}}, "peak, warmup and decay belong to"),
            ({"weight": {"schedule": "linear", "start": 1, "end": 1}}, "give a number for a constant"),
            ({"weight": {"schedule": "linear", "start": 1}}, r"\.weight: `end` is missing: a linear schedule needs both"),
            ({"weight": {"schedule": "linear"}}, "`start` and `end` are missing: a linear schedule needs both"),
            ({"weight": {"schedule": "warmup_stable_decay", "warmup": 0.1}}, "`peak` is missing: warmup_stable_decay needs"),
            ({"weight": WSD | {"warmup": 0.7, "decay": 0.6}}, "more than all steps"),
            ({"weight": {"schedul": "linear"}}, r"terms\[0\]\.weight\.schedul: no such field; did you mean"),
            ({"per_position": by("role", values={"user": 1})}, "by: role needs `values` and `otherwise`"),
            ({"per_position": by("entropy", low=[1, 1])}, "by: entropy needs `low` and `high`"),
            ({"per_position": by("entropy", low=[2, 1], high=[1, 2])}, "low is at 2, but must be below"),
            ({"per_position": by("entropy", low=[0, -1], high=[1, 2])}, "a weight must be at least 0"),
            ({"options": {"temperature": by("mood")}}, "options.temperature: Invalid enum value 'mood'"),
        )
    ),
]


@pytest.mark.parametrize(("fields", "sentence"), WRONG)
def test_wrong_grammar_is_refused_in_one_sentence(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        convert_config(fields, LossConfig)


USERS, LARGE = by("role", values={"user": 1}, otherwise=0), by("entropy", low=[0, 1], high=[1, 2])
LARGE_BETA = by("entropy", low=[0, 0.1], high=[1, 0.9])
HIDDEN = {"term": "hidden_states"}
LACKING = [
    (REVERSE | {"per_position": by("role", values={"usr": 1}, otherwise=0)}, "no role is called 'usr'; expected none, system"),
    (CODES | {"options": {"layer": USERS}}, "option 'layer' cannot differ by position; stretch"),
    (
        CODES | {"options": {"strech": 1}},
        "^loss term 'codes' has no option 'strech'; did you mean 'stretch'[?] it has layer, stretch, per_sequence$",
    ),
    (CODES | {"options": {"colour": 1}}, "^loss term 'codes' has no option 'colour'; it has layer, stretch, per_sequence$"),
    (LABELS | {"options": {"colour": 1, "mood": 2}}, "^loss term 'cross_entropy' has no option 'colour'; it has none$"),
    (HIDDEN, "^loss term 'hidden_states' needs the option 'feature'; it has feature, layer, loss, projector, positions$"),
    (HIDDEN | {"options": {"projecter": "none"}}, "has no option 'projecter'; did you mean 'projector'[?] it has feature"),
    (
        CODES | {"options": {"layer": 2}},
        "hidden states of layer 2 of the student, but the student has layers 0 to 1, and -1 after the final norm",
    ),
    ({"term": "divergence", "options": {"temperature": 2.0}}, "temperature is 2.0, but the cache was captured for 1.0"),
    (REVERSE | {"per_position": LARGE}, "goes by the teacher's entropy, which the cache lacks"),
    (REVERSE | {"per_position": by("domain", values={"wiki": 1}, otherwise=0)}, "goes by domain, but the cache's sequences"),
    (NO_LABELS, "no term with a weight above 0"),
    ({"term": "ranking", "options": {"top": 17}}, "compares the top 17 ids, but the cache keeps 16; set top to 16"),
    ({"term": "ranking", "options": {"top": 257}}, "top is 257, but may be at most 256 ids of each side; 15 is usual"),
    ({"term": "ranking", "options": {"top": 1}}, "top is 1, but must be a whole number of at least 2"),
    ({"term": "divergence", "options": {"divergence_options": {"beta": LARGE}}}, "forward_kl has no option 'beta'"),
    (
        REVERSE | {"options": {"divergence": "reverse_kl", "divergence_options": {"floor": LARGE}}},
        r"reverse_kl: floor is .* but must be in",
    ),
    (
        {"term": "divergence", "options": {"divergence": "jensen_shannon", "divergence_options": {"beta": LARGE_BETA}}},
        "divergence_options.beta goes by the teacher's entropy, which the cache lacks",
    ),
    (
        {"term": "divergence", "options": {"divergence": "jensen_shannon", "divergence_options": {"gkd_scale": LARGE_BETA}}},
        "divergence_options.gkd_scale of jensen_shannon cannot differ by position",
    ),
]


@pytest.mark.parametrize(("term", "sentence"), LACKING)
def test_what_cache_or_student_lack_is_refused_in_one_sentence(small_cache: Path, term: dict[str, Any], sentence: str) -> None:
    def begin() -> None:
        terms = BatchLoss(loss_config(term, NO_LABELS)).terms
        terms.check(cache.manifest)
        set_up_terms(terms, make_student(), [cache], seed=0)

    with open_cache(small_cache) as cache, pytest.raises((ConfigError, LossError), match=sentence):
        begin()


def test_ranking_refuses_more_ids_than_the_vocabulary_has(small_cache: Path) -> None:
    with open_cache(small_cache) as cache:
        manifest = cache.manifest
    teacher = msgspec.structs.replace(manifest.identity.teacher, vocab_size=12)
    small = msgspec.structs.replace(manifest, identity=msgspec.structs.replace(manifest.identity, teacher=teacher))
    make_term(TermConfig(term="ranking", options={"top": 12})).check(small)
    with pytest.raises(ConfigError, match="top is 13, but the teacher's vocabulary has 12 ids"):
        make_term(TermConfig(term="ranking", options={"top": 13})).check(small)


def test_ranking_is_one_minus_a_correlation_and_reports_what_is_dead(small_cache: Path, batch: TorchBatch) -> None:
    term = {"term": "ranking", "options": {"top": 4}}
    found = Evaluated(small_cache, batch, loss_config(term, NO_LABELS))
    assert 0 < found.loss < 2
    assert found.report["ranking"] == pytest.approx(found.loss, rel=1e-5)
    shares = {name: found.report[f"ranking.{name}"] for name in ("dead_share", "unknown_share", "common_share", "first_share")}
    assert all(0 <= share <= 1 for share in shares.values())
    assert shares["unknown_share"] > 0.5  # a student that has not learned anything yet
    total = Evaluated(small_cache, batch, loss_config(term, REVERSE | {"weight": 0.5}))
    assert_sum(total, (1.0, found), (0.5, Evaluated(small_cache, batch, loss_config(REVERSE))))
