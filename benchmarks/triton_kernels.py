"""How many registers does each Triton kernel of ours take on each GPU, and does any spill? No GPU is needed.

Method: the fused loss runs over fake CUDA tensors (torch's FakeTensorMode: shapes and dtypes, no memory), and each launch is
noted instead of made. So what is compiled is what a GPU would be asked to run: dtypes, constants, options, and which pointers
and numbers are multiples of 16, for which Triton makes code of its own. Kernels are found in
`kdcache.kernels.triton_kernels`; one that no launch reaches is an error. Compute capabilities 8.0 (A100), 9.0 (H100, H200),
10.0 (B200) by ptxas and AMD's gfx942 (MI300) by LLVM, both in Triton's own package; registers are read out of the machine code.

    python benchmarks/triton_kernels.py [--out benchmarks/results]
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from fake_gpu import FakeGpu

NVIDIA = {"sm_80": 80, "sm_90": 90, "sm_100": 100}
TARGETS = (*NVIDIA, "gfx942")
MAX_REGISTERS = 128
"""Per thread: two programs of 8 warps then fit a multiprocessor's 65,536, so that one reads while the other waits."""

CASES = [
    (dtype, 151_936, 64) for dtype in (torch.bfloat16, torch.float16, torch.float32)
] + [(torch.bfloat16, 50_257, 64), (torch.bfloat16, 151_936, 1000)]  # fmt: skip
"""dtype, vocabulary (the second is odd, so that rows begin anywhere) and entries of a position."""

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64"}


@dataclass(frozen=True)
class Variant:
    """One kernel as one kind of launch has it compiled: Triton's types, constants, multiples of 16, and options."""

    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    multiples: tuple[int, ...]
    options: tuple[tuple[str, Any], ...]

    def __str__(self) -> str:
        constants = ", ".join(f"{name} {value}" for name, value in self.constants)
        types = [kind.removeprefix("*") for name, kind in self.signature if name == "logits"]
        strides = [i for i, (name, _) in enumerate(self.signature) if name == "stride"]
        rows = "aligned rows" if set(strides) <= set(self.multiples) else "rows anywhere"
        return f"{self.kernel} | {', '.join([*types, rows])} | {constants}"


@dataclass(frozen=True)
class Resources:
    """What a program of a kernel takes."""

    registers: int
    spilled_bytes: int
    shared_bytes: int


def kernels() -> dict[str, Any]:
    """Every Triton kernel of the house, by name."""
    from triton.runtime.jit import JITFunction

    from kdcache.kernels import triton_kernels

    return {name: found for name, found in vars(triton_kernels).items() if isinstance(found, JITFunction)}


class _Noted:
    """In a kernel's place: what it is launched with is kept."""

    def __init__(self, kernel: Any, found: dict[Variant, None]) -> None:
        self._kernel, self._found = kernel, found

    def __getitem__(self, grid: Any) -> Any:
        return self._note

    def _note(self, *positional: Any, **named: Any) -> None:
        parameters = self._kernel.params
        names = [parameter.name for parameter in parameters]
        values = dict(zip(names, positional, strict=False)) | {name: named.pop(name) for name in names if name in named}
        assert list(values) == names or set(values) == set(names), f"{self._kernel.__name__} takes {names}, not {list(values)}"
        constants = tuple((p.name, values[p.name]) for p in parameters if p.is_constexpr)
        signature = tuple((p.name, "constexpr" if p.is_constexpr else _type(values[p.name])) for p in parameters)
        multiples = tuple(i for i, p in enumerate(parameters) if not p.is_constexpr and _is_multiple(values[p.name]))
        self._found[Variant(self._kernel.__name__, signature, constants, multiples, tuple(named.items()))] = None


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"*{DTYPES[value.dtype]}"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _is_multiple(value: Any) -> bool:
    """Of 16. Tensors are: the caching allocator gives nothing else, and rows of a chunk begin at its start."""
    return isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0)


@contextmanager
def noted_launches() -> Iterator[dict[Variant, None]]:
    """While it lasts no kernel runs; the launches are in what it gives."""
    from kdcache.kernels import triton_kernels
    from kdcache.loss.steps import triton_passes

    found: dict[Variant, None] = {}
    stand_in = SimpleNamespace(**vars(triton_kernels) | {name: _Noted(kernel, found) for name, kernel in kernels().items()})
    original = triton_passes._kernels
    triton_passes._kernels = lambda: stand_in
    try:
        yield found
    finally:
        triton_passes._kernels = original


