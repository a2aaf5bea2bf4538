"""Terms that make the teacher's whole distributions again: right on a real model, refused where the cache lacks something."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cache_making import make_identity, make_manifest

from kdcache.errors import ConfigError, CorruptCacheError
from kdcache.format.feature_vectors import FeatureVectors
from kdcache.format.identity import ProjectionInfo
from kdcache.format.manifest import FeatureInfo, Manifest
from kdcache.loss.fused import Projection
from kdcache.loss.states.exact_kl import TeacherStates, exact_kd_loss
from kdcache.train.terms.base import Setting, StudentStates
from kdcache.train.terms.dual_space import DualSpace
from kdcache.train.terms.exact_kl import ExactKL

LAST = FeatureInfo(name="hidden_last", layer=-1, size=12, dtype="float16", num_layers=2)
NUM_POSITIONS, VOCAB_SIZE, HIDDEN = 9, 37, 6


def manifest_with(*features: FeatureInfo) -> Manifest:
    import msgspec

    return make_manifest(1, msgspec.structs.replace(make_identity(vocab_size=VOCAB_SIZE), features=features))


def projection_of_the_teacher(dtype: torch.dtype = torch.float16) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "weight": torch.randn((VOCAB_SIZE, 12), generator=generator).to(dtype),
        "bias": torch.randn(VOCAB_SIZE, generator=generator).to(dtype),
        "softcap": torch.tensor([6.0]),
    }


def setting_of(manifest: Manifest, sidecar: dict[str, torch.Tensor]) -> Setting:
    return Setting(
        manifest=manifest, sidecar=lambda name: {"output_projection": sidecar}[name], hidden_size=HIDDEN, num_layers=1,
        num_heads=2, num_kv_heads=2, head_dim=3, vocab_size=VOCAB_SIZE, num_sequences=5, seed=0, device=torch.device("cpu"),
        pooled_features=lambda name: None,
    )  # fmt: skip


def batch_of(vectors: FeatureVectors[Any], slots: torch.Tensor) -> Any:
    return SimpleNamespace(features={vectors.info.name: vectors}, flat_positions_P=slots)


class Case:
    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(2)
        self.states_PH = torch.randn((NUM_POSITIONS, 12), generator=generator).half()
        self.slots_P = torch.arange(NUM_POSITIONS) * 2
        self.vectors = FeatureVectors(LAST, self.states_PH, self.slots_P)
        hidden_PH = torch.randn((NUM_POSITIONS, HIDDEN), generator=generator).requires_grad_()
        weight_VH = torch.randn((VOCAB_SIZE, HIDDEN), generator=generator).requires_grad_()
        self.student = StudentStates(hidden_PH, Projection(weight_VH))
        self.weights_P = torch.rand(NUM_POSITIONS, generator=generator)
        self.sidecar = projection_of_the_teacher()

    def made(self, term: Any, info: FeatureInfo = LAST) -> Any:
        manifest = manifest_with(info)
        term.check(manifest)
        term.set_up(setting_of(manifest, self.sidecar))
        return term

    def expected(self, states_PH: torch.Tensor, **options: Any) -> float:
        teacher_PV = 6 * torch.tanh((states_PH.double() @ self.sidecar["weight"].double().T + self.sidecar["bias"]) / 6)
        teacher = TeacherStates(teacher_PV, Projection(torch.eye(VOCAB_SIZE, dtype=torch.float64)))
        hidden_PH, weight_VH = self.student.hidden_PH.double(), self.student.projection.weight_VH.double()
        return exact_kd_loss(hidden_PH, weight_VH, teacher, weights=self.weights_P, reduction="sum", **options).item()


@pytest.mark.parametrize("options", [{}, {"divergence": "jensen_shannon", "temperature": 2.0}], ids=["plain", "shaped"])
def test_exact_kl_is_that_of_the_teachers_own_logits(options: dict[str, Any]) -> None:
    case = Case()
    term = case.made(ExactKL(**options))
    loss = term(case.student, batch_of(case.vectors, case.slots_P), case.weights_P)
    assert loss.item() == pytest.approx(case.expected(case.states_PH, **options), rel=2e-6)
    loss.backward()
    assert case.student.projection.weight_VH.grad is not None
    assert not list(term.parameters())


def test_a_feature_at_all_positions_is_taken_where_the_batch_trains() -> None:
    case = Case()
    everywhere = torch.zeros((2 * NUM_POSITIONS, 12)).half()
    everywhere[case.slots_P] = case.states_PH
    everywhere[case.slots_P + 1] = torch.nan
    info = replace_info(positions="all")
    vectors = FeatureVectors(info, everywhere, torch.arange(2 * NUM_POSITIONS))
    loss = case.made(ExactKL(), info)(case.student, batch_of(vectors, case.slots_P), case.weights_P)
    assert loss.item() == pytest.approx(case.expected(case.states_PH), rel=2e-6)


def replace_info(**changes: Any) -> FeatureInfo:
    import msgspec

    return msgspec.structs.replace(LAST, **changes)


def low_rank_case(case: Case) -> tuple[FeatureInfo, FeatureVectors[Any]]:
    generator = torch.Generator().manual_seed(4)
    basis, center = torch.linalg.qr(torch.randn((12, 5), generator=generator))[0].T, torch.randn(12, generator=generator)
    info = replace_info(size=5, projection=ProjectionInfo(kind="pca", full_size=12, dropped=0.1, digest="0" * 64))
    values = ((case.states_PH.float() - center) @ basis.T).half()
    return info, FeatureVectors(info, values, case.slots_P, basis=basis, center=center)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_coordinates_stand_for_the_states_that_they_are_of(dtype: torch.dtype) -> None:
    case = Case()
    case.sidecar = projection_of_the_teacher(dtype)
    info, vectors = low_rank_case(case)
    loss = case.made(ExactKL(), info)(case.student, batch_of(vectors, case.slots_P), case.weights_P)
    assert loss.item() == pytest.approx(case.expected(vectors.reconstructed()), rel=2e-6)


@pytest.mark.parametrize("is_low_rank", [False, True])
def test_dual_space_starts_where_the_students_projection_gives_the_teachers_logits(is_low_rank: bool) -> None:
    case = Case()
    case.student = StudentStates(torch.randn((NUM_POSITIONS, 40)).requires_grad_(), Projection(torch.randn((VOCAB_SIZE, 40))))
    del case.sidecar["softcap"]
    info, vectors = low_rank_case(case) if is_low_rank else (LAST, case.vectors)
    manifest = manifest_with(info)
    term = DualSpace()
    term.set_up(replace(setting_of(manifest, case.sidecar), hidden_size=40))
    loss = term(case.student, batch_of(vectors, case.slots_P), case.weights_P)
    assert term.measures()["agreement"] == 1
    # With as many numbers as ids, any logits are within reach: the mapped teacher is the teacher.
    exact = ExactKL()
    exact.set_up(setting_of(manifest, case.sidecar))
    right = exact(case.student, batch_of(vectors, case.slots_P), case.weights_P).item() / case.weights_P.sum().item()
    assert term.measures()["to_student"] == pytest.approx(right, rel=1e-4)
    loss.backward()
    assert {name for name, p in term.named_parameters() if p.grad is not None} == {"student_map", "student_shift"}


def test_the_logits_of_the_mean_are_not_rounded_to_a_students_half_precision() -> None:
    case = Case()
    del case.sidecar["softcap"]
    info, vectors = low_rank_case(case)
    vectors = replace(vectors, center=10 * vectors.center)
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        student = StudentStates(case.student.hidden_PH.to(dtype), Projection(case.student.projection.weight_VH.to(dtype)))
        term = case.made(DualSpace(), info)
        term(student, batch_of(vectors, case.slots_P), case.weights_P).backward(retain_graph=True)
        found[dtype] = term.measures()["to_teacher"]
    projection = term._teacher.of(batch_of(vectors, case.slots_P)).product(VOCAB_SIZE)
    expected_V = case.sidecar["weight"].double() @ vectors.center.double() + case.sidecar["bias"]
    torch.testing.assert_close(projection.bias_V.double(), expected_V, rtol=1e-5, atol=1e-4)
    assert projection.weight_VH.dtype == torch.bfloat16
    assert projection.bias_V.dtype == torch.float32
    assert found[torch.bfloat16] == pytest.approx(found[torch.float32], rel=0.02)


def test_dual_space_keeps_the_map_that_a_checkpoint_brings() -> None:
    case, batch = Case(), batch_of(Case().vectors, Case().slots_P)
    first = case.made(DualSpace(every=2))
    first(case.student, batch, case.weights_P)
    with torch.no_grad():
        first.student_map += 1
    again = case.made(DualSpace(every=2))
    again.load_state_dict(first.state_dict())
    with torch.no_grad():
        case.student.projection.weight_VH.add_(1.0)  # B is not made again at the second batch of two
    right = first(case.student, batch, case.weights_P).item()
    assert again(case.student, batch, case.weights_P).item() == right
    assert first(case.student, batch, case.weights_P).item() != right


def test_the_sum_over_a_batch_is_that_over_its_parts() -> None:
    for term in (ExactKL(), DualSpace()):
        case = Case()
        case.made(term)

        def part(start: int, stop: int, case: Case = case, term: Any = term) -> float:
            student = replace(case.student, hidden_PH=case.student.hidden_PH[start:stop])
            flags = (torch.arange(NUM_POSITIONS) >= start) & (torch.arange(NUM_POSITIONS) < stop)
            batch = batch_of(case.vectors.at(flags), case.slots_P[start:stop])
            return term(student, batch, case.weights_P[start:stop]).item()

        assert part(0, 4) + part(4, NUM_POSITIONS) == pytest.approx(part(0, NUM_POSITIONS), rel=1e-5)
        assert part(3, 3) == 0


@pytest.mark.parametrize("make", [ExactKL, DualSpace])
@pytest.mark.parametrize(
    ("info", "words"),
    [
        (replace_info(name="other"), "has no feature 'hidden_last', it has other; capture it with"),
        (replace_info(layer=2), "has layer 2, but the teacher's distribution can only"),
        (replace_info(pooling="mean"), "has pooling 'mean'"),
        (replace_info(stride=2), "has stride 2"),
        (replace_info(projection=ProjectionInfo(kind="random", full_size=24)), "has projection 'random'"),
    ],
)
def test_a_cache_without_last_states_is_refused(make: Any, info: FeatureInfo, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make().check(manifest_with(info))


@pytest.mark.parametrize("make", [ExactKL, DualSpace])
def test_wrong_options_are_refused(make: Any) -> None:
    for options, words in (
        ({"divergence": "hinge_ranking"}, "between whole distributions there are"),
        ({"temperature": -1.0}, "must be above 0"),
    ):
        with pytest.raises(ValueError, match=words):
            make(**options)
    with pytest.raises(ValueError, match="every is 0"):
        DualSpace(every=0)


def test_a_projection_of_another_teacher_is_refused() -> None:
    case = Case()
    case.sidecar["weight"] = case.sidecar["weight"][:, :8]
    with pytest.raises(ConfigError, match="takes states of 8 numbers, but feature 'hidden_last' has 12"):
        case.made(ExactKL())


@pytest.mark.parametrize("make", [ExactKL, DualSpace])
@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"weight": None}, CorruptCacheError, "has no tensor 'weight' of two dimensions"),
        ({"weight": torch.zeros(12)}, CorruptCacheError, "has no tensor 'weight' of two dimensions"),
        ({"bias": torch.zeros(7)}, CorruptCacheError, r"'bias' has the shape \(7,\), expected \(37,\)"),
        ({"logit_scale": torch.tensor([float("nan")])}, CorruptCacheError, "'logit_scale' is .*, expected one finite number"),
        ({"softcap": torch.zeros(2)}, CorruptCacheError, "'softcap' is .*, expected one finite number"),
        ({"weight": torch.zeros(30, 12), "bias": None}, ConfigError, "makes logits of 30 ids, but the cache's teacher has 37"),
    ],
)
def test_a_projection_that_is_not_one_is_refused(make: Any, changes: dict[str, Any], kind: type[Exception], words: str) -> None:
    case = Case()
    case.sidecar = {name: tensor for name, tensor in (case.sidecar | changes).items() if tensor is not None}
    with pytest.raises(kind, match=words):
        case.made(make())


def test_a_cap_of_zero_is_none() -> None:
    case = Case()
    case.sidecar["softcap"] = torch.zeros(1)
    capped, plain = case.made(ExactKL()), Case()
    del plain.sidecar["softcap"]
    batch = batch_of(case.vectors, case.slots_P)
    terms = capped, plain.made(ExactKL())
    values = [float(term(case.student, batch, case.weights_P).detach()) for term in terms]
    assert values[0] == values[1]
