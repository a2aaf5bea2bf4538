"""Losses on states against their float64 definitions, their gradients, golden numbers and the code of others."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from oracle_numbers import PATH, crd_inputs, values
from torch import Tensor

from kdcache.errors import LossError
from kdcache.loss.states import reference
from kdcache.loss.states.attention import AttentionScores, TopKeys, attention_loss, attention_probabilities
from kdcache.loss.states.crd import contrast, moved, nce
from kdcache.loss.states.pooling import pooled, sequences_of_slots
from kdcache.loss.states.relations import relation_kl
from kdcache.loss.states.rkd import rkd
from kdcache.loss.states.vectors import VECTOR_LOSSES, vector_loss, zero_of

ORACLE: dict[str, dict[str, Any]] = json.loads(PATH.read_text())
HEADS, TOKENS, WIDTH = 4, 6, 3
QUERY, KEY = values(20, HEADS, TOKENS, WIDTH), values(21, 2, TOKENS, WIDTH)
SCORES = AttentionScores(scale=0.4)


def top_keys(kept: int, *, seed: int = 22, sharpness: float = 1.0) -> TopKeys:
    """A teacher's attention of its own, whole or cut to its top keys."""
    whole = attention_probabilities(sharpness * values(seed, HEADS, TOKENS, WIDTH), values(seed + 1, 2, TOKENS, WIDTH), SCORES)
    found = whole.topk(kept, dim=2)
    return TopKeys(found.values, torch.arange(TOKENS)[:, None] - found.indices, range(TOKENS))


# Vectors


@pytest.mark.parametrize("name", VECTOR_LOSSES)
def test_vector_losses_are_their_definitions_with_right_gradients(name):
    student, teacher = values(30, 5, 7), values(31, 5, 7)
    expected = getattr(reference, name)(student.numpy(), teacher.numpy())
    np.testing.assert_allclose(vector_loss(name, student, teacher).numpy(), expected, rtol=1e-12)
    assert torch.autograd.gradcheck(lambda found: vector_loss(name, found, teacher), student.clone().requires_grad_())


@pytest.mark.parametrize("name", VECTOR_LOSSES)
def test_equal_vectors_have_loss_zero_and_no_gradient(name):
    student = values(30, 5, 7).float().requires_grad_()
    loss = vector_loss(name, student, student.detach().clone()).sum()
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-6)
    assert float(student.grad.abs().max()) < 1e-6


@pytest.mark.parametrize("name", VECTOR_LOSSES)
def test_zero_vectors_are_finite(name):
    student = torch.zeros(2, 3, requires_grad=True)
    vector_loss(name, student, torch.zeros(2, 3)).sum().backward()
    assert student.grad.isfinite().all()


def test_half_precision_vectors_are_compared_in_float32():
    student, teacher = values(30, 5, 7).bfloat16(), values(31, 5, 7).half()
    found = vector_loss("mse", student, teacher)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, reference.mse(student.double().numpy(), teacher.double().numpy()), rtol=1e-5)


def test_a_zero_on_the_graph_reads_no_number():
    tensors = [torch.full((3, 4), 60000.0, dtype=torch.float16), torch.tensor(float("nan")), torch.empty(0, 4)]
    for tensor in tensors:
        tensor.requires_grad_()
    zero = zero_of(*tensors)
    assert zero.dtype == torch.float32
    assert float(zero.detach()) == 0
    zero.backward()
    assert [tensor.grad.shape for tensor in tensors] == [tensor.shape for tensor in tensors]
    assert not any(tensor.grad.any() for tensor in tensors)


def test_textbrewers_losses_of_vectors_are_ours():
    student, teacher, told = values(1, 2, 5, 7), values(2, 2, 5, 7), ORACLE["textbrewer"]
    kept = torch.tensor([1, 1, 1, 1, 1, 1, 1, 1, 0, 0]).bool()
    some = student.flatten(0, 1)[kept], teacher.flatten(0, 1)[kept]
    assert float(vector_loss("mse", *some).mean()) == pytest.approx(told["hid_mse_loss"], rel=1e-9)
    assert float(vector_loss("cosine", *some).mean()) == pytest.approx(told["cos_loss"], rel=1e-9)
    assert float(vector_loss("normalized_mse", student[:, 0], teacher[:, 0]).mean()) == pytest.approx(
        told["pkd_loss"], rel=1e-9
    )


