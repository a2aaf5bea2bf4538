"""What models do around the projection: scale, softcap, padded vocabularies, float32 logits, tied and frozen weights."""

from __future__ import annotations

import pytest
import torch
from contracts.kernels import make_problem
from loose_calls import fused_sparse_kd_loss, sparse_kd_loss, step

from kdcache import half_precision
from kdcache.errors import LossError
from kdcache.loss.chunks import Head
from kdcache.loss.fused import Projection
from kdcache.loss.modules import FusedSparseKD, SparseKD
from kdcache.loss.prepare import LossSettings

V, H, P = 101, 16, 37


def make(dtype: torch.dtype = torch.float32) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
    """hidden, weight and bias; targets."""
    problem, generator = make_problem(P, V, 9), torch.Generator().manual_seed(0)
    leaves = tuple(torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in ((P, H), (V, H), (V,)))
    t = problem.targets
    names = ("token_ids_PK", "logprobs_PK", "tail_mass_P", "target_ids_P", "weights_P")
    return leaves, {name: torch.tensor(getattr(t, name)) for name in names}


def plain(leaves: tuple[torch.Tensor, ...], head: Head) -> torch.Tensor:
    """The same head in plain torch, float64."""
    hidden_PH, weight_VH, bias_V = (leaf.double() for leaf in leaves)
    z_PV = (hidden_PH @ weight_VH.T + bias_V) * head.logit_scale
    return z_PV if head.softcap is None else head.softcap * (z_PV / head.softcap).tanh()


def assert_same_gradients(loss: torch.Tensor, expected: torch.Tensor, leaves: tuple[torch.Tensor, ...], bound: float) -> None:
    assert loss.item() == pytest.approx(expected.item(), rel=bound)
    wanted = torch.autograd.grad(expected, leaves)
    for gradient, want in zip(torch.autograd.grad(loss, leaves), wanted, strict=True):
        assert ((gradient - want).double().norm() / want.double().norm()).item() < bound


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("head", [Head(logit_scale=0.0625), Head(softcap=3.0), Head(logit_scale=-2.0, softcap=5.0)], ids=str)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_scaled_and_capped_logits_have_the_gradients_of_autograd(head, backend, dtype, bound):
    leaves, targets = make(dtype)
    options = {"alpha": 0.7, "divergence": "jensen_shannon"}
    loss = fused_sparse_kd_loss(
        *leaves[:2], bias=leaves[2], **targets, **options, head=head, backend=backend, chunk_positions=8
    )
    assert_same_gradients(loss, sparse_kd_loss(plain(leaves, head), **targets, **options, backend="torch"), leaves, bound)


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_padding_of_the_vocabulary_gets_no_probability_and_no_gradient(backend):
    leaves, targets = make()
    hidden_PH, weight_VH, bias_V = leaves
    wide_VH = torch.cat([weight_VH.detach(), torch.full((11, H), 50.0)]).requires_grad_()
    wide_V = torch.cat([bias_V.detach(), torch.full((11,), 1e4)]).requires_grad_()
    loss = fused_sparse_kd_loss(hidden_PH, wide_VH, bias=wide_V, **targets, head=Head(vocab_size=V), backend=backend)
    expected = fused_sparse_kd_loss(hidden_PH, weight_VH, bias=bias_V, **targets, backend=backend)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    gradients, wanted = torch.autograd.grad(loss, (hidden_PH, wide_VH, wide_V)), torch.autograd.grad(expected, leaves)
    torch.testing.assert_close(gradients[0], wanted[0])
    for gradient, want in zip(gradients[1:], wanted[1:], strict=True):
        torch.testing.assert_close(gradient[:V], want)
        assert not gradient[V:].any()


def test_an_id_in_the_padding_is_refused():
    leaves, targets = make()
    with pytest.raises(LossError, match="outside the student's vocabulary of 20"):
        fused_sparse_kd_loss(*leaves[:2], **targets, head=Head(vocab_size=20))
    with pytest.raises(LossError, match="vocab_size is 102, but the output projection has only 101 ids"):
        fused_sparse_kd_loss(*leaves[:2], **targets, head=Head(vocab_size=102))


@pytest.mark.parametrize("options", [{"softcap": 0.0}, {"softcap": float("inf")}, {"logit_scale": 0.0}, {"vocab_size": 0}])
def test_impossible_heads_are_refused(options):
    with pytest.raises(LossError, match=next(iter(options))):
        Head(**options)


