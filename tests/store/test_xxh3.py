"""The compiled digest is the definition's, for rows of any lengths."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcache.format.schema import sequence_digest
from kdcache.store.records.numba_xxh3 import SHORT_BYTES, sequence_digests

# Around the borders of what is copied together (64), of a block (1024) and of the lengths between them.
LENGTHS = st.one_of(
    st.none(),
    st.integers(0, 300),
    st.sampled_from([48, 56, 63, 64, 65, 120, 128, 1016, 1023, 1024, 1025, 4096]),
    st.integers(0, 5000),
)


def parts_of(values: list[np.ndarray | None]) -> np.ndarray:
    return np.array([(0, -1) if v is None else (v.__array_interface__["data"][0], len(v)) for v in values], np.int64)


def num_bytes(values: list[np.ndarray | None]) -> int:
    return sum(8 if v is None else 8 + len(v) for v in values)


def definition(values: list[np.ndarray | None]) -> int:
    names = [str(i) for i in range(len(values))]
    return sequence_digest(dict(zip(names, values, strict=True)), names)


@settings(deadline=None, max_examples=300)
@given(st.lists(LENGTHS, min_size=1, max_size=14), st.integers(0, 7), st.integers(0, 2**32))
def test_rows_of_any_lengths_at_any_address_have_the_digest_of_the_definition(lengths, shift, seed):
    rng = np.random.default_rng(seed)
    values = [None if n is None else rng.integers(0, 256, n + shift, np.uint8)[shift:] for n in lengths]
    values += [] if num_bytes(values) > SHORT_BYTES else [rng.integers(0, 256, SHORT_BYTES, np.uint8)]
    assert int(sequence_digests(parts_of(values)[None])[0]) == definition(values)


def check_totals() -> None:
    data = np.random.default_rng(0).integers(0, 256, 3400, np.uint8)
    totals = range(SHORT_BYTES + 1 - 16, 3400)
    rows = [[data[:40], data[: n - 40]] for n in totals]
    found = sequence_digests(np.stack([parts_of(row) for row in rows]))
    assert found.tolist() == [definition(row) for row in rows]


def test_every_total_up_to_some_blocks_has_the_digest_of_the_definition():
    check_totals()


@pytest.mark.slow
def test_processors_without_wide_vectors_give_the_same_digests():
    code = "import test_xxh3; test_xxh3.check_totals()"
    environment = {**os.environ, "NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "", "PYTHONPATH": os.path.dirname(__file__)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_a_bit_that_is_flipped_anywhere_changes_the_digest():
    data = np.random.default_rng(1).integers(0, 256, 700, np.uint8)
    row = parts_of([data[:30], None, data[30:]])[None]
    whole, found = int(sequence_digests(row)[0]), set()
    for bit in range(0, 8 * len(data), 7):
        data[bit // 8] ^= 1 << bit % 8
        found.add(int(sequence_digests(row)[0]))
        data[bit // 8] ^= 1 << bit % 8
    assert whole not in found
    assert int(sequence_digests(row)[0]) == whole
