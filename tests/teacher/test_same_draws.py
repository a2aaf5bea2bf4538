"""Draws are the same on every processor: digests of what they were when this was written, here and without AVX and fma."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from selection_cases import BACKENDS, of_kind, select  # noqa: E402

from kdcache.config.capture import GenerateConfig  # noqa: E402
from kdcache.teacher.select import _numba_blocks, _torch_draws, torch_answers  # noqa: E402
from kdcache.teacher.select.exact_weights import STRIP  # noqa: E402

CASES = {
    "top_p_k": {"p": 0.8, "k": 200},
    "sampled": {"num_draws": 400},
    "threshold": {"tau": 0.0005},
    "top_k_sampled": {"k": 9, "num_draws": 400},
}
TESTS = Path(__file__).parent.parent
# A processor of 2009: four lanes, no fma. What torch has there, and glibc's functions for it.
OLD = {
    "NUMBA_CPU_NAME": "nehalem",
    "NUMBA_CPU_FEATURES": "+sse4.2,+popcnt",
    "ATEN_CPU_CAPABILITY": "default",
    "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX2,-FMA,-AVX512F",
}


def some_logits() -> torch.Tensor:
    """Whole multiples of 2^-20, so that no processor rounds them; of many sizes, with ties and with tokens that cannot come."""
    rng = np.random.default_rng(3)
    logits = rng.integers(-(2**20), 2**20, (12, 5003)).astype(np.float32) * np.float32(2.0**-17)
    logits *= np.array([0, 0.125, 0.25, 0.5, 1, 1, 1, 2, 2, 4, 8, 16], np.float32)[:, None]
    logits[:, rng.integers(0, 5003, 50)] = -np.inf
    return torch.from_numpy(logits)


def drawn_digests(backend: str) -> dict[str, str]:
    """Of ids and counts; the other numbers are rounded by each library as it likes."""
    digests = {}
    for kind, params in CASES.items():
        seed = {} if kind == "top_p_k" else {"seed": 7}
        record = select(some_logits()[1:], of_kind(kind, **params, **seed), backend)
        words = (record.token_ids_E.astype("<i4"), record.offsets_P1.astype("<i8"))
        digests[kind] = hashlib.sha256(b"".join(array.tobytes() for array in words)).hexdigest()[:16]
    return digests


def written_digest() -> str:
    """Of the tokens that a teacher writes after some logits, under every filter."""
    uniform_B = torch.from_numpy(np.random.default_rng(5).random(300))
    logits_BV = some_logits()[torch.arange(300) % 11 + 1]
    drawn = []
    for filters in ({}, {"temperature": 0.75, "min_p": 1e-4, "top_k": 900, "top_p": 0.95}):
        drawn += [torch_answers.draw_tokens(part, GenerateConfig(**filters), uniforms).numpy().astype("<i4").tobytes()
                  for part, uniforms in zip(logits_BV.split(100), uniform_B.split(100), strict=True)]  # fmt: skip
    return hashlib.sha256(b"".join(drawn)).hexdigest()[:16]


EXPECTED = {
    "top_p_k": "37925984aace384b",
    "sampled": "63277a2a18cdd282",
    "threshold": "82240b601cfdf8f7",
    "top_k_sampled": "205ea7586c474e45",
}
WRITTEN = "e6053ac2ba865b99"


@pytest.mark.parametrize("backend", BACKENDS)
def test_draws_are_those_of_every_other_processor_and_backend(backend: str):
    assert drawn_digests(backend) == EXPECTED


def test_what_a_teacher_writes_is_drawn_the_same_everywhere():
    assert written_digest() == WRITTEN


@pytest.mark.slow
def test_draws_without_avx_and_fma_are_the_same():
    program = (
        f"import json, sys; sys.path[:0] = [{str(TESTS)!r}, {str(TESTS / 'teacher')!r}]\n"
        "import test_same_draws as t\n"
        "print(json.dumps([t.drawn_digests('numba'), t.drawn_digests('torch'), t.written_digest()]))"
    )
    # What numba has compiled for that processor is kept beside what it has for this one: the cache's index names it.
    environment = {**os.environ, **OLD}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == [EXPECTED, EXPECTED, WRITTEN]


def test_weights_and_their_sums_are_the_same_bits_in_numba_and_in_torch():
    logits = some_logits()[:, : 5003 // STRIP * STRIP].nan_to_num(neginf=-torch.inf)
    tops = logits.amax(dim=-1, keepdim=True)
    theirs = _torch_draws.weights_of(logits, tops)
    sums = _torch_draws.sum_strips(theirs)
    for row, top, weights, expected in zip(logits.numpy(), tops.numpy()[:, 0], theirs.numpy(), sums.numpy(), strict=True):
        found, found_sums = np.empty(len(row), np.float32), np.empty(len(row) // STRIP, np.float32)
        for start in range(0, len(row), STRIP):
            _numba_blocks.weigh(row[start : start + STRIP].view(np.int32), top, found[start : start + STRIP])
        _numba_blocks.sum_strips(row.view(np.int32), top, found_sums)
        np.testing.assert_array_equal(found.view(np.int32), weights.view(np.int32))
        np.testing.assert_array_equal(found_sums.view(np.int32), expected.view(np.int32))
