"""The term `crd`: against its definition, resumed exactly, and the same on two ranks as on one."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from msgspec.structs import replace as changed
from states_cases import batch_of, info_of, set_up, states_of, tiny, value_of, with_features
from torch.nn.functional import normalize

from kdcache.errors import ConfigError, LossError
from kdcache.format.feature_vectors import FeatureVectors
from kdcache.loss.states import reference
from kdcache.train.terms.crd import CrdTerm
from kdcache.train.terms.rkd import RkdTerm

TEACHER, STUDENT = tiny(0), tiny(1, hidden=24, heads=2, kv_heads=1)
INFO = info_of("pooled", TEACHER, pooling="mean")
DOCUMENTS = ((7, 5), (12,), (4, 6), (3, 8, 5))


def all_sequences():
    """Eight sequences, two batches of them; the bank is what a cache would give."""
    whole = with_features(batch_of(DOCUMENTS), TEACHER, INFO)
    bank = whole.features["pooled"]
    return whole, FeatureVectors(INFO, bank.values_FH.numpy(), np.arange(len(bank)))


def some(lines):
    """The batch of some packed lines of all sequences."""
    whole, _ = all_sequences()
    firsts = np.cumsum([0, *map(len, DOCUMENTS)])
    sequences = [s for line in lines for s in range(firsts[line], firsts[line + 1])]
    batch = with_features(batch_of([DOCUMENTS[line] for line in lines]), TEACHER, INFO)
    ids = torch.stack([whole.input_ids_BT[line] for line in lines])
    batch = with_features(replace(batch, input_ids_BT=ids), TEACHER, INFO)
    return replace(batch, sequence_indices_S=torch.tensor(sequences))


def crd(**options):
    return set_up(CrdTerm(feature="pooled", size=6, **options), STUDENT, INFO, pooled_features=lambda _: all_sequences()[1])


def test_crd_is_its_definition_with_the_caches_vectors():
    term, batch = crd(negatives=5), some([0, 3])
    vectors = states_of(STUDENT, batch, ("hidden", -1)).inner["hidden", -1].flatten(0, 1).detach()
    sequences = torch.bucketize(batch.flat_positions_P, batch.cu_seqlens_G1[1:].long(), right=True)
    groups = [vectors[batch.flat_positions_P[sequences == s]].mean(dim=0) for s in sequences.unique()]
    with torch.no_grad():
        students = normalize(term.embed_student(torch.stack(groups)), dim=1).double()
        teachers = normalize(term.embed_teacher(torch.from_numpy(all_sequences()[1].values_FH).float()), dim=1).double()
    bank, drawn = term.student_bank.double(), term.drawable[torch.randint(8, (5,), generator=generator())]
    own, total = batch.sequence_indices_S, np.zeros(5)
    for anchors, others in ((students, teachers), (teachers[own], bank)):
        scores = torch.cat([(anchors * others[own]).sum(1, keepdim=True), anchors @ others[drawn].T], dim=1).div(0.07).exp()
        masses = (scores / (8 * scores.mean())).numpy()
        total += reference.nce(masses[:, 0], masses[:, 1:], 8)
    assert float(value_of(term, STUDENT, batch).detach()) == pytest.approx(total.mean(), rel=1e-4)
    moved = normalize((bank[own] + students) / 2, dim=1)
    torch.testing.assert_close(term.student_bank[own].double(), moved, rtol=1e-4, atol=1e-5)
    others = [s for s in range(8) if s not in own.tolist()]
    assert torch.equal(term.student_bank[others].double(), bank[others])


def generator():
    from kdcache.train.terms.vectors import generator_for

    return generator_for(0, "crd", "negatives", 0)


def test_crd_learns_to_tell_sequences_apart():
    term, batch = crd(negatives=64), some([0, 1, 2, 3])
    optimizer, losses = torch.optim.Adam(term.parameters(), lr=0.02), []
    for _ in range(40):
        loss = value_of(term, STUDENT, batch)
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert np.mean(losses[-5:]) < 0.8 * losses[0]


@pytest.mark.parametrize("num_before", [0, 1])
def test_a_batch_without_numbers_leaves_no_trace_in_the_bank(num_before):
    """A trainer skips its step; the first batch also fixes the normalizers."""
    term, batch = crd(negatives=5), some([0, 3])
    for _ in range(num_before):
        value_of(term, STUDENT, batch)
    states = states_of(STUDENT, batch, ("hidden", -1))
    wrong = states.inner["hidden", -1].clone()
    wrong[0, 2] = float("nan")  # in the first sequence
    before, normalizers = term.student_bank.clone(), term.normalizers.clone()
    term(replace(states, inner={("hidden", -1): wrong}), batch, batch.weights_P)
    own = batch.sequence_indices_S
    assert torch.equal(term.student_bank[own[0]], before[own[0]])
    assert not any(torch.equal(term.student_bank[s], before[s]) for s in own[1:])
    assert torch.equal(term.normalizers, normalizers)
    assert value_of(term, STUDENT, batch).isfinite()


def test_crd_resumes_exactly():
    batches = [some([0, 3]), some([1, 2]), some([2, 3]), some([0])]
    term, values, states = crd(negatives=5), [], []
    for batch in batches:
        states.append({name: value.clone() for name, value in term.state_dict().items()})
        values.append(float(value_of(term, STUDENT, batch).detach()))
    assert len(set(values)) == len(values)
    for first, state in enumerate(states):
        again = crd(negatives=5)
        again.load_state_dict(state)
        assert [float(value_of(again, STUDENT, batch).detach()) for batch in batches[first:]] == values[first:]


def test_what_crd_leaves_alone():
    term, batch = crd(negatives=5), some([0, 3])
    before = term.student_bank.clone()
    term.eval()
    value_of(term, STUDENT, batch)
    assert torch.equal(term.student_bank, before)
    assert int(term.num_drawn) == 0
    names = set(term.state_dict())
    assert not any("bank" in name for name in names - {"student_bank"})
    assert {name.partition(".")[0] for name, _ in term.named_parameters()} == {"embed_student", "embed_teacher"}


def test_sequences_without_a_position_are_not_drawn():
    _, bank = all_sequences()
    values = bank.values_FH.copy()
    values[[1, 4]] = 0
    found = set_up(CrdTerm(feature="pooled", size=6), STUDENT, INFO, pooled_features=lambda _: replace(bank, values_FH=values))
    assert found.drawable.tolist() == [0, 2, 3, 5, 6, 7]
    with pytest.raises(ConfigError, match=r"contrasts sequences, but the cache has 0 with a vector"):
        set_up(CrdTerm(feature="pooled"), STUDENT, INFO, pooled_features=lambda _: replace(bank, values_FH=0 * values))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"size": 0}, "size is 0, but must be an integer of at least 1"),
        ({"negatives": 1.5}, "negatives is 1.5, but must be an integer of at least 1"),
        ({"temperature": 0}, "temperature is 0, but must be above 0"),
        ({"momentum": 1}, "momentum is 1, but must be at least 0 and below 1"),
    ],
)
def test_wrong_options_are_refused(options, sentence):
    with pytest.raises(ConfigError, match=sentence):
        CrdTerm(feature="pooled", **options)


def test_a_batch_that_does_not_tell_its_sequences_is_refused():
    with pytest.raises(LossError, match=r"the batch does not tell which sequences of the cache it has; make it with a loader"):
        value_of(crd(), STUDENT, replace(some([0]), sequence_indices_S=None))
    vectors_of_positions = partial(set_up, CrdTerm(feature="pooled"), STUDENT, changed(INFO, pooling="none"))
    with pytest.raises(ConfigError, match=r"compares sequences, but feature 'pooled' is a vector per position"):
        vectors_of_positions()


@pytest.mark.slow
def test_two_ranks_are_one_process(tmp_path):
    multiprocessing.spawn(run_rank, (str(tmp_path / "store"),), nprocs=2)


def run_rank(rank, store):
    torch.set_num_threads(1)
    expected = {name: two_steps(make(), [[0, 1, 3], [2, 3, 0]]) for name, make in TERMS.items()}
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        shares = [[[0], [2, 3]], [[1, 3], [0]]]
        for name, make in TERMS.items():
            found, wanted = two_steps(make(), shares[rank], scale=2), expected[name]
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    finally:
        dist.destroy_process_group()


TERMS = {
    "crd": partial(crd, negatives=5),
    "rkd": lambda: set_up(RkdTerm(feature="pooled", max_anchors=3), STUDENT, INFO),
}


def two_steps(term, batches, scale=1):
    """Values and gradients of two steps over all ranks, each as a mean over all ranks' sequences, and what the term keeps."""
    found = []
    for lines in batches:
        batch = some(lines)
        total = term(states_of(STUDENT, batch, *term.needs().reads), batch, batch.weights_P)
        count = term.count(batch, batch.weights_P).float()
        gradients = torch.autograd.grad(total, [STUDENT.model.norm.weight, *term.parameters()], allow_unused=True)
        sums = [total.detach(), count, *gradients]
        for value in sums if scale > 1 else ():
            dist.all_reduce(value)
        found += [value / sums[1] for value in sums if value is not None]
    return [*found, *(value.clone() for value in term.state_dict().values())]
