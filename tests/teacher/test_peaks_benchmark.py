"""benchmarks/capture_peaks.py: a peak is that of one call in a process of its own."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import capture_peaks

MIB = 2**20


def take(num_bytes: int) -> None:
    np.ones(num_bytes, np.uint8)


def peak(warm_up: int, measured: int) -> dict[str, int]:
    return capture_peaks.in_fork(
        lambda: capture_peaks.peak_of(lambda: (lambda: take(warm_up), lambda: take(measured), 8)),
    )


def test_what_was_freed_before_is_not_in_the_peak():
    found = peak(300 * MIB, 100 * MIB)
    assert 90 * MIB < found["peak"] - found["before"] < 130 * MIB
    assert found["chunk"] == 8


def test_a_process_that_ends_without_an_answer_is_an_error():
    with pytest.raises(RuntimeError, match="without an answer"):
        capture_peaks.in_fork(lambda: sys.exit(3))


@pytest.mark.parametrize(("over", "verdict"), [(8 * MIB, "within"), (8 * MIB + 1, "above")])
def test_the_verdict_is_one_chunk_of_bfloat16_logits(over, verdict):
    peaks = {
        "prefill": {"peak": 100 * MIB, "before": 0, "chunk": 512},
        "worker 16": {"peak": 100 * MIB + over, "before": 0, "chunk": 512},
    }
    chunk, found = capture_peaks.memory_target(peaks, vocab_size=8192, tokens=100, entries=[16])
    assert "8.0 MiB of bfloat16 logits (16.0 as float32)" in chunk
    assert f"{verdict} one chunk" in found