def test_float32_logits_take_most_of_the_error_out_of_a_bfloat16_gradient_near_convergence(monkeypatch):
    """The student is its own teacher but for a little noise, so that q - p is small beside the rounding of the logits."""
    # Where half precision is emulated, logits are float32 in any case.
    monkeypatch.setattr(half_precision, "float32_gain", lambda dtype: 0.5)
    (hidden_PH, weight_VH, _), _ = make(torch.bfloat16)
    teacher_PV = ((hidden_PH.float() @ weight_VH.float().T) + 0.01 * torch.randn(P, V)).log_softmax(dim=1).detach()
    top = teacher_PV.topk(20, dim=1)
    teacher = (top.indices, top.values, (1 - top.values.exp().sum(dim=1)).clamp_min(0))
    exact = [leaf.detach().double().requires_grad_() for leaf in (hidden_PH, weight_VH)]
    wanted = torch.autograd.grad(fused_sparse_kd_loss(*exact, *teacher), exact)
    errors = []
    for float32_logits in (False, True):
        loss = fused_sparse_kd_loss(
            hidden_PH, weight_VH, *teacher, head=Head(float32_logits=float32_logits), chunk_positions=16
        )
        gradients = torch.autograd.grad(loss, (hidden_PH, weight_VH))
        pairs = zip(gradients, wanted, strict=True)
        errors.append(max(((g.double() - w).norm() / w.norm()).item() for g, w in pairs))
    assert errors[1] < 1e-2
    assert errors[1] < errors[0] / 10


class Tied(torch.nn.Module):
    """Embedding and output projection are one parameter, which so gets a gradient from both."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(V, H)
        self.middle = torch.nn.Linear(H, H)
        self.loss = FusedSparseKD(alpha=0.5)

    def hidden_PH(self, ids_P: torch.Tensor) -> torch.Tensor:
        return self.middle(self.embedding(ids_P)).tanh()

    def forward(self, ids_P: torch.Tensor, targets: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.loss(self.hidden_PH(ids_P), Projection(self.embedding.weight, chunk_positions=8), **step(targets))


def reference_gradients(model: Tied, ids_P: torch.Tensor, targets: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    logits_PV = model.hidden_PH(ids_P) @ model.embedding.weight.T
    loss = SparseKD(alpha=0.5, settings=LossSettings(backend="torch"))(logits_PV, **step(targets))
    return list(torch.autograd.grad(loss, list(model.parameters())))


def test_tied_embeddings_get_both_gradients_and_checkpointing_changes_nothing():
    model, (_, targets), ids_P = Tied(), make(), torch.arange(P) % V
    wanted = reference_gradients(model, ids_P, targets)
    checkpointed = torch.utils.checkpoint.checkpoint(model, ids_P, targets, use_reentrant=False)
    for loss in (model(ids_P, targets), checkpointed):
        for gradient, want in zip(torch.autograd.grad(loss, list(model.parameters())), wanted, strict=True):
            torch.testing.assert_close(gradient, want, rtol=1e-5, atol=1e-6)


def test_accumulated_parts_with_the_sum_add_up_to_the_batch_with_the_mean():
    model, (_, targets), ids_P = Tied(), make(), torch.arange(P) % V
    wanted = reference_gradients(model, ids_P, targets)
    model.loss = FusedSparseKD(alpha=0.5, settings=LossSettings(reduction="sum"))
    for part in torch.arange(P).split(10):
        (model(ids_P[part], {k: v[part] for k, v in targets.items()}) / targets["weights_P"].sum()).backward()
    for parameter, want in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, want, rtol=1e-5, atol=1e-6)


def test_autocast_keeps_the_dtype_of_what_it_is_given():
    """A model under autocast gives bfloat16 hidden states beside a float32 weight: told, not guessed."""
    model, (_, targets), ids_P = Tied(), make(), torch.arange(P) % V
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden_PH = model.middle(model.embedding(ids_P))
        with pytest.raises(LossError, match=r"weight_VH is torch.float32 on cpu, but hidden_PH is torch.bfloat16"):
            model.loss(hidden_PH, model.embedding.weight, **step(targets))
        loss = model.loss(hidden_PH, model.embedding.weight.bfloat16(), **step(targets))
    loss.backward()
    assert model.embedding.weight.grad is not None
    assert model.embedding.weight.grad.dtype == torch.float32
    assert "alpha=0.5" in repr(model.loss)