def test_modelopts_losses_of_vectors_are_ours():
    student, teacher = (values(seed, 5, 2, 7).transpose(0, 1).flatten(0, 1) for seed in (14, 15))
    for name, theirs in {"mse": "MSELoss", "cosine": "HiddenStateCosineLoss"}.items():
        np.testing.assert_allclose(vector_loss(name, student, teacher), np.ravel(ORACLE["modelopt"][theirs]), rtol=1e-9)


# Pooling


def test_states_are_pooled_over_each_sequences_positions():
    segments = torch.tensor([[1, 1, 1, 2, 2, 0], [1, 1, 0, 0, 0, 0]], dtype=torch.int32)
    sequences = sequences_of_slots(segments)
    assert sequences.tolist() == [0, 0, 0, 1, 1, -1, 2, 2, -1, -1, -1, -1]
    assert segments.tolist() == [[1, 1, 1, 2, 2, 0], [1, 1, 0, 0, 0, 0]]
    states, positions = values(32, 12, 3), torch.tensor([0, 2, 6, 7])
    chosen = states[positions], sequences[positions], 3
    mean, last = (pooled(*chosen, name) for name in ("mean", "last"))
    torch.testing.assert_close(
        mean, torch.stack([(states[0] + states[2]) / 2, torch.zeros(3).double(), (states[6] + states[7]) / 2])
    )
    torch.testing.assert_close(last, torch.stack([states[2], torch.zeros(3).double(), states[7]]))
    assert torch.autograd.gradcheck(lambda x: pooled(x, *chosen[1:], "mean"), chosen[0].requires_grad_())
    with pytest.raises(LossError, match=r"pooling is 'max', but states are pooled by 'mean' or 'last'"):
        pooled(*chosen, "max")


# Relations


def test_relations_give_the_golden_number():
    teacher = torch.arange(24).double().sin().reshape(4, 6)
    student = torch.arange(24).double().reshape(4, 6) / 10
    found = relation_kl((student, student), (teacher, teacher), num_heads=2) / 4
    assert float(found) == pytest.approx(0.598724, abs=1e-6)


@pytest.mark.parametrize("most", [1, 24, 1 << 24])
def test_relations_are_their_definition_however_they_are_cut(most, monkeypatch):
    monkeypatch.setattr("kdcache.loss.states.relations.MOST_ELEMENTS", most)
    left, right, weights = values(33, 6, 12), values(34, 6, 12), values(35, 6).abs()
    teacher = values(36, 6, 8), values(37, 6, 8)
    kl = reference.relation_kl(*(reference.relations(x.numpy(), y.numpy(), 4) for x, y in (teacher, (left, right))))
    found = relation_kl((left, right), teacher, num_heads=4, weights_N=weights)
    assert float(found) == pytest.approx(float(kl @ weights.numpy()), rel=1e-12)
    inputs = left.requires_grad_(), right.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, y: relation_kl((x, y), teacher, num_heads=4, weights_N=weights), inputs)
    same = left.detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: relation_kl((x, x), teacher, num_heads=2), same)


def test_relations_of_one_model_with_itself_are_zero():
    left = values(33, 6, 12).float().requires_grad_()
    loss = relation_kl((left, left), (left.detach(), left.detach()), num_heads=3)
    loss.backward()
    assert float(loss.detach()) == 0
    assert float(left.grad.abs().max()) < 1e-6


def test_heads_that_do_not_divide_are_refused():
    pair = values(33, 6, 12), values(34, 6, 12)
    with pytest.raises(LossError, match=r"5 relation heads do not divide the width 12; use a divisor of both models' widths"):
        relation_kl(pair, pair, num_heads=5)
    with pytest.raises(LossError, match=r"repeat the keys of grouped-query attention"):
        relation_kl((pair[0], pair[1][:, :6]), pair, num_heads=2)


# Attention


def every_query(name: str, teacher: TopKeys, scores: AttentionScores = SCORES) -> float:
    """The mean over heads, the sum over queries, of the definition."""
    whole, total = attention_probabilities(QUERY, KEY, scores).numpy(), 0.0
    for head in range(HEADS):
        for token in range(TOKENS):
            kept = teacher.probabilities[head, token].numpy()
            keys = token - teacher.distances[head, token].numpy()
            seen = whole[head, token].copy()
            if scores.sinks is not None:  # what is lost in a sink belongs to the tail
                seen = np.append(seen, 1 - seen.sum())
            total += getattr(reference, f"attention_{name}")(kept[kept > 0], seen, keys[kept > 0])
    return total / HEADS


