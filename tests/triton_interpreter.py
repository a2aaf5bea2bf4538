"""Does Triton's interpreter run a plain kernel here? Releases before 3.9 do not with NumPy 2.4 and later. Not a test module."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


def skip_where_it_is_broken() -> None:
    """To be called when something failed in the interpreter: skip the test if a kernel that is none of ours fails as well."""
    command = [sys.executable, __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    probe = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if probe.returncode:
        last = (probe.stderr.strip().splitlines() or ["no reason given"])[-1]
        pytest.skip(f"Triton's interpreter fails with a plain kernel: {last}; a newer Triton or NumPy below 2.4 will do")


if __name__ == "__main__":
    import torch
    import triton
    import triton.language as tl

    @triton.jit
    def add_up(numbers, total, count, BLOCK: tl.constexpr):
        sums = tl.zeros([BLOCK], tl.float32)
        for start in range(0, count, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            sums += tl.load(numbers + columns, mask=columns < count, other=0.0)
        tl.store(total + tl.program_id(0), tl.sum(sums, axis=0))

    numbers, total = torch.arange(10, dtype=torch.float32), torch.zeros(1)
    add_up[(1,)](numbers, total, 10, BLOCK=4)
    assert total.item() == 45, total
