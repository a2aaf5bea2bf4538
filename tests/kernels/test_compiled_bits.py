"""Kernels give the same bits just compiled, from numba's on-disk cache, and compiled for narrower vectors: so a resumed run
equals an uninterrupted one.

Known defect of a caller that is loaded from disk: a callee that was not inlined resolves to another of its own compilations,
whose sums run in another order. `kdcache.compiled.inlined` forces inlining.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent.parent

PROGRAM = """
import hashlib, json, sys
sys.path[:0] = [TESTS]
import numpy as np
from contracts.kernels import make_problem
from kdcache.kernels import numba_kernels
from kdcache.kernels.divergences import _numba as _numba_divergences
from kdcache.kernels.base import Objective
from kdcache.kernels import divergences as d

digests, hits = {}, 0
problem = make_problem(7, 5003, 33)
for objective in (Objective(alpha=0.5), Objective(divergence=d.JensenShannon()), Objective("uniform", temperature=2.0)):
    for dtype in (np.float32, np.uint16):
        logits_PV, losses_P = problem.logits_PV.copy(), np.empty(7)
        if dtype is np.uint16:
            logits_PV = (logits_PV.view(np.uint32) >> 16).astype(np.uint16)
        numba_kernels.position_losses_and_gradients(logits_PV, problem.targets, objective, losses_P)
        key = f"{objective.divergence.name} {objective.tail} {np.dtype(dtype)}"
        digests[key] = hashlib.sha256(losses_P.tobytes() + logits_PV.tobytes()).hexdigest()
        hits += sum(numba_kernels._compiled_kernel(np.dtype(dtype)).stats.cache_hits.values())
print(json.dumps([digests, hits]))
"""


# What a processor of 2013 has; numba compiles for the one at hand where it is told nothing.
AVX2 = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx,+avx2,+fma,+f16c,+bmi,+bmi2"}


@pytest.mark.slow
def test_kernels_from_disk_and_for_narrower_vectors_give_the_bits_of_those_just_compiled(tmp_path):
    answers = []
    for settings in ({}, {}, AVX2):
        program = PROGRAM.replace("TESTS", repr(str(TESTS)))
        environment = {**os.environ, **settings, "NUMBA_CACHE_DIR": str(tmp_path)}
        done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
        answers.append(json.loads(done.stdout))
    (fresh, no_hits), (from_disk, hits), (narrower, _) = answers
    assert no_hits == 0
    assert hits > 0
    assert fresh == from_disk == narrower
