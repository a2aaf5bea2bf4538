"""What every term of a loss promises (see kdcache/train/terms/base.py): one function per promise, run for each term.

The promises on sums are those of terms that count positions; of one that counts something else, its own tests say what the sum
over a batch has to do with that over its parts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kdcache.format.feature_vectors import FeatureVectors
from kdcache.format.soft_targets import SoftTargets
from kdcache.loader.torch_batches import TorchBatch
from kdcache.loss.fused import Projection
from kdcache.train.terms import Setting, StudentStates, Term

VOCAB_SIZE, HIDDEN, NUM_POSITIONS, NUM_LAYERS = 23, 6, 9, 2
SLOTS = 12
POSITIONS = (0, 1, 2, 4, 5, 6, 8, 9, 10)
"""Of one row of twelve slots that hold two sequences, nine are supervised."""

SumOfLosses = Callable[[StudentStates, Any, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Given:
    """What a term is called with."""

    student: StudentStates
    batch: TorchBatch
    weights_P: torch.Tensor

    def take(self, start: int, stop: int) -> Given:
        """Some of the positions of the same rows."""
        flat_P, teacher = self.batch.flat_positions_P[start:stop], self.batch.teacher.slice(start, stop)
        batch = replace(self.batch, flat_positions_P=flat_P, teacher=teacher, weights_P=self.batch.weights_P[start:stop])
        if batch.features is not None:
            batch = replace(batch, features={name: _at(vectors, flat_P) for name, vectors in batch.features.items()})
        student = replace(self.student, hidden_PH=self.student.hidden_PH[start:stop], flat_positions_P=flat_P)
        return Given(student, batch, self.weights_P[start:stop])

    def with_hidden(self, hidden_PH: Tensor) -> Given:
        return replace(self, student=replace(self.student, hidden_PH=hidden_PH))


def _at(vectors: FeatureVectors[Tensor], flat_P: Tensor) -> FeatureVectors[Tensor]:
    return vectors.at(torch.isin(vectors.slots_F, flat_P))


def given(seed: int = 0, features: dict[str, FeatureVectors[Tensor]] | None = None) -> Given:
    """Random states of a student of two layers, and the exact top 4 of a random teacher."""
    random = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=random, dtype=torch.float64)  # noqa: E731
    logprobs_PK, ids_PK = (2 * draw(NUM_POSITIONS, VOCAB_SIZE)).log_softmax(dim=1).topk(4, dim=1)
    teacher = SoftTargets.of(
        ids_PK, logprobs_PK.float(), (1 - logprobs_PK.exp().sum(dim=1)).float(), entries="exact", vocab_size=VOCAB_SIZE
    )
    weight_VH, hidden_PH = draw(VOCAB_SIZE, HIDDEN).requires_grad_(), draw(NUM_POSITIONS, HIDDEN).requires_grad_()
    inner = {("hidden", layer): draw(1, SLOTS, HIDDEN).requires_grad_() for layer in (-1, *range(NUM_LAYERS + 1))}
    ids_BT, flat_P = torch.randint(0, VOCAB_SIZE, (1, SLOTS), generator=random), torch.tensor(POSITIONS)
    weights_P = torch.rand(NUM_POSITIONS, generator=random) + 0.1
    batch = TorchBatch(
        input_ids_BT=ids_BT,
        position_ids_BT=torch.tensor([[*range(7), *range(5)]]),
        segment_ids_BT=torch.tensor([[1] * 7 + [2] * 5]),
        cu_seqlens_G1=torch.tensor([0, 7, 12]),
        target_ids_BT=torch.cat([ids_BT[:, 1:], torch.tensor([[3]])], dim=1),
        flat_positions_P=flat_P,
        teacher=teacher,
        weights_P=weights_P,
        max_seqlen=7,
        num_sequences=2,
        num_masked=0,
        features=features,
        sequence_indices_S=torch.arange(2),
    )
    return Given(StudentStates(hidden_PH, Projection(weight_VH), flat_P, inner), batch, weights_P)


def setting(manifest: Any = None, **more: Any) -> Setting:
    """Of the student of `given`."""

    def missing(name: str) -> Any:
        raise KeyError(name)

    fields: dict[str, Any] = {"sidecar": missing, "pooled_features": missing, "num_sequences": 2, "seed": 1} | more
    sizes = {"num_layers": NUM_LAYERS, "num_heads": 2, "num_kv_heads": 1, "head_dim": 3, "vocab_size": VOCAB_SIZE}
    return Setting(manifest=manifest, hidden_size=HIDDEN, device=torch.device("cpu"), **sizes, **fields)


def slopes(total: Tensor, here: Given) -> dict[Any, Tensor]:
    """Gradients of what the term read of the student, by name."""
    leaves = {"hidden_PH": here.student.hidden_PH, **here.student.inner}
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return {name: slope for name, slope in zip(leaves, found, strict=True) if slope is not None}


def evaluate(term: SumOfLosses, here: Given) -> torch.Tensor:
    return term(here.student, here.batch, here.weights_P)


def a_term_is_a_finite_number_with_a_gradient(term: SumOfLosses) -> None:
    here = given()
    total = evaluate(term, here)
    assert total.ndim == 0
    assert torch.isfinite(total)
    found = slopes(total, here)
    assert all(bool(torch.isfinite(slope).all()) for slope in found.values())
    assert max(float(slope.abs().max()) for slope in found.values()) > 0


def the_gradient_is_the_derivative(term: SumOfLosses) -> None:
    here, step = given(), 1e-3
    found = slopes(evaluate(term, here), here)
    random = torch.Generator().manual_seed(1)
    ways = {name: torch.randn(slope.shape, generator=random, dtype=slope.dtype) for name, slope in found.items()}

    def moved(by: float) -> Given:
        inner = {name: state + by * ways[name] if name in ways else state for name, state in here.student.inner.items()}
        hidden_PH = here.student.hidden_PH + by * ways["hidden_PH"] if "hidden_PH" in ways else here.student.hidden_PH
        return replace(here, student=replace(here.student, hidden_PH=hidden_PH, inner=inner))

    with torch.no_grad():
        up, down = (evaluate(term, moved(by)) for by in (step, -step))
    slope = sum(float((found[name] * way).sum()) for name, way in ways.items())
    torch.testing.assert_close(torch.tensor(slope), ((up - down) / (2 * step)).float(), rtol=2e-3, atol=2e-3)


def the_sum_over_a_batch_is_that_over_its_parts(term: SumOfLosses) -> None:
    here = given()
    parts = evaluate(term, here.take(0, 4)) + evaluate(term, here.take(4, 4)) + evaluate(term, here.take(4, NUM_POSITIONS))
    torch.testing.assert_close(parts, evaluate(term, here), rtol=1e-5, atol=1e-6)


def weights_are_factors_and_weight_zero_is_not_read(term: SumOfLosses) -> None:
    here = given()
    doubled = replace(here, weights_P=2 * here.weights_P)
    torch.testing.assert_close(evaluate(term, doubled), 2 * evaluate(term, here), rtol=1e-5, atol=1e-6)
    weights_P, at = here.weights_P.clone(), POSITIONS[2]
    weights_P[2] = 0.0

    def with_large(state: Tensor, *where: int) -> Tensor:
        state = state.detach().clone()
        state[where] = 1e4
        return state.requires_grad_()

    without = replace(here, weights_P=weights_P)
    inner = {name: with_large(state, 0, at) for name, state in here.student.inner.items()}
    student = replace(here.student, hidden_PH=with_large(here.student.hidden_PH, 2), inner=inner)
    other = replace(without, student=student)
    total = evaluate(term, other)
    torch.testing.assert_close(total, evaluate(term, without), rtol=1e-5, atol=1e-6)
    for name, slope in slopes(total, other).items():
        assert not (slope[2] if name == "hidden_PH" else slope[0, at]).any()


def a_batch_without_a_position_adds_nothing(term: SumOfLosses) -> None:
    total = evaluate(term, given().take(4, 4))
    assert float(total.detach()) == 0.0


def half_precision_is_close(term: SumOfLosses) -> None:
    here = given()
    inner = {name: state.to(torch.bfloat16) for name, state in here.student.inner.items()}
    weight_VH = here.student.projection.weight_VH.to(torch.bfloat16)
    student = replace(
        here.student, hidden_PH=here.student.hidden_PH.to(torch.bfloat16), projection=Projection(weight_VH), inner=inner
    )
    found = evaluate(term, replace(here, student=student))
    torch.testing.assert_close(found.float(), evaluate(term, here).float(), rtol=0.05, atol=0.05)


def the_same_call_gives_the_same_number(term: SumOfLosses) -> None:
    assert evaluate(term, given()).item() == evaluate(term, given()).item()


def what_it_counts_is_that_of_its_parts_and_needs_no_student(term: Term) -> None:
    here = given()
    whole = term.count(here.batch, here.weights_P)
    parts = sum(term.count(part.batch, part.weights_P) for part in (here.take(0, 4), here.take(4, 9)))
    torch.testing.assert_close(torch.as_tensor(parts), whole)
    assert float(whole) > 0


def every_parameter_learns(term: Term) -> None:
    evaluate(term, given()).backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) and p.grad.any() for p in term.parameters())


PROMISES = (
    a_term_is_a_finite_number_with_a_gradient,
    the_gradient_is_the_derivative,
    the_sum_over_a_batch_is_that_over_its_parts,
    weights_are_factors_and_weight_zero_is_not_read,
    a_batch_without_a_position_adds_nothing,
    half_precision_is_close,
    the_same_call_gives_the_same_number,
)
OF_MODULES = (what_it_counts_is_that_of_its_parts_and_needs_no_student, every_parameter_learns)
"""Of terms themselves, and not of any function that gives a sum."""
