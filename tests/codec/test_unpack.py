"""The compiled loop over packed entries gives what the bit stream's definition and NumPy give."""

import os
import subprocess
import sys

import numpy as np
import pytest

from kdcache.codec.bit_stream import pack_bits_reference
from kdcache.codec.numba_unpack import Unpacking, unpack_many

COUNTS_P = [9, 9, 9, 3, 0, 9, 9, 8, 9, 1, 9, 9, 9, 9, 9, 9]
OFFSETS_P1 = np.append(0, np.cumsum(COUNTS_P)).astype(np.int64)


def check(width: int, kept: np.ndarray, seed: int) -> None:
    rng = np.random.default_rng(seed)
    ids_E = rng.integers(0, 2**width, OFFSETS_P1[-1], np.int64).astype(np.int32)
    halves_E = (-10 * rng.random(len(ids_E))).astype(np.float16)
    ids_PK = np.full((len(kept), 9), 77, np.int32)
    logprobs_PK = np.full((len(kept), 9), 7, np.float32)
    job = Unpacking.of(pack_bits_reference(ids_E, width), halves_E, (OFFSETS_P1, kept), (ids_PK, logprobs_PK))
    assert unpack_many([job], width)[0] == max(ids_E[OFFSETS_P1[p] : OFFSETS_P1[p + 1]].max(initial=-1) for p in kept)
    for q, p in enumerate(kept):
        entries, padding = slice(OFFSETS_P1[p], OFFSETS_P1[p + 1]), 9 - COUNTS_P[p]
        np.testing.assert_array_equal(ids_PK[q], [*ids_E[entries], *[-1] * padding])
        np.testing.assert_array_equal(logprobs_PK[q], [*halves_E[entries].astype(np.float32), *[-np.inf] * padding])


def check_all() -> None:
    for width in range(1, 32):
        check(width, np.arange(len(COUNTS_P)), seed=width)
        check(width, np.array([0, 1, 3, 4, 10, 11, 12, 15]), seed=width + 100)


def test_ids_of_every_width_at_every_bit_come_out_of_the_stream() -> None:
    check_all()


@pytest.mark.slow
def test_processors_without_a_shuffle_of_bytes_unpack_the_same() -> None:
    code = "import test_unpack, kdcache.codec.numba_unpack as i; assert not i.HAS_SHUFFLES; test_unpack.check_all()"
    environment = {**os.environ, "NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "", "PYTHONPATH": os.path.dirname(__file__)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
