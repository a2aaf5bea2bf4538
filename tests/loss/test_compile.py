"""torch.compile around the losses: one graph, the same numbers. `aot_eager` needs no C++ compiler."""

from __future__ import annotations

import pytest
import torch
from loose_calls import fused_sparse_kd_loss, sparse_kd_loss
from loose_calls import step as step_arguments
from test_head import P, V, make
from torch._dynamo.testing import CompileCounterWithBackend

from kdcache.kernels import divergences as d
from kdcache.loss import operators
from kdcache.loss.chunks import Head
from kdcache.loss.fused import Projection
from kdcache.loss.modules import FusedSparseKD
from kdcache.loss.prepare import LossSettings


def compiled(function):
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def options_of(divergence: d.Divergence) -> dict:
    """`num_exact_P` where the divergence asks for it."""
    if not divergence.requirements.tail_sample:
        return {"divergence": divergence}
    return {"divergence": divergence, "entries": "unbiased", "num_exact_P": torch.arange(P) % 5}


@pytest.mark.slow
@pytest.mark.parametrize("divergence", [kind() for kind in d.DIVERGENCES.values()], ids=str)
def test_the_torch_path_of_every_divergence_compiles_without_a_graph_break(divergence):
    (hidden_PH, weight_VH, _), targets = make()
    options = options_of(divergence) | {"alpha": 0.5, "backend": "torch"}
    z_PV = (hidden_PH @ weight_VH.T).detach().requires_grad_()
    loss, expected = (f(lambda z: sparse_kd_loss(z, **targets, **options))(z_PV) for f in (compiled, lambda f: f))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, z_PV)[0], torch.autograd.grad(expected, z_PV)[0])


def assert_rows_compile_whole(backend: str, reduction: str = "none") -> None:
    (hidden_PH, weight_VH, _), targets = make()
    z_PV = (hidden_PH @ weight_VH.T).detach().requires_grad_()
    options = {"divergence": d.SkewKL(0.2), "alpha": 0.5, "backend": backend, "reduction": reduction}
    loss, expected = (
        f(lambda z: sparse_kd_loss(z, **targets, **options).square().sum())(z_PV) for f in (compiled, lambda f: f)
    )
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, z_PV)[0], torch.autograd.grad(expected, z_PV)[0])


@pytest.mark.slow
@pytest.mark.parametrize("place", ["token_ids_PK", "target_ids_P"])
def test_an_id_beyond_the_vocabulary_is_nan_in_a_traced_graph_that_cannot_look_for_it(place):
    (hidden_PH, weight_VH, _), targets = make()
    z_PV = (hidden_PH @ weight_VH.T).detach().requires_grad_()
    options = {"alpha": 0.5, "reduction": "none", "backend": "torch"}
    expected_P = sparse_kd_loss(z_PV, **targets, **options)
    spoiled = {**targets, place: targets[place].clone()}
    spoiled[place].view(P, -1)[3, 0] = V
    losses_P = compiled(lambda z, t: sparse_kd_loss(z, **t, **options))(z_PV, spoiled)
    assert losses_P.isnan().nonzero().flatten().tolist() == [3]
    (gradient_PV,), (expected_PV,) = torch.autograd.grad(losses_P.sum(), z_PV), torch.autograd.grad(expected_P.sum(), z_PV)
    assert gradient_PV[3].isnan().all()
    others_P = torch.arange(P) != 3
    torch.testing.assert_close(gradient_PV[others_P], expected_PV[others_P])


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_numba_path_is_one_operator_in_the_graph(reduction):
    assert_rows_compile_whole("numba", reduction)


def assert_fused_compiles_whole(backend: str, **options) -> None:
    """One graph, the numbers of the eager loss, gradients through what is before and after it."""
    leaves, targets = make()
    options = {"alpha": 0.5, "chunk_positions": 8, "backend": backend, "head": Head(softcap=5.0, vocab_size=V), **options}

    def step(hidden_PH, weight_VH, bias_V):
        return fused_sparse_kd_loss(hidden_PH.tanh(), weight_VH, bias=bias_V, **targets, **options) * 2

    loss, expected = compiled(step)(*leaves), step(*leaves)
    torch.testing.assert_close(loss, expected)
    wanted = torch.autograd.grad(expected, leaves)
    for gradient, want in zip(torch.autograd.grad(loss, leaves), wanted, strict=True):
        torch.testing.assert_close(gradient, want)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("options", [{}, options_of(d.TailAwareKL()), {"entries": "unbiased", "tail": "drop"}], ids=len)
def test_the_fused_loss_is_one_operator_in_a_models_graph(backend, options):
    assert_fused_compiles_whole(backend, **options)


@pytest.mark.slow
def test_a_compiled_model_with_a_frozen_head_gets_no_gradient_for_it():
    (hidden_PH, weight_VH, _), targets = make()
    weight_VH.requires_grad_(False)

    def step(hidden_PH):
        return fused_sparse_kd_loss(hidden_PH.tanh(), weight_VH, **targets, backend="torch", chunk_positions=8)

    gradients = [torch.autograd.grad(f(hidden_PH), hidden_PH)[0] for f in (compiled(step), step)]
    torch.testing.assert_close(*gradients)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("dynamic", [None, True])
def test_batches_of_every_size_share_a_graph(backend, dynamic):
    """Supervised positions are another number in every batch: one graph for the first, one for all others."""
    leaves, targets = make()
    loss = FusedSparseKD(alpha=0.5, temperature=1.0, settings=LossSettings(backend=backend))

    def step(hidden_PH, part):
        return loss(hidden_PH.tanh(), Projection(leaves[1], chunk_positions=8), **step_arguments(part))

    torch.compiler.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    function = torch.compile(step, fullgraph=True, backend=graphs, dynamic=dynamic)
    for num_positions in (P, 20, 9):
        part = {name: tensor[:num_positions].clone() for name, tensor in targets.items()}
        hidden_PH = leaves[0][:num_positions].detach().clone().requires_grad_()
        losses = [f(hidden_PH, part) for f in (function, step)]
        torch.testing.assert_close(*losses)
        torch.testing.assert_close(*[torch.autograd.grad(loss, hidden_PH)[0] for loss in losses])
    assert graphs.frame_count <= 2


def test_the_operators_keep_their_promises_to_torch():
    """Fake kernels and autograd of custom operators, by torch's own checks."""
    (hidden_PH, weight_VH, bias_V), t = make()
    scales_P = torch.ones(len(hidden_PH), dtype=torch.float64)
    tensors = (*(t[name] for name in ("token_ids_PK", "logprobs_PK", "tail_mass_P")), None, t["target_ids_P"], None, scales_P)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    logits_PV = (hidden_PH @ weight_VH.T).detach().requires_grad_()
    words, numbers = "bucket forward_kl numba exact", [0.5, 1.0]
    torch.library.opcheck(operators._over_logits, (logits_PV, *tensors, words, numbers, True), test_utils=tests)
    arguments = (
        hidden_PH,
        weight_VH,
        bias_V,
        *tensors,
        words,
        [1.0, 0.0, 0.0, *numbers],
        8,
        [True, False, True],
    )
    torch.library.opcheck(operators._fused, arguments, test_utils=tests)
