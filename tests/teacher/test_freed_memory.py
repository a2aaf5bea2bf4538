"""Freed memory is used again instead of being mapped anew; in a process of its own, since it cannot be undone."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource
import sys
import numpy as np
from kdcache.teacher.vllm.freed_memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def fill(): np.ones(20 * 2**20, np.uint8)
fill()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5): fill()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc")
def test_a_freed_array_leaves_its_pages_to_the_next():
    # In small pages where the system has large ones for the asking, which NumPy does otherwise.
    command, environment = [sys.executable, "-c", PROGRAM], {"NUMPY_MADVISE_HUGEPAGE": "0"}
    faults = [
        int(subprocess.run([*command, word], env=environment, check=True, capture_output=True, text=True).stdout)
        for word in ("keep", "leave")
    ]
    assert faults[0] < 100 < faults[1]
