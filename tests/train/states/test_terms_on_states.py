"""The terms on states with real models: nothing to learn from oneself, what they are worth, and what they refuse."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from msgspec.structs import replace as changed
from states_cases import batch_of, info_of, set_up, states_of, tiny, value_of, with_features
from transformers.models.llama import modeling_llama

from kdcache.errors import ConfigError, LossError
from kdcache.loss.states import reference
from kdcache.train.terms.attention import AttentionTerm
from kdcache.train.terms.hidden_states import HiddenStatesTerm
from kdcache.train.terms.relations import RelationsTerm
from kdcache.train.terms.rkd import RkdTerm

ROWS = ((7, 5, 9), (12, 10))
TEACHER, STUDENT = tiny(0), tiny(1, hidden=24, heads=2, kv_heads=1)
HIDDEN = info_of("hidden", TEACHER, dtype="float32")
INNER = info_of("hidden_1", TEACHER, layer=1, dtype="float32")
HEADS = [info_of(kind, TEACHER, kind=kind, positions="all", dtype="float32") for kind in ("queries", "keys", "values")]
ATTENTION = info_of("attention", TEACHER, kind="attention", dtype="float32", top_keys=4)
POOLED = [info_of(f"pooled_{how}", TEACHER, pooling=how, dtype="float32") for how in ("mean", "last")]
NAMES = {kind: kind for kind in ("queries", "keys", "values")}

TERMS = {
    **{name: (lambda name=name: HiddenStatesTerm(feature="hidden", loss=name), [HIDDEN])
       for name in ("cosine", "mse", "relative_mse", "normalized_mse")},
    "linear": (lambda: HiddenStatesTerm(feature="hidden", projector="linear"), [HIDDEN]),
    "pairs": (lambda: HiddenStatesTerm(feature=["hidden", "hidden_1"], layer=[-1, 1], loss="mse"), [HIDDEN, INNER]),
    "pooled": (lambda: HiddenStatesTerm(feature="pooled_last", loss="mse"), POOLED),
    "relations": (lambda: RelationsTerm(**NAMES), HEADS),
    "qk": (lambda: RelationsTerm(**NAMES, relations=["qk", "vv"], heads=2), HEADS),
    "attention_kl": (lambda: AttentionTerm(feature="attention"), [ATTENTION]),
    "attention_mse": (lambda: AttentionTerm(feature="attention", loss="normalized_mse"), [ATTENTION]),
    "rkd_mean": (lambda: RkdTerm(feature="pooled_mean"), POOLED),
    "rkd_last": (lambda: RkdTerm(feature="pooled_last"), POOLED),
}  # fmt: skip


def made(name, student):
    make, infos = TERMS[name]
    return set_up(make(), student, *infos), infos


@pytest.mark.parametrize("name", TERMS)
def test_a_student_that_is_the_teacher_has_nothing_to_learn(name):
    term, infos = made(name, TEACHER)
    batch = with_features(batch_of(ROWS), TEACHER, *infos)
    value = value_of(term, TEACHER, batch)
    gradients = torch.autograd.grad(value, list(TEACHER.parameters()), allow_unused=True)
    assert float(value.detach()) == pytest.approx(0, abs=1e-6)
    assert max(float(gradient.abs().max()) for gradient in gradients if gradient is not None) < 1e-6


@pytest.mark.parametrize("name", TERMS)
def test_another_student_learns_and_is_finite(name):
    term, infos = made(name, STUDENT)
    value = value_of(term, STUDENT, with_features(batch_of(ROWS), TEACHER, *infos))
    gradients = torch.autograd.grad(value, list(STUDENT.parameters()), allow_unused=True)
    assert float(value.detach()) > 1e-3
    assert sum(float(gradient.abs().sum()) for gradient in gradients if gradient is not None) > 1e-3


@pytest.mark.parametrize("name", [name for name in TERMS if not name.startswith("rkd")])
def test_packed_documents_do_not_see_each_other(name):
    term, infos = made(name, STUDENT)
    whole = with_features(batch_of(ROWS), TEACHER, *infos)
    even = torch.ones_like(whole.weights_P)
    total = value_of(term, STUDENT, whole, even) * term.count(whole, even)
    alone, first, bounds = 0.0, 0, whole.cu_seqlens_G1.tolist()
    for row in ROWS:
        for size in row:
            one = batch_of([[size]])
            start = [bound for g, bound in enumerate(bounds[:-1]) if whole.segment_ids_BT.flatten()[bound] > 0][first]
            one.input_ids_BT[0, :size] = whole.input_ids_BT.flatten()[start : start + size]
            one = with_features(one, TEACHER, *infos)
            ones = torch.ones_like(one.weights_P)
            alone, first = alone + value_of(term, STUDENT, one, ones) * term.count(one, ones), first + 1
    torch.testing.assert_close(total, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", TERMS)
def test_a_batch_without_a_position_adds_zero_and_keeps_the_graph(name):
    term, infos = made(name, STUDENT)
    empty = with_features(batch_of([[7]]), TEACHER, *infos)
    empty = replace(
        empty,
        segment_ids_BT=torch.zeros_like(empty.segment_ids_BT),
        cu_seqlens_G1=torch.tensor([0, 24], dtype=torch.int32),
        flat_positions_P=empty.flat_positions_P[:0],
        weights_P=empty.weights_P[:0],
        features={key: found.at(torch.arange(0)) for key, found in empty.features.items()},
        num_sequences=0,
        sequence_indices_S=torch.arange(0),
    )
    total = term(states_of(STUDENT, empty, *term.needs().reads), empty, empty.weights_P)
    assert float(total.detach()) == 0
    assert float(term.count(empty, empty.weights_P)) == 0
    total.backward()
    assert all(weight.grad is not None for weight in term.parameters())


@pytest.mark.parametrize("name", TERMS)
def test_half_precision_is_near_to_float32(name):
    term, infos = made(name, STUDENT)
    batch = with_features(batch_of(ROWS), TEACHER, *infos)
    expected = float(value_of(term, STUDENT, batch).detach())
    half = tiny(1, hidden=24, heads=2, kv_heads=1).bfloat16()
    found = value_of(term, half, batch)
    assert found.dtype == torch.float32
    assert float(found.detach()) == pytest.approx(expected, rel=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        found = value_of(term, STUDENT, batch)
        gradients = torch.autograd.grad(found, list(STUDENT.parameters()), allow_unused=True)
    assert found.dtype == torch.float32
    assert float(found.detach()) == pytest.approx(expected, rel=0.05)
    assert all(gradient.isfinite().all() for gradient in gradients if gradient is not None)


@pytest.mark.parametrize("name", ["relations", "attention_kl"])
def test_heads_whose_sum_overflows_and_padding_that_is_no_number_leave_the_loss_finite(name):
    """The numbers of float16 end at 65504, which the sum of a few hundred is over; 0 times infinity is no number."""
    term, infos = made(name, STUDENT)
    batch = with_features(batch_of(ROWS), TEACHER, *infos)

    def changed_states(tensor, axis):
        wide = tensor.half() + 200
        wide.select(axis, 23)[0] = float("nan")  # the first row's last slots are padding
        return wide

    states = states_of(STUDENT, batch, *term.needs().reads)
    inner = {
        key: changed_states(found, 1)
        if isinstance(found, torch.Tensor)
        else replace(found, query_BhTd=changed_states(found.query_BhTd, 2), key_BhKd=found.key_BhKd.half())
        for key, found in states.inner.items()
    }
    assert term(replace(states, inner=inner), batch, batch.weights_P).isfinite()


def test_positions_count_by_their_weights():
    term, infos = made("mse", tiny(2))
    batch = with_features(batch_of(ROWS), TEACHER, *infos)
    student = tiny(2)
    states = states_of(student, batch, ("hidden", -1)).hidden_PH
    losses = reference.mse(states.detach().double().numpy(), batch.features["hidden"].float32().double().numpy())
    expected = (losses * batch.weights_P.numpy()).sum() / batch.weights_P.sum()
    assert float(value_of(term, student, batch).detach()) == pytest.approx(float(expected), rel=1e-5)
    every = HiddenStatesTerm(feature="hidden", loss="mse", positions="all")
    assert float(value_of(set_up(every, student, *infos), student, batch).detach()) == pytest.approx(losses.mean(), rel=1e-5)


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_vectors_of_weight_zero_are_not_compared_whatever_they_are(name):
    """As a feature at all tokens has them where nothing is supervised; both sides, and gradients."""
    term, infos = made(name, STUDENT)
    batch = with_features(batch_of(ROWS), TEACHER, *infos)
    weights = batch.weights_P.clone()
    weights[3::4] = 0
    states, found = states_of(STUDENT, batch, ("hidden", -1)), []
    for number in (0.0, float("nan")):
        student = states.inner["hidden", -1].detach().clone()
        student.flatten(0, 1)[batch.flat_positions_P[3::4]] = number
        told = batch.features["hidden"].values_FH.clone()
        told[3::4] = number
        vectors = replace(batch.features["hidden"], values_FH=told)
        inner = {("hidden", -1): student.requires_grad_()}
        total = term(replace(states, inner=inner), replace(batch, features={"hidden": vectors}), weights)
        found.append([total.detach(), *torch.autograd.grad(total, [student, *term.parameters()])])
    for pair in zip(*found, strict=True):
        torch.testing.assert_close(*pair, rtol=0, atol=0)


def test_pairs_of_layers_share_a_projector_and_are_averaged():
    term, infos = made("pairs", STUDENT)
    assert len(list(term.parameters())) == 2
    batch, values = with_features(batch_of(ROWS), TEACHER, *infos), []
    for name, layer in term.pairs:
        one = set_up(HiddenStatesTerm(feature=name, layer=layer, loss="mse"), STUDENT, *infos)
        one.map = term.map
        values.append(float(value_of(one, STUDENT, batch).detach()))
    assert float(value_of(term, STUDENT, batch).detach()) == pytest.approx(np.mean(values), rel=1e-5)


def test_a_large_feature_is_compared_block_by_block(monkeypatch):
    term, infos = made("linear", STUDENT)
    batch = with_features(batch_of(ROWS), TEACHER, *infos)
    weights = [*STUDENT.parameters(), *term.parameters()]
    whole = value_of(term, STUDENT, batch)
    expected = torch.autograd.grad(whole, weights, allow_unused=True)
    monkeypatch.setattr("kdcache.train.terms.hidden_states._MOST_ELEMENTS", 300)
    parts = value_of(term, STUDENT, batch)
    torch.testing.assert_close(parts, whole)
    for found, want in zip(torch.autograd.grad(parts, weights, allow_unused=True), expected, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-6)


def test_a_projector_starts_from_the_seed_and_learns():
    first, again = (made("linear", STUDENT)[0] for _ in range(2))
    other = set_up(HiddenStatesTerm(feature="hidden", projector="linear"), STUDENT, HIDDEN, seed=1)
    assert torch.equal(first.map.weight, again.map.weight)
    assert not torch.equal(first.map.weight, other.map.weight)
    assert {name for name, _ in first.named_parameters()} == {"map.weight", "map.bias"}
    vectors = torch.randn(5, 24)
    torch.testing.assert_close(first.map(vectors).norm(dim=1), vectors.norm(dim=1))
    batch = with_features(batch_of(ROWS), TEACHER, HIDDEN)
    optimizer, losses = torch.optim.Adam(first.parameters(), lr=0.02), []
    for _ in range(30):
        loss = value_of(first, STUDENT, batch)
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_relations_from_stored_heads_are_those_of_the_live_teacher(dtype):
    stored = [changed(info, dtype=dtype) for info in HEADS]
    term = set_up(RelationsTerm(**NAMES), STUDENT, *stored)
    exact = set_up(RelationsTerm(**NAMES), STUDENT, *HEADS)
    batch = batch_of(ROWS)
    found = value_of(term, STUDENT, with_features(batch, TEACHER, *stored))
    expected = value_of(exact, STUDENT, with_features(batch, TEACHER, *HEADS))
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel={"float16": 1e-3, "int8": 0.05}[dtype])
    own = value_of(set_up(RelationsTerm(**NAMES), TEACHER, *stored), TEACHER, with_features(batch, TEACHER, *stored))
    assert 0 <= float(own.detach()) < {"float16": 1e-6, "int8": 1e-2}[dtype] * float(expected.detach()) + 1e-7


def test_relations_are_the_definition_of_live_heads():
    batch = batch_of([[8]], length=8)
    reads = [(kind, 2) for kind in NAMES]
    heads = [states_of(model, batch, *reads) for model in (TEACHER, STUDENT)]
    total = 0.0
    for kind in NAMES:
        relations = [
            reference.relations(*[found.inner[kind, 2][0].flatten(1).detach().double().numpy()] * 2, 4) for found in heads
        ]
        total += float(reference.relation_kl(*relations).mean())
    term = set_up(RelationsTerm(**NAMES, positions="all"), STUDENT, *HEADS)
    assert float(value_of(term, STUDENT, with_features(batch, TEACHER, *HEADS)).detach()) == pytest.approx(total, rel=1e-4)


def test_attention_is_that_of_the_models_own_eager_attention():
    batch = batch_of([[8]], length=8)
    batch = with_features(batch, TEACHER, ATTENTION)
    STUDENT.config._attn_implementation = "eager"
    try:
        with torch.no_grad():
            whole = STUDENT(input_ids=batch.input_ids_BT, output_attentions=True).attentions[-1][0].double().numpy()
    finally:
        STUDENT.config._attn_implementation = "sdpa"
    vectors, total = batch.features["attention"], 0.0
    for head, told in enumerate((0, 2)):
        for token in range(8):
            kept = vectors.heads()[token, told].double().numpy()
            keys = token - vectors.distances_FH.view(8, 4, 4)[token, told].numpy()
            total += reference.attention_kl(kept[kept > 0], whole[head, token], keys[kept > 0]) / 2
    term = set_up(AttentionTerm(feature="attention", positions="all"), STUDENT, ATTENTION)
    assert term.heads == (0, 2)
    assert float(value_of(term, STUDENT, batch).detach()) == pytest.approx(total / 8, rel=1e-4)


def test_heads_of_attention_may_be_named():
    batch = with_features(batch_of(ROWS), TEACHER, ATTENTION)
    values = [
        float(value_of(set_up(AttentionTerm(feature="attention", heads=heads), STUDENT, ATTENTION), STUDENT, batch).detach())
        for heads in (None, [0, 2], [1, 3])
    ]
    assert values[0] == values[1] != values[2]


def test_rkd_chooses_the_same_anchors_of_the_same_sequences():
    term, infos = made("rkd_mean", STUDENT)
    term.max_anchors = 3
    sequences = torch.randperm(100, generator=torch.Generator().manual_seed(0))[:9]
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    first, other = term._anchors(sequences), term._anchors(sequences[order])
    assert sorted(sequences[first].tolist()) == sorted(sequences[order][other].tolist())
    term.seed = 5
    assert sorted(sequences[term._anchors(sequences)].tolist()) != sorted(sequences[first].tolist())
    value_of(term, STUDENT, with_features(batch_of(ROWS), TEACHER, *infos))
    assert set(term.measures()) == {"distance", "angle"}


def test_rkd_is_the_definition_of_live_states():
    term, infos = made("rkd_mean", STUDENT)
    batch = with_features(batch_of(ROWS), TEACHER, *infos)
    student = with_features(batch_of(ROWS), STUDENT, info_of("pooled_mean", STUDENT, pooling="mean", dtype="float32"))
    pair = [found.features["pooled_mean"].float32().double().numpy() for found in (student, batch)]
    expected = 25 * reference.rkd_distance(*pair) + 50 * reference.rkd_angle(*pair)
    assert float(value_of(term, STUDENT, batch).detach()) == pytest.approx(expected, rel=1e-5)
    assert np.isclose(float(term.count(batch, batch.weights_P)), 5)


REFUSED = {
    "a layer that was not captured": (
        partial(HiddenStatesTerm, feature="hidden_7"), [HIDDEN],
        r"reads feature 'hidden_7', which was not captured: the cache has 'hidden'; name one of these, or capture again",
    ),
    "a kind": (
        partial(AttentionTerm, feature="hidden"), [HIDDEN],
        r"needs a feature of kind 'attention', but 'hidden' is of kind 'hidden'",
    ),
    "sizes": (
        partial(HiddenStatesTerm, feature="hidden", projector="none"), [HIDDEN],
        r"projector is 'none', but the student's states have 24 numbers and feature 'hidden' has 32; use `projector: linear`",
    ),
    "a loss": (
        partial(HiddenStatesTerm, feature="hidden", loss="l1"), [HIDDEN],
        r"loss is 'l1', but must be one of 'cosine', 'mse'",
    ),
    "unlike pairs": (
        partial(HiddenStatesTerm, feature=["hidden", "hidden_1"], layer=[-1, 1]), [HIDDEN, changed(INNER, stride=2)],
        r"features 'hidden' and 'hidden_1' have other sizes or positions; give each a term of its own",
    ),
    "half a pair": (
        partial(HiddenStatesTerm, feature=["hidden", "hidden_1"]), [HIDDEN, INNER],
        r"feature names 2 of the cache's features and layer 1 of the student's layers; they are paired",
    ),
    "a layer": (
        partial(HiddenStatesTerm, feature="hidden", layer=-2), [HIDDEN],
        r"layer is -2, but must be an integer of at least -1",
    ),
    "tokens": (
        partial(RelationsTerm, queries="queries"), [changed(HEADS[0], stride=2)],
        r"but feature 'queries' does not have every token's heads; capture it with `positions: all`",
    ),
    "the teacher's heads": (
        partial(RelationsTerm, **NAMES, heads=5), HEADS,
        r"5 relation heads do not divide the teacher's width of 32 in the relation 'qq'",
    ),
    "the student's heads": (
        partial(RelationsTerm, **NAMES, heads=16), HEADS,
        r"16 relation heads do not divide the student's width of 24 in the relation 'qq'",
    ),
    "a relation": (
        partial(RelationsTerm, keys="keys", relations=["qk"]), HEADS,
        r"the relation 'qk' needs the option `queries`",
    ),
    "nothing": (RelationsTerm, HEADS, r"no relation is left to compare; name features in `queries`, `keys` or `values`"),
    "layer 0": (
        partial(RelationsTerm, **NAMES, layer=0), HEADS,
        r"layer is 0, but heads are inside the layers, which count from 1",
    ),
    "a head": (
        partial(AttentionTerm, feature="attention", heads=[0, 4]), [ATTENTION],
        r"names the teacher's head 4, but feature 'attention' has heads 0 to 3",
    ),
    "too few heads": (
        partial(AttentionTerm, feature="attention", heads=[0]), [ATTENTION],
        r"heads has 1 of the teacher's heads, but the student has 2",
    ),
    "vectors of positions": (
        partial(RkdTerm, feature="hidden"), [HIDDEN],
        r"compares sequences, but feature 'hidden' is a vector per position",
    ),
    "pooled over some positions": (
        partial(RkdTerm, feature="pooled_mean"), [changed(POOLED[0], stride=2)],
        r"but feature 'pooled_mean' is pooled over some of them; capture it without stride and max_positions",
    ),
    "hidden states pooled over some positions": (
        partial(HiddenStatesTerm, feature="pooled_mean"), [changed(POOLED[0], max_positions=2)],
        r"but feature 'pooled_mean' is pooled over some of them; capture it without stride and max_positions",
    ),
    "weights": (
        partial(RkdTerm, feature="pooled_mean", distance_weight=0, angle_weight=0), POOLED,
        r"distance_weight is 0 and angle_weight 0, but both must be at least 0, and one above",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_is_refused_in_one_sentence(what):
    make, infos, sentence = REFUSED[what]
    with pytest.raises(ConfigError, match=sentence):
        set_up(make(), STUDENT, *infos)


def test_packed_documents_that_cannot_be_kept_apart_are_refused():
    term, infos = made("relations", STUDENT)
    batch = with_features(batch_of(ROWS), TEACHER, *infos)
    few = {name: found.at(torch.arange(3, len(found))) for name, found in batch.features.items()}
    with pytest.raises(LossError, match=r"have 4 vectors for a document of 7 tokens, so packed documents cannot be kept apart"):
        value_of(term, STUDENT, replace(batch, features=few))


def test_a_mask_under_a_pooled_feature_is_refused():
    term, infos = made("rkd_mean", STUDENT)
    batch = replace(with_features(batch_of(ROWS), TEACHER, *infos), num_masked=3)
    with pytest.raises(LossError, match=r"is pooled over all supervised positions, but the loader's mask leaves out 3"):
        value_of(term, STUDENT, batch)


def test_a_batch_without_the_feature_is_refused():
    term, _ = made("mse", tiny(2))
    with pytest.raises(LossError, match=r"the batch has no feature 'hidden'; name it in `loader.features`"):
        value_of(term, tiny(2), batch_of(ROWS))


def test_an_attention_that_is_not_known_is_refused(monkeypatch):
    def twice(module, query, *others, scaling, **options):
        return modeling_llama.__dict__["before"](module, query, *others, scaling=2 * scaling, **options)

    monkeypatch.setitem(vars(modeling_llama), "before", modeling_llama.eager_attention_forward)
    monkeypatch.setattr(modeling_llama, "eager_attention_forward", twice)
    with pytest.raises(ConfigError, match=r"loss term 'attention' does not know the student's attention: .* not the softmax"):
        set_up(AttentionTerm(feature="attention"), tiny(3), ATTENTION)
