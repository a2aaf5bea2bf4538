"""torch.compile around the losses: one graph, the same numbers. `aot_eager` needs no C++ compiler."""

from __future__ import annotations

import pytest
import torch
from test_head import V, make

from kdcache.kernels import divergences as d
from kdcache.loss import operators
from kdcache.loss.chunks import Head
from kdcache.loss.fused import fused_sparse_kd_loss
from kdcache.loss.sparse_kd import sparse_kd_loss


def compiled(function, *, fullgraph=True):
    torch.compiler.reset()
    return torch.compile(function, fullgraph=fullgraph, backend="aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize(
    "divergence", [kind() for kind in d.DIVERGENCES.values() if not kind.requirements.tail_sample], ids=str
)
def test_the_torch_path_of_every_divergence_compiles_without_a_graph_break(divergence):
    (hidden_PH, weight_VH, _), targets = make()
    options = {"divergence": divergence, "alpha": 0.5, "backend": "torch"}
    z_PV = (hidden_PH @ weight_VH.T).detach().requires_grad_()
    loss, expected = (f(lambda z: sparse_kd_loss(z, **targets, **options))(z_PV) for f in (compiled, lambda f: f))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, z_PV)[0], torch.autograd.grad(expected, z_PV)[0])


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_numba_path_is_one_operator_in_the_graph(reduction):
    (hidden_PH, weight_VH, _), targets = make()
    z_PV = (hidden_PH @ weight_VH.T).detach().requires_grad_()
    options = {"divergence": d.SkewKL(0.2), "alpha": 0.5, "backend": "numba", "reduction": reduction}
    loss, expected = (
        f(lambda z: sparse_kd_loss(z, **targets, **options).square().sum())(z_PV) for f in (compiled, lambda f: f)
    )
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, z_PV)[0], torch.autograd.grad(expected, z_PV)[0])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch's, at the break
@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_the_fused_loss_compiles_within_a_model(backend):
    """The torch backend, which has its gradient from autograd, breaks the graph."""
    leaves, targets = make()
    options = {"alpha": 0.5, "chunk_size": 8, "backend": backend, "head": Head(softcap=5.0, vocab_size=V)}

    def step(hidden_PH, weight_VH, bias_V):
        return fused_sparse_kd_loss(hidden_PH.tanh(), weight_VH, bias=bias_V, **targets, **options) * 2

    loss, expected = compiled(step, fullgraph=backend == "numba")(*leaves), step(*leaves)
    torch.testing.assert_close(loss, expected)
    wanted = torch.autograd.grad(expected, leaves)
    for gradient, want in zip(torch.autograd.grad(loss, leaves), wanted, strict=True):
        torch.testing.assert_close(gradient, want)


def test_the_operators_keep_their_promises_to_torch():
    """Fake kernels and autograd of custom operators, by torch's own checks."""
    (hidden_PH, weight_VH, bias_V), t = make()
    t = dict(list(t.items())[:4])
    teacher, scales_P = tuple(t.values()), torch.ones(len(hidden_PH), dtype=torch.float64)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    logits_PV = (hidden_PH @ weight_VH.T).detach().requires_grad_()
    words, numbers = "bucket forward_kl numba", [0.5, 1.0]
    torch.library.opcheck(operators._rows, (logits_PV, *teacher, None, scales_P, words, numbers, True), test_utils=tests)
    arguments = (
        hidden_PH,
        weight_VH,
        bias_V,
        *teacher,
        None,
        scales_P,
        words,
        [1.0, 0.0, 0.0, *numbers],
        8,
        [True, False, True],
    )
    torch.library.opcheck(operators._fused, arguments, test_utils=tests)