def variants() -> list[Variant]:
    """All that the loss launches; every kernel is among them."""
    with noted_launches() as found, FakeGpu():
        for dtype, vocab, entries in CASES:
            for temperature in (1.0, 2.0):
                _step(dtype, vocab, entries, temperature)
    if missing := sorted(kernels().keys() - {variant.kernel for variant in found}):
        raise RuntimeError(f"no launch that is tried reaches the Triton kernels {', '.join(missing)}: add one to variants()")
    return list(found)


def _step(dtype: torch.dtype, vocab: int, entries: int, temperature: float) -> None:
    """Forward and gradients of one chunk of 32 rows; below autograd, which asks for a device that is not there."""
    from kdcache.format.soft_targets import SoftTargets
    from kdcache.kernels.base import Objective
    from kdcache.loss.chunks import Head, Product, run_chunks
    from kdcache.loss.prepared import alone
    from kdcache.loss.steps.step import make_step

    hidden_PH, weight_VH = (torch.empty(n, 64, dtype=dtype, device="cuda") for n in (32, vocab))
    ids_PK, logprobs_PK = torch.empty(32, entries, dtype=torch.int32, device="cuda"), torch.empty(32, entries, device="cuda")
    weights_P, target_ids_P = torch.empty(32, device="cuda"), torch.empty(32, dtype=torch.int64, device="cuda")
    teacher, objective = SoftTargets(ids_PK, logprobs_PK, weights_P, "exact"), Objective("bucket", 0.5, temperature=temperature)
    step = make_step(alone(teacher, objective, (target_ids_P, weights_P, weights_P), "triton"), vocab)
    run_chunks(Product(hidden_PH, weight_VH, None, Head()), step, (True, True, False), 32)


def compile_for(variant: Variant, target: str) -> Resources:
    """Compile it to machine code, and read there what it takes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    attributes = {(index,): [["tt.divisibility", 16]] for index in variant.multiples}
    source = ASTSource(kernels()[variant.kernel], dict(variant.signature), dict(variant.constants), attributes)
    gpu = GPUTarget("cuda", NVIDIA[target], 32) if target in NVIDIA else GPUTarget("hip", target, 64)
    made: Any = triton.compile(source, target=gpu, options=dict(variant.options))
    if target in NVIDIA:
        return _of_cubin(made.asm["cubin"], made.metadata.shared)
    said = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count|sgpr_spill_count):\s*(\d+)", made.asm["amdgcn"]))
    spilled = 4 * (int(said["vgpr_spill_count"]) + int(said["sgpr_spill_count"]))
    return Resources(int(said["vgpr_count"]), spilled, made.metadata.shared)


def _of_cubin(cubin: bytes, shared: int) -> Resources:
    """By the cuobjdump of Triton's package; stack and local memory are where registers spill to."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", said)}
    return Resources(found["REG"], found["STACK"] + found["LOCAL"], shared)


def table() -> str:
    """Markdown: a line per variant."""
    import triton

    lines = ["<!-- made by benchmarks/triton_kernels.py -->", ""]
    said = "Registers per thread (of gfx942: vector registers); shared memory in bytes, on sm_90."
    lines += [f"Triton {triton.__version__}. {said}", ""]
    lines += ["| kernel | logits | constants | " + " | ".join(TARGETS) + " | shared |", "|---" * (4 + len(TARGETS)) + "|"]
    spills = []
    for variant in variants():
        found = {target: compile_for(variant, target) for target in TARGETS}
        spills += [f"{variant} on {target}: {r.spilled_bytes} bytes" for target, r in found.items() if r.spilled_bytes]
        registers = " | ".join(str(found[target].registers) for target in TARGETS)
        lines.append(f"| {variant} | {registers} | {found['sm_90'].shared_bytes} |")
    return "\n".join([*lines, "", *(f"Spilled: {text}" for text in spills or ["nothing"]), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of triton_kernels.md")
    args = parser.parse_args()
    if os.environ.pop("TRITON_INTERPRET", None):
        sys.exit("TRITON_INTERPRET is set: nothing would be compiled")
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder  # what another release compiled is not taken from the usual one
        made = table()
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "triton_kernels.md").write_text(made)
    print(made)


if __name__ == "__main__":
    main()
