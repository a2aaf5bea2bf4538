"""Every public loss, called the natural way on a batch from a cache of every selection: the definition, or a refusal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import kdcache
from kdcache.cli.main import main
from kdcache.errors import LossError
from kdcache.kernels.base import KernelInputs, Objective, make_kernel_inputs
from kdcache.kernels.divergences import DIVERGENCES, get_divergence
from kdcache.kernels.reference import loss_and_gradient
from kdcache.loader.torch_batches import TorchBatch

V, H = 300, 8
KINDS = {
    "top_k": ["k=6"],
    "top_p_k": ["p=0.7", "k=20"],
    "sampled": ["num_draws=12", "seed=1"],
    "threshold": ["tau=0.03", "seed=1"],
    "top_k_sampled": ["k=4", "num_draws=9", "seed=1"],
}
WITH_ESTIMATES = ("sampled", "threshold", "top_k_sampled")
TEMPERATURE = 2.0


@pytest.fixture(scope="module", params=KINDS)
def batch(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TorchBatch:
    folder, kind = tmp_path_factory.mktemp("cache"), request.param
    (folder / "text.txt").write_text("A line of text.\nAnother one, a little longer.\n")
    (folder / "config.yaml").write_text(
        f"input: {{format: txt, paths: [{folder}/text.txt], window: {{size: 12}}}}\n"
        f"teacher: {{model: made-up, backend: fake, fake: {{vocab_size: {V}}}}}\n"
        f"out: {folder}/cache\n"
    )
    settings = [f"selection.kind={kind}", *(f"selection.{setting}" for setting in KINDS[kind])]
    settings.append(f"selection.temperatures=[{TEMPERATURE}]")
    assert main(["capture", str(folder / "config.yaml"), *[part for each in settings for part in ("--set", each)]]) == 0
    with kdcache.open(str(folder / "cache")) as cache:
        options = kdcache.LoaderConfig(seq_len=16, batch_rows=3, num_threads=0, with_target_logprobs=True)
        batch = next(iter(kdcache.TorchLoader(kdcache.Loader(cache, options))))
    assert batch.teacher.selection == kind
    return batch


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """For the loss over a vocabulary that ranks share."""
    store = tmp_path_factory.mktemp("ranks") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def definition(batch: TorchBatch, divergence: Any, temperature: float) -> tuple[KernelInputs, Objective] | None:
    """What the loss is of: written down for each selection, apart from the library's rules; None where it has no meaning."""
    kind, teacher = batch.teacher.selection, batch.teacher.map(np.asarray)
    ids_PK, logprobs_PK, tail_mass_P = teacher.token_ids_PK, teacher.logprobs_PK.astype(np.float64), teacher.tail_mass_P
    num_exact_P = np.full(len(ids_PK), ids_PK.shape[1]) if teacher.num_exact_P is None else teacher.num_exact_P
    tail = "bucket"
    if divergence.name == "tail_aware_kl":
        if kind not in ("threshold", "top_k_sampled") or temperature != 1:
            return None
    elif kind in WITH_ESTIMATES and divergence.name == "forward_kl" and temperature == 1:
        tail = "drop"
    elif kind == "sampled" or (temperature != 1 and not divergence.requirements.temperature):
        return None
    else:
        ids_PK = np.where(np.arange(ids_PK.shape[1]) < num_exact_P[:, None], ids_PK, -1)
    if divergence.requirements.target:  # one more column for target ids that are no exact entries
        target_ids_P, target_logprobs_P = batch.target_ids_P.numpy(), teacher.target_logprobs_P.astype(np.float64)
        added_P = np.where((target_ids_P < 0) | (ids_PK == target_ids_P[:, None]).any(axis=1), -1, target_ids_P)
        ids_PK = np.concatenate([ids_PK, added_P[:, None]], axis=1)
        logprobs_PK = np.concatenate([logprobs_PK, np.nan_to_num(target_logprobs_P, nan=0.0)[:, None]], axis=1)
        tail_mass_P = tail_mass_P - np.where(added_P >= 0, np.exp(target_logprobs_P), 0)
        num_exact_P = np.full(len(ids_PK), ids_PK.shape[1])
    if temperature != 1:
        logprobs_PK = logprobs_PK / temperature - teacher.log_z_PL[:, :1].astype(np.float64)
        tail_mass_P = 1 - np.where(ids_PK >= 0, np.exp(logprobs_PK), 0).sum(axis=1)
    weights_P = batch.weights_P.numpy() / batch.weights_P.numpy().sum()
    more = {"target_ids_P": batch.target_ids_P.numpy(), "weights_P": weights_P, "num_exact_P": num_exact_P}
    targets = make_kernel_inputs(ids_PK, np.minimum(logprobs_PK, 0), np.clip(tail_mass_P, 0, 1), vocab_size=V, **more)
    return targets, Objective(tail, 0.6, divergence, temperature)