@pytest.mark.parametrize("kept", [1, 3, TOKENS])
@pytest.mark.parametrize("name", ["kl", "normalized_mse"])
def test_attention_losses_are_their_definitions(name, kept, monkeypatch):
    monkeypatch.setattr("kdcache.loss.states.relations.MOST_ELEMENTS", 80)
    teacher, weights = top_keys(kept), torch.ones(TOKENS)
    assert float(attention_loss(name, (QUERY, KEY), teacher, SCORES)) == pytest.approx(every_query(name, teacher), rel=1e-9)
    inputs = QUERY.clone().requires_grad_(), KEY.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda q, k: attention_loss(name, (q, k), teacher, SCORES, weights), inputs)


@pytest.mark.parametrize(
    "changes", [{"softcap": 2.0}, {"window": 3}, {"sinks": values(24, HEADS)}], ids=lambda c: next(iter(c))
)
def test_attention_is_that_of_a_layer_with_a_cap_a_window_or_sinks(changes):
    scores = AttentionScores(scale=0.4, **changes)
    raw = torch.einsum("hqd,hkd->hqk", QUERY, KEY.repeat_interleave(2, dim=0)) * 0.4
    if "softcap" in changes:
        raw = 2.0 * torch.tanh(raw / 2.0)
    queries = torch.arange(TOKENS)
    far = queries[:, None] - queries >= changes.get("window", TOKENS)
    raw = raw.masked_fill((queries > queries[:, None]) | far, -torch.inf)
    sinks = changes.get("sinks", torch.full((HEADS,), -torch.inf).double())
    expected = torch.cat([raw, sinks[:, None, None].expand(-1, TOKENS, 1)], dim=2).softmax(dim=2)[..., :TOKENS]
    torch.testing.assert_close(attention_probabilities(QUERY, KEY, scores), expected)
    kept = expected.topk(2, dim=2)
    teacher = TopKeys(kept.values, queries[:, None] - kept.indices, range(TOKENS))
    assert float(attention_loss("kl", (QUERY, KEY), teacher, scores)) == pytest.approx(0, abs=1e-12)
    other = TopKeys(teacher.probabilities * 0.7, teacher.distances, range(TOKENS))
    if "window" not in changes:
        assert float(attention_loss("kl", (QUERY, KEY), other, scores)) == pytest.approx(
            every_query("kl", other, scores), rel=1e-9
        )


@pytest.mark.parametrize("name", ["kl", "normalized_mse"])
def test_attention_of_one_model_with_itself_is_zero_from_rounded_masses_too(name):
    found = attention_probabilities(QUERY, KEY, SCORES).topk(3, dim=2)
    distances = torch.arange(TOKENS)[:, None] - found.indices
    # What is not there has mass 0, at any distance.
    distances = torch.where(found.values > 0, distances, 0).int()
    inputs = QUERY.float().requires_grad_(), KEY.float().requires_grad_()
    for masses, bound in ((found.values.float(), 1e-6), (found.values.half(), 2e-3)):
        loss = attention_loss(name, inputs, TopKeys(masses, distances, range(TOKENS)), SCORES)
        gradients = torch.autograd.grad(loss, inputs)
        assert -1e-6 < float(loss.detach()) < bound**2 + 2e-6
        assert max(float(gradient.abs().max()) for gradient in gradients) < bound


def test_attention_agrees_with_textbrewer_and_repdistiller():
    # Rows of scores of theirs are heads and batch in one; there is no mask, so the last query of a sequence sees as much.
    raw = values(3, 2, 3, 6, 6).abs(), values(4, 2, 3, 6, 6).abs()
    student, teacher = (scores.flatten(0, 2).softmax(dim=1) for scores in raw)
    entropy = float(-(teacher * teacher.log()).sum(dim=1).mean())
    found = np.mean([reference.attention_kl(t, s, np.arange(6)) for s, t in zip(student.numpy(), teacher.numpy(), strict=True)])
    assert found + entropy == pytest.approx(ORACLE["textbrewer"]["att_ce_loss"], rel=1e-9)
    maps = [values(seed, 2, 1, 4, 4).softmax(dim=-1).reshape(8, 4).numpy() for seed in (7, 8)]
    pairs = zip(*maps, strict=True)
    # Theirs is the mean over the 4 keys, ours the sum.
    found = np.mean([reference.attention_normalized_mse(t, s, np.arange(4)) / 4 for s, t in pairs])
    assert found == pytest.approx(ORACLE["repdistiller"]["attention"], rel=1e-9)


