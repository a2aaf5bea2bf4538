"""Freed memory is used again instead of being mapped afresh; in a process of its own, since it cannot be undone."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

pytest.importorskip("torch")

PROGRAM = """
import resource
import numpy as np
from kdcache.teacher.vllm.worker import keep_freed_memory
def faults():
    np.ones(20 * 2**20, np.uint8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5): np.ones(20 * 2**20, np.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
mapped = faults()
assert keep_freed_memory()
print(mapped, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc")
def test_a_freed_array_leaves_its_pages_to_the_next():
    # In small pages where the system has large ones for the asking, which NumPy does otherwise.
    environment = {"NUMPY_MADVISE_HUGEPAGE": "0"}
    command = [sys.executable, "-c", PROGRAM]
    mapped, kept = map(int, subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.split())
    assert kept < 100 < mapped