def by_logits(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda hidden_PH, weight_VH, teacher, **asked: loss(hidden_PH @ weight_VH.T, teacher, **asked)


def as_module(made: Callable[..., torch.nn.Module], *, fused: bool) -> Callable[..., Tensor]:
    def loss(
        hidden_PH: Tensor, weight_VH: Tensor, teacher: Any, *, target_ids: Tensor, weights: Tensor, **asked: Any
    ) -> Tensor:
        student = (hidden_PH, weight_VH) if fused else (hidden_PH @ weight_VH.T,)
        return made(**asked)(*student, teacher, target_ids=target_ids, weights=weights)

    return loss


def over_one_rank(logits_PV: Tensor, teacher: Any, **asked: Any) -> Tensor:
    return kdcache.vocab_parallel_sparse_kd_loss(logits_PV, kdcache.VocabPart(0, V), teacher, **asked)


LOSSES: dict[str, Callable[..., Tensor]] = {
    "sparse_kd_loss": by_logits(kdcache.sparse_kd_loss),
    "fused_sparse_kd_loss": kdcache.fused_sparse_kd_loss,
    "vocab_parallel_sparse_kd_loss": by_logits(over_one_rank),
    "SparseKD": as_module(kdcache.SparseKD, fused=False),
    "FusedSparseKD": as_module(kdcache.FusedSparseKD, fused=True),
}


@pytest.mark.parametrize("temperature", [1.0, TEMPERATURE])
@pytest.mark.parametrize("name", LOSSES)
def test_the_natural_call_is_the_definition_or_is_refused_in_one_sentence(name, temperature, batch):
    generator = torch.Generator().manual_seed(0)
    hidden_PH = torch.randn(batch.teacher.num_positions, H, generator=generator).requires_grad_()
    weight_VH = torch.randn(V, H, generator=generator).requires_grad_()
    num_defined = 0
    for divergence in DIVERGENCES:
        asked = {"divergence": divergence, "alpha": 0.6, "temperature": temperature}
        asked |= {"target_ids": batch.target_ids_P, "weights": batch.weights_P}
        wanted = definition(batch, get_divergence(divergence), temperature)
        if wanted is None:
            with pytest.raises(LossError) as refusal:
                LOSSES[name](hidden_PH, weight_VH, batch.teacher, **asked)
            assert "\n" not in str(refusal.value)
            continue
        num_defined += 1
        loss = LOSSES[name](hidden_PH, weight_VH, batch.teacher, **asked)
        targets, objective = wanted
        logits_PV = hidden_PH.detach().double().numpy() @ weight_VH.detach().double().numpy().T
        losses_P, gradient_PV = loss_and_gradient(logits_PV, targets, objective)
        assert loss.item() == pytest.approx((losses_P * targets.weights_P).sum(), rel=1e-4), divergence
        if divergence in (
            "hinge_ranking",
            "total_variation",
            "self_evolution",
        ):  # their slopes have jumps, at which rounding decides
            continue
        for found, right in zip(
            torch.autograd.grad(loss, (hidden_PH, weight_VH)),
            (gradient_PV @ weight_VH.detach().numpy(), gradient_PV.T @ hidden_PH.detach().numpy()),
            strict=True,
        ):
            np.testing.assert_allclose(found, right, rtol=1e-3, atol=2e-4 * np.abs(right).max(), err_msg=divergence)
    assert num_defined >= (0 if batch.teacher.selection == "sampled" and temperature != 1 else 1)


def test_a_temperature_that_was_not_captured_is_refused_with_those_that_were(batch):
    if batch.teacher.selection == "sampled":
        pytest.skip("its entries stand for temperature 1 alone")
    with pytest.raises(LossError, match=r"temperature is 3.0, but the teacher's normalisers are known for 1.0, 2.0"):
        kdcache.sparse_kd_loss(torch.zeros(batch.teacher.num_positions, V), batch.teacher, temperature=3.0)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda teacher: teacher.token_ids_PK, r"teacher is of type Tensor, but must be SoftTargets: pass batch.teacher"),
        (lambda teacher: None, "teacher is None, but alpha is 1.0; pass teacher=batch.teacher"),
        (lambda teacher: teacher.map(Tensor.numpy), "arrays are of type ndarray, but must be tensors: .* kdcache.TorchLoader"),
        (lambda teacher: teacher.slice(0, 1), r"1, .* positions of the student need .*flat_positions_P"),
    ],
)
def test_what_is_no_teacher_of_these_positions_is_refused(batch, change, sentence):
    with pytest.raises(LossError, match=sentence):
        kdcache.sparse_kd_loss(torch.zeros(batch.teacher.num_positions, V), change(batch.teacher))


def test_a_student_with_fewer_ids_than_the_teacher_is_refused(batch):
    with pytest.raises(LossError, match=f"teacher has {V} ids, but the student only 280: .*entries_within"):
        kdcache.sparse_kd_loss(torch.zeros(batch.teacher.num_positions, 280), batch.teacher)


@pytest.mark.parametrize(
    ("named", "sentence"),
    [
        ({"entries": "top_k"}, "entries is 'top_k', but must say what the entries mean: 'exact', 'unbiased', 'mixed'"),
        ({"entries": "mixed"}, "entries is 'mixed' and num_exact_P is missing"),
        ({"entries": "exact", "num_exact_P": torch.tensor([1])}, "num_exact_P is given, but only 'mixed' has it"),
    ],
)
def test_loose_arrays_must_say_what_their_entries_mean(named, sentence):
    arrays = torch.tensor([[1]]), torch.tensor([[-1.0]]), torch.tensor([0.6])
    with pytest.raises(LossError, match=sentence):
        kdcache.SoftTargets.of(*arrays, **named)
    with pytest.raises(TypeError, match="entries"):
        kdcache.SoftTargets.of(*arrays)  # pyright: ignore[reportCallIssue]


def test_the_readmes_own_loop_runs_on_this_cache(batch):
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    call = next(line.strip() for line in readme.splitlines() if line.strip().startswith("loss = kdcache.sparse_kd_loss"))
    logits = torch.randn(batch.teacher.num_positions, V, generator=torch.Generator().manual_seed(0))
    names: dict[str, Any] = {"kdcache": kdcache, "batch": batch, "logits": logits}
    exec(call, names)  # the README's own line
    wanted = definition(batch, get_divergence("forward_kl"), 1.0)
    assert wanted is not None
    objective = Objective(wanted[1].tail)
    losses_P, _ = loss_and_gradient(logits.double().numpy(), wanted[0], objective)
    assert names["loss"].item() == pytest.approx((losses_P * wanted[0].weights_P).sum(), rel=1e-5)