def test_attention_at_some_positions_and_under_a_mask_is_that_of_these_positions():
    teacher, some = top_keys(2), [1, 4, 5]
    weights = torch.zeros(TOKENS).double()
    weights[some] = 1.5
    expected = attention_loss("kl", (QUERY, KEY), teacher, SCORES, weights)
    part = TopKeys(teacher.probabilities[:, some], teacher.distances[:, some], some)
    torch.testing.assert_close(attention_loss("kl", (QUERY, KEY), part, SCORES, weights[some]), expected)
    sees = torch.ones(1, TOKENS, TOKENS, dtype=torch.bool).tril()
    for mask in (sees, torch.zeros(1, TOKENS, TOKENS).double().masked_fill(~sees, -torch.inf)):
        found = attention_loss("kl", (QUERY, KEY), part, AttentionScores(scale=0.4, mask=mask), weights[some])
        torch.testing.assert_close(found, expected)


def test_other_numbers_of_heads_are_refused():
    teacher = top_keys(2)
    with pytest.raises(LossError, match=r"top keys are \(4, 6, 2\).*but there are 2 heads and 6 positions"):
        attention_loss("kl", (QUERY[:2], KEY), teacher, SCORES)
    with pytest.raises(LossError, match=r"2 heads of keys do not divide 3 heads of queries"):
        attention_loss("kl", (QUERY[:3], KEY), TopKeys(teacher.probabilities[:3], teacher.distances[:3], range(TOKENS)), SCORES)
    with pytest.raises(LossError, match=r"loss of attention is 'mse', but must be one of kl, normalized_mse"):
        attention_loss("mse", (QUERY, KEY), teacher, SCORES)


# RKD


def weighted(student: Tensor, teacher: Tensor, anchors: Tensor | None = None) -> float:
    distance, angle = rkd(student, teacher, anchors)
    return 25 * float(distance) + 50 * float(angle)


def test_rkd_gives_the_golden_numbers():
    student = torch.tensor([[0.0, 0], [1, 0], [0, 2], [3, 1]])
    teacher = torch.tensor([[0.0, 0, 1], [2, 0, 0], [0, 1, 0], [1, 1, 1]])
    distance, angle = rkd(student, teacher)
    assert (float(distance), float(angle)) == pytest.approx((0.0910252, 0.0818740), abs=1e-6)
    assert weighted(student, teacher) == pytest.approx(6.3693323, abs=1e-5)


def test_rkd_is_its_definition_and_repdistillers():
    student, teacher = values(5, 9, 6), values(6, 9, 8)
    distance, angle = rkd(student, teacher)
    assert float(distance) == pytest.approx(reference.rkd_distance(student.numpy(), teacher.numpy()), rel=1e-9)
    assert float(angle) == pytest.approx(reference.rkd_angle(student.numpy(), teacher.numpy()), rel=1e-9)
    told = ORACLE["repdistiller"]
    assert float(distance) == pytest.approx(told["rkd_distance"], rel=1e-6)
    assert float(angle) == pytest.approx(told["rkd_angle"], rel=1e-6)
    assert weighted(student, teacher) == pytest.approx(told["rkd_weighted"], rel=1e-6)
    assert torch.autograd.gradcheck(lambda x: rkd(x, teacher), student.requires_grad_())


def test_rkd_does_not_see_what_leaves_relations_alone():
    student, teacher = values(5, 9, 6), values(6, 9, 8)
    rotation = torch.linalg.qr(values(40, 6, 6)).Q
    expected = rkd(student, teacher)
    for moved_student in (3 * student, student @ rotation, student + 100 * values(41, 6)):
        torch.testing.assert_close(rkd(moved_student, teacher), expected, rtol=1e-8, atol=0)
    assert weighted(student @ rotation, 5 * student) == pytest.approx(0, abs=1e-12)


