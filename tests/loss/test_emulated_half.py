"""Half precision where a CPU only emulates it: no product of it runs in the loss, and nothing gets less accurate.

Whether it is emulated is measured; the tests say so in its place, and a process restricted to AVX2 shows the measured one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from loose_calls import fused_sparse_kd_loss, sparse_kd_loss
from test_fused import Case, with_gradients
from torch.utils._python_dispatch import TorchDispatchMode

from kdcache import half_precision
from kdcache.loss import chunks
from kdcache.loss.chunks import Head, default_chunk_positions

ROOT = Path(__file__).parents[2]
HALF = (torch.bfloat16, torch.float16)
PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm", "linear", "matmul")
HEADS = [Head(), Head(softcap=5.0), Head(logit_scale=0.5), Head(float32_logits=True)]


class Products(TorchDispatchMode):
    """Notes the dtypes of what is multiplied, and the largest tensor of float32."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()
        self.most_elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function._schema.name.removeprefix("aten::") in PRODUCTS:
            self.dtypes |= {each.dtype for each in args if isinstance(each, torch.Tensor)}
        if isinstance(result, torch.Tensor) and result.dtype == torch.float32:
            self.most_elements = max(self.most_elements, result.untyped_storage().nbytes() // 4)
        return result


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch):
    """Say whether half precision is."""

    def say(is_so: bool) -> None:
        monkeypatch.setattr(half_precision, "float32_gain", lambda dtype: 50.0 if is_so else 0.5)

    return say


def whole_in_float64(case: Case, head: Head) -> list[torch.Tensor]:
    leaves = [leaf.detach().double().requires_grad_() for leaf in case.leaves]
    logits_PV = (leaves[0] @ leaves[1].T + leaves[2]) * head.logit_scale
    if head.softcap is not None:
        logits_PV = head.softcap * (logits_PV / head.softcap).tanh()
    return with_gradients(sparse_kd_loss(logits_PV, **case.targets, backend="torch", alpha=0.7), tuple(leaves))


def fused(case: Case, head: Head, **options) -> list[torch.Tensor]:
    leaves = case.leaves
    loss = fused_sparse_kd_loss(*leaves[:2], bias=leaves[2], **case.targets, head=head, alpha=0.7, **options)
    return with_gradients(loss, leaves)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("chunk_positions", [8, None])
def test_no_half_product_runs_and_every_number_is_nearer_to_float64(dtype, chunk_positions, emulated, monkeypatch):
    monkeypatch.setattr(chunks, "_WIDENED_ELEMENTS", 16 * 13)  # several blocks, the last one smaller
    for head in HEADS:
        case, numbers = Case(dtype), {}
        exact = whole_in_float64(case, head)
        for is_so in (False, True):
            emulated(is_so)
            with Products() as products:
                numbers[is_so] = fused(case, head, chunk_positions=chunk_positions, backend="torch")
            # The row losses multiply no matrices; the logits' product may be float32 in any case.
            assert (dtype in products.dtypes) is not is_so
        for half, single, right in zip(numbers[False], numbers[True], exact, strict=True):
            assert half.dtype == single.dtype
            errors = [float((each.double() - right).norm() / right.norm()) for each in (half, single)]
            assert errors[1] <= errors[0] + 1e-6, (head, errors)
            assert errors[1] < 0.6 * torch.finfo(dtype).eps, (head, errors)  # rounded once


def test_the_weight_is_widened_a_block_at_a_time(emulated, monkeypatch):
    """One chunk, so that dW needs no float32 sum: beside the logits, no float32 tensor is as large as the weight."""
    monkeypatch.setattr(chunks, "_WIDENED_ELEMENTS", 64 * 8)
    monkeypatch.setattr(chunks, "_SUMMED_ELEMENTS", 64 * 8)
    emulated(True)
    hidden_PH, weight_VH = (torch.randn(n, 64, dtype=torch.bfloat16, requires_grad=True) for n in (4, 2000))
    targets = {"target_ids_P": torch.zeros(4, dtype=torch.int64), "alpha": 0.0}
    with Products() as products:
        fused_sparse_kd_loss(hidden_PH, weight_VH, **targets, backend="torch").backward()
    assert products.dtypes == {torch.float32}
    assert 4 * 2000 <= products.most_elements < 2000 * 64 / 4


def test_chunks_of_emulated_half_precision_take_the_same_bytes(emulated):
    for is_so, rows in ((False, 1024), (True, 512)):
        emulated(is_so)
        assert default_chunk_positions(torch.zeros(1, 1, dtype=torch.bfloat16), 32_000) == rows
        assert default_chunk_positions(torch.zeros(1, 1), 32_000) == 512


def _restricted() -> dict[str, str]:
    """The environment of KDCACHE_CPU=avx2, as tools/test makes it."""
    script = "source tools/processor/restrict && env -0"
    environment = os.environ | {"KDCACHE_CPU": "avx2"}
    listed = subprocess.run(
        ["bash", "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    ).stdout
    return dict(line.split("=", 1) for line in listed.split("\0") if "=" in line)


def test_on_a_processor_that_emulates_it_the_measured_choice_is_float32():
    """The same bits as where float32 is chosen by hand; and the module decides by itself."""
    program = """
import torch
from test_emulated_half import Case, Products, Head, fused
from kdcache import half_precision
for dtype in (torch.bfloat16, torch.float16):
    assert half_precision.is_emulated(dtype), half_precision.float32_gain(dtype)
    with Products() as products:
        measured = fused(Case(dtype), Head(), chunk_positions=8, backend="torch")
    assert products.dtypes == {torch.float32}, products.dtypes
    kept, half_precision.float32_gain = half_precision.float32_gain, lambda dtype: 50.0
    for one, two in zip(measured, fused(Case(dtype), Head(), chunk_positions=8, backend="torch"), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)
    half_precision.float32_gain = kept
"""
    environment = _restricted()
    folders = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "loss"), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(folders)
    result = subprocess.run([sys.executable, "-c", program], check=False, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
