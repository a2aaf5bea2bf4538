"""Every Triton kernel compiles to machine code for real GPUs, without one; the interpreter takes what the compiler refuses."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

pytest.importorskip("triton")
triton_kernels = pytest.importorskip("triton_kernels")

pytestmark = pytest.mark.skipif(not triton_kernels.kernels(), reason="TRITON_INTERPRET is set: nothing would be compiled")


@pytest.mark.parametrize(
    "target", [pytest.param(name, marks=() if name == "sm_90" else pytest.mark.slow) for name in triton_kernels.TARGETS]
)
def test_every_kernel_compiles_without_a_spill_and_within_the_registers_of_two_programs(target, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for variant in triton_kernels.variants():
        found = triton_kernels.compile_for(variant, target)
        assert found.spilled_bytes == 0, variant
        assert 0 < found.registers <= triton_kernels.MAX_REGISTERS, variant


def test_a_kernel_that_no_launch_reaches_is_named(monkeypatch):
    from triton.runtime.jit import JITFunction

    from kdcache.kernels import triton_kernels as kernels

    monkeypatch.setattr(kernels, "added_later", JITFunction(kernels.put.fn), raising=False)
    with pytest.raises(RuntimeError, match="added_later"):
        triton_kernels.variants()


def test_no_other_file_has_triton_kernels():
    """They would not be found."""
    with_kernels = [
        path.name for path in (Path(__file__).parents[2] / "kdcache").rglob("*.py") if "@triton.jit" in path.read_text()
    ]
    assert with_kernels == ["triton_kernels.py"]


def test_what_spills_is_seen(tmp_path, monkeypatch):
    """The pass that needs the most registers, with half of what it needs."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    variant = next(v for v in triton_kernels.variants() if v.kernel == "tail_statistics")
    starved = replace(variant, options=(*variant.options, ("maxnreg", 32)))
    found = triton_kernels.compile_for(starved, "sm_90")
    assert found.spilled_bytes > 0
    assert found.registers <= 32
