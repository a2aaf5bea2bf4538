"""The fused loss at real sizes on a GPU that is not there: devices, waits, memory and launches; see benchmarks/fake_gpu.py."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from loose_calls import fused_sparse_kd_loss, sparse_kd_loss

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import triton_kernels
from fake_gpu import FakeGpu, peak_of

from kdcache.format.soft_targets import SoftTargets
from kdcache.kernels.base import Objective
from kdcache.kernels.divergences import DIVERGENCES
from kdcache.loss.chunks import Head, Product, default_chunk_positions, run_chunks
from kdcache.loss.prepared import alone
from kdcache.loss.steps.step import make_step

MIB = 2**20
H, K = 2048, 64


def run(backend: str, vocab: int, objective: Objective, num_chunks: int = 2, head: Head | None = None) -> tuple[int, int, int]:
    """(bytes beyond the inputs, bytes of the logits' buffer, gradients and dW, launches of a chunk)."""
    if backend == "triton":
        pytest.importorskip("triton")
    quiet = triton_kernels.noted_launches() if backend == "triton" else nullcontext()
    with quiet, FakeGpu() as gpu:
        weight_VH = torch.empty(vocab, H, dtype=torch.bfloat16, device="cuda")
        chunk = default_chunk_positions(weight_VH, vocab)
        rows = chunk * num_chunks
        hidden_PH = torch.empty(rows, H, dtype=torch.bfloat16, device="cuda")
        ids_PK, logprobs_PK = torch.empty(rows, K, dtype=torch.int32, device="cuda"), torch.empty(rows, K, device="cuda")
        weights_P, target_ids_P = torch.empty(rows, device="cuda"), torch.empty(rows, dtype=torch.int64, device="cuda")
        num_exact_P = torch.empty(rows, dtype=torch.int64, device="cuda")
        teacher = SoftTargets(ids_PK, logprobs_PK, weights_P, "mixed", num_exact_P)
        step = make_step(alone(teacher, objective, (target_ids_P, weights_P, weights_P), backend), vocab)
        product = Product(hidden_PH, weight_VH, None, head or Head())
        peak, launches = peak_of(lambda: run_chunks(product, step, (True, True, False), chunk), gpu)
    return peak, 2 * chunk * vocab + 4 * vocab * H + 2 * rows * H, launches // num_chunks


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(("vocab", "chunk"), [(151_936, 4096), (32_000, 16_384)])
def test_a_step_takes_one_buffer_of_logits_its_gradients_and_some_blocks(backend, vocab, chunk):
    """4096 rows of 151,936 logits made three float32 temporaries of a chunk, 7 GiB, where the torch backend did not split."""
    assert default_chunk_positions(torch.empty(1, 1, dtype=torch.bfloat16, device="meta"), vocab) == chunk
    for objective in (Objective("bucket", 0.5), Objective("uniform", 0.5, temperature=2.0)):
        peak, needed, launches = run(backend, vocab, objective)
        assert needed <= peak <= needed + (320 if backend == "torch" else 96) * MIB
        assert backend == "torch" or launches <= 260


@pytest.mark.slow
def test_no_divergence_waits_for_the_device_or_leaves_it():
    for divergence in DIVERGENCES.values():
        (tail, *_) = divergence().requirements.tails
        _, _, launches = run("torch", 1000, Objective(tail, 0.5, divergence()), num_chunks=1)
        assert launches > 0


def test_capped_logits_take_a_second_buffer_in_float32():
    peak, needed, _ = run("torch", 32_000, Objective("bucket"), head=Head(softcap=30.0))
    logits = 2 * 16_384 * 32_000
    assert needed + 2 * logits <= peak <= needed + 4 * logits + 64 * MIB


def test_a_fake_gpu_sees_what_it_is_for():
    with FakeGpu() as gpu:
        tensor = torch.empty(1000, device="cuda")
        for spoiled in (
            tensor.cpu,
            lambda: tensor + torch.ones(1000),
            lambda: tensor[tensor > 0],
            lambda: tensor.max().item(),
        ):
            with pytest.raises(Exception):  # noqa: B017 - of torch's own, each another
                spoiled()
        assert gpu.mark() == 4000
        assert peak_of(lambda: (tensor + 1) * 2, gpu) == (8000, 2)
        assert gpu.bytes == 4000


@pytest.mark.parametrize("retain", [True, False])
def test_the_last_backward_writes_over_the_saved_gradient_and_an_earlier_one_does_not(retain):
    torch.manual_seed(0)
    hidden_PH, weight_VH = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    target_ids_P = torch.arange(6)
    loss = fused_sparse_kd_loss(hidden_PH, weight_VH, target_ids_P=target_ids_P, alpha=0.0)
    address, before_VH = loss.grad_fn.saved_tensors[1].data_ptr(), loss.grad_fn.saved_tensors[1].clone()
    (3 * loss).backward(retain_graph=retain)
    torch.testing.assert_close(weight_VH.grad, 3 * before_VH)
    assert (weight_VH.grad.data_ptr() == address) == (not retain)
    if retain:
        torch.testing.assert_close(loss.grad_fn.saved_tensors[1], before_VH, rtol=0, atol=0)
        (3 * loss).backward()
        torch.testing.assert_close(weight_VH.grad, 6 * before_VH)


@pytest.mark.parametrize(
    "options", [{}, {"divergence": "reverse_kl", "alpha": 0.5}, {"temperature": 2.0, "alpha": 0.5}], ids=str
)
def test_the_public_losses_check_their_arguments_without_waiting(options):
    """Forward alone: autograd would ask for the device."""
    with FakeGpu(), torch.no_grad():
        hidden_PH, weight_VH = (torch.empty(n, 8, dtype=torch.bfloat16, device="cuda") for n in (12, 300))
        ids_PK, logprobs_PK = torch.empty(12, 5, dtype=torch.int64, device="cuda"), torch.empty(12, 5, device="cuda")
        floats_P, target_ids_P = torch.empty(12, device="cuda"), torch.empty(12, dtype=torch.int64, device="cuda")
        teacher = (ids_PK, logprobs_PK, floats_P)
        more = {"target_ids_P": target_ids_P, "weights_P": floats_P, "num_exact_P": target_ids_P, **options}
        more |= {"log_z_P": floats_P} if "temperature" in options else {}
        losses = [fused_sparse_kd_loss(hidden_PH, weight_VH, *teacher, **more)]
        logits_PV = hidden_PH @ weight_VH.T
        losses += [sparse_kd_loss(logits_PV, *teacher, **more, reduction=kind) for kind in ("mean", "sum", "none")]
        assert [loss.is_cuda for loss in losses] == [True] * 4
