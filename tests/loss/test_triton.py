"""The Triton kernels in Triton's interpreter, in a process of their own: the environment decides when triton is imported.

That they compile for a GPU: tests/kernels/test_triton_compiles.py. Nothing here has run on one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from triton_interpreter import skip_where_it_is_broken

TESTS = Path(__file__).parent.parent

NAMES = (
    "keep_the_contract",
    "keep_the_contract_of_sums",
    "agree_with_the_reference_on_every_divergence",
    "leave_no_memory_unwritten",
    "round_half_precision_once",
    "equal_the_fused_loss_of_torch",
    "leave_logits_alone",
    "take_half_logprobs",
    "keep_ids_beyond_the_vocabulary_to_their_row",
    "compile_into_one_graph",
)

PROGRAM = """
import json, sys, traceback
sys.path[:0] = [TESTS, TESTS + "/loss"]
import torch
from kdcache.kernels import triton_kernels
import triton_promises

torch.set_num_threads(1)
triton_kernels.BLOCK_SIZE = 64
broken = {}
for name in NAMES:
    try:
        getattr(triton_promises, name)()
    except BaseException:
        broken[name] = traceback.format_exc()[-3000:]
    print("TRIED", name, flush=True)
print("BROKEN", json.dumps(broken))
"""


@pytest.fixture(scope="module")
def broken() -> dict[str, str]:
    """What went wrong, by promise. One process for all: it takes longer to import torch than to keep most of them."""
    pytest.importorskip("triton")
    program = PROGRAM.replace("TESTS", repr(str(TESTS))).replace("NAMES", repr(NAMES))
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    if result.returncode:
        skip_where_it_is_broken()
    assert result.returncode == 0, result.stdout[-300:] + result.stderr[-3000:]
    failures = json.loads(result.stdout.rpartition("BROKEN")[2])
    if failures:
        skip_where_it_is_broken()
    return failures


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_triton_kernels(name, broken):
    assert name not in broken, broken[name]