def test_rkd_is_safe_between_equal_vectors():
    student = values(5, 9, 6).float()
    student[3], student[7] = student[0], student[0]
    teacher = values(6, 9, 8).float()
    teacher[4] = teacher[1]
    student.requires_grad_()
    found = rkd(student, teacher)
    for value, name in zip(found, ("rkd_distance", "rkd_angle"), strict=True):
        expected = getattr(reference, name)(student.detach().double().numpy(), teacher.double().numpy())
        assert float(value.detach()) == pytest.approx(expected, rel=1e-6)
    sum(found).backward()
    assert student.grad.isfinite().all()
    assert float(student.grad.abs().max()) < 1
    for few in (student[:1], student[:0]):
        assert [float(value) for value in rkd(few.detach(), few.detach())] == [0, 0]
    same = torch.ones(3, 2, requires_grad=True)
    sum(rkd(same, same.detach())).backward()
    assert float(same.grad.abs().max()) == 0


def test_rkd_survives_a_large_common_part():
    student, teacher = values(5, 9, 6), values(6, 9, 8)
    far = (student + 300).float(), (teacher + 300).float()
    expected = [getattr(reference, name)(*(x.double().numpy() for x in far)) for name in ("rkd_distance", "rkd_angle")]
    assert [float(value) for value in rkd(*far)] == pytest.approx(expected, rel=1e-6)


def test_rkd_at_some_anchors_is_the_mean_over_them():
    student, teacher = values(5, 9, 6), values(6, 9, 8)
    singles = [float(rkd(student, teacher, torch.tensor([i]))[1]) for i in range(9)]
    assert float(rkd(student, teacher, torch.tensor([2, 5]))[1]) == pytest.approx(np.mean([singles[2], singles[5]]), rel=1e-12)
    assert np.mean(singles) == pytest.approx(float(rkd(student, teacher)[1]), rel=1e-12)


# CRD


def test_crd_is_its_definition():
    scores, normalizer = values(50, 4, 6).exp(), 3.0
    expected = reference.nce((scores[:, 0] / 3).numpy(), (scores[:, 1:] / 3).numpy(), 20)
    np.testing.assert_allclose(nce(scores, normalizer, 20), expected, rtol=1e-9)
    assert torch.autograd.gradcheck(lambda x: nce(x, normalizer, 20), scores.requires_grad_())


def test_crd_is_repdistillers_over_two_steps():
    inputs, told = crd_inputs(), ORACLE["repdistiller"]
    student_bank, teacher_bank = (
        torch.nn.functional.normalize(inputs[f"{side}_bank"], dim=1) for side in ("student", "teacher")
    )
    normalizers: list[float] = []
    for step in range(2):
        student, teacher = (torch.nn.functional.normalize(inputs[name][step], dim=1) for name in ("students", "teachers"))
        sequences, drawn = inputs["sequences"][step], inputs["indices"][step]
        scores = [
            contrast(anchors, bank[sequences], bank[drawn])
            for anchors, bank in ((student, teacher_bank), (teacher, student_bank))
        ]
        normalizers = normalizers or [float(found.mean()) * 11 for found in scores]
        losses = [float(nce(found, z, 11).mean()) for found, z in zip(scores, normalizers, strict=True)]
        assert losses == pytest.approx(told["crd_losses"][step], rel=1e-6)
        student_bank[sequences] = moved(student_bank[sequences], student)
        teacher_bank[sequences] = moved(teacher_bank[sequences], teacher)
    assert normalizers == pytest.approx(told["crd_normalizers"], rel=1e-6)
    np.testing.assert_allclose(student_bank, told["crd_student_bank"], rtol=1e-6)
    np.testing.assert_allclose(teacher_bank, told["crd_teacher_bank"], rtol=1e-6)


def test_crd_with_the_whole_bank_orders_as_the_softmax_does():
    bank, student = (
        torch.nn.functional.normalize(values(seed, *shape), dim=1) for seed, shape in ((51, (40, 8)), (52, (1, 8)))
    )
    losses, info_nce = [], []
    for positive in range(40):
        scores = contrast(student, bank[positive][None], bank)
        losses.append(float(nce(scores, float(scores[:, 1:].sum()), 40)))
        info_nce.append(float(-(scores[0, 0] / scores[0, 1:].sum()).log()))
    assert np.argsort(losses).tolist() == np.argsort(info_nce).tolist()
