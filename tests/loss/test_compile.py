"""torch.compile around the losses: one graph, the same numbers. `aot_eager` needs no C++ compiler."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from loose_calls import fused_sparse_kd_loss, prepared, soft_targets, sparse_kd_loss
from loose_calls import step as step_arguments
from test_head import P, V, make
from torch._dynamo.testing import CompileCounterWithBackend

import kdcache
from kdcache.kernels import divergences as d
from kdcache.kernels.base import Objective
from kdcache.loss import operators
from kdcache.loss.chunks import Head
from kdcache.loss.divergence_sum import DivergenceSum, WeightedDivergence
from kdcache.loss.fused import Projection
from kdcache.loss.modules import FusedSparseKD
from kdcache.loss.prepare import LossSettings


def compiled(function):
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def options_of(divergence: d.Divergence) -> dict:
    """`num_exact_P` or `target_logprobs_P` where the divergence asks for it."""
    if divergence.requirements.target:
        return {"divergence": divergence, "target_logprobs_P": torch.full((P,), -5.0)}
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
    entries = {name: t[name] for name in ("token_ids_PK", "logprobs_PK", "tail_mass_P", "target_ids_P")}
    ready = replace(prepared(Objective("bucket", 0.5), "numba", **entries), num_values=1)
    written = operators._Written.of(ready)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    logits_PV = (hidden_PH @ weight_VH.T).detach().requires_grad_()
    rows = (logits_PV, written.tensors, written.text, written.floats, 2, True)
    torch.library.opcheck(operators._over_logits, rows, test_utils=tests)
    numbers = [1.0, 0.0, 0.0, *written.floats]
    fused = (hidden_PH, weight_VH, bias_V, written.tensors, written.text, numbers, [2, 8], [True, False, True])
    torch.library.opcheck(operators._fused, fused, test_utils=tests)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("entry", ["logits", "fused"])
def test_a_sum_of_divergences_is_one_graph_and_fills_its_values(backend, entry):
    (hidden_PH, weight_VH, _), targets = make()
    arguments = {"target_ids": targets["target_ids_P"], "settings": LossSettings(backend=backend)}
    tensors = [targets[name] for name in ("token_ids_PK", "logprobs_PK", "tail_mass_P")]
    teacher = soft_targets(*tensors, target_logprobs_P=torch.full((P,), -6.0))
    skew_P, weight_P = torch.linspace(0.1, 0.5, P), torch.linspace(0, 1, P)

    def step(hidden_PH, skew_P, weight_P):
        parts = [WeightedDivergence(d.SkewKL(skew_P)), WeightedDivergence(d.SelfEvolution(), weight_P)]
        total = DivergenceSum(parts, cross_entropy=weight_P)
        student = (hidden_PH.tanh(), weight_VH) if entry == "fused" else (hidden_PH.tanh() @ weight_VH.T,)
        call = kdcache.fused_sparse_kd_loss if entry == "fused" else kdcache.sparse_kd_loss
        loss = call(*student, teacher, divergence=total, **arguments)
        return loss, total.values, total.measures["1.hard_share"]

    found, expected = compiled(step)(hidden_PH, skew_P, weight_P), step(hidden_PH, skew_P, weight_P)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(one[0], hidden_PH)[0] for one in (found, expected)]
    torch.testing.assert_close(*gradients)
