"""The Triton kernels in Triton's interpreter, in a process of their own: the environment decides when triton is imported.

That they compile for a GPU: tests/kernels/test_triton_compiles.py. Nothing here has run on one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from triton_interpreter import skip_where_it_is_broken

TESTS = Path(__file__).parent.parent

PROGRAM = """
import sys
sys.path[:0] = [TESTS, TESTS + "/loss"]
import torch
from kdcache.kernels import _triton
import triton_promises

torch.set_num_threads(1)
_triton.BLOCK_SIZE = 64
getattr(triton_promises, NAME)()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "keep_the_contract",
        "agree_with_the_reference_on_every_divergence",
        "leave_no_memory_unwritten",
        "round_half_precision_once",
        "equal_the_fused_loss_of_torch",
        "leave_logits_alone",
        "take_half_logprobs",
        "keep_ids_beyond_the_vocabulary_to_their_row",
        "compile_into_one_graph",
    ],
)
def test_triton_kernels(name):
    pytest.importorskip("triton")
    program = PROGRAM.replace("TESTS", repr(str(TESTS))).replace("NAME", repr(name))
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    if result.returncode:
        skip_where_it_is_broken()
    assert result.returncode == 0, result.stderr[-3000:]
