"""The vector functions under the CPU's selections: exp and its limits; code on disk is of the functions as they are."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from kdcache.compiled import version_of
from kdcache.teacher.select import _numba_blocks, _numba_draws, _numba_topk, _numba_vectors, exact_weights


def bits_of(logits: np.ndarray, dtype: type) -> tuple[np.ndarray, np.ndarray]:
    """A block as the functions take it, and the logits that are in it."""
    words = logits.astype(np.float32).view(np.int32)
    if dtype is np.int32:
        return words, logits.astype(np.float32).astype(np.float64)
    halves = (words >> 16).astype(np.uint16)
    return halves, (halves.astype(np.int32) << 16).view(np.float32).astype(np.float64)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_weights_are_accurate_to_float32_zero_far_below_and_nan_for_nan(dtype: type):
    block, exact = bits_of(np.linspace(-90.0, 5.0, _numba_blocks.UNIT * 40), dtype)
    found = np.empty((40, _numba_blocks.UNIT), np.float32)
    for unit, out in zip(block.reshape(found.shape), found, strict=True):
        _numba_blocks.weigh(unit, np.float32(5.0), out)
    seen = exact > 5.0 - 69.0
    errors = np.abs(found.reshape(-1)[seen] / np.exp(exact[seen] - 5.0) - 1)
    assert (errors < 4e-7 + 1.5e-7 * np.abs(exact[seen] - 5.0)).all()
    assert (found.reshape(-1)[exact < 5.0 - 70.0] == 0).all()
    special, _ = bits_of(np.array([-np.inf, -3e38, np.nan, 5.0] * 16), dtype)
    _numba_blocks.weigh(special, np.float32(5.0), found[0])
    np.testing.assert_array_equal(found[0, :4], [0, 0, np.nan, 1])


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_a_sum_of_exp_is_accurate_to_float32_zero_far_below_and_nan_for_nan(dtype: type):
    for lowest in (0.0, -5.0, -80.0):
        block, exact = bits_of(np.linspace(lowest, 0.0, _numba_blocks.BLOCK), dtype)
        found = _numba_blocks.sum_exp(block, np.float32(0.0), np.float32(1.0))
        assert found == pytest.approx(np.exp(exact).sum(), rel=1e-6)
    special, _ = bits_of(np.array([-np.inf, -3e38, 0.0, 0.0] * 16), dtype)
    assert _numba_blocks.sum_exp(special, np.float32(0.0), np.float32(1.0)) == 32
    special, _ = bits_of(np.array([np.nan, 0.0] * 32), dtype)
    assert np.isnan(_numba_blocks.sum_exp(special, np.float32(0.0), np.float32(1.0)))


def test_what_is_kept_on_disk_is_under_the_text_of_its_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(tmp_path)
    source = tmp_path / "part_of_a_kernel.py"
    source.write_text("A = 1\n")
    __import__("part_of_a_kernel")
    before = version_of(_numba_blocks, sys.modules["part_of_a_kernel"])
    source.write_text("A = 2\n")
    assert version_of(_numba_blocks, sys.modules.pop("part_of_a_kernel")) != before
    _numba_topk.select_top_k(np.zeros((1, 4), np.uint16), np.zeros(1, np.int64), 1)
    version = version_of(_numba_blocks, _numba_vectors, exact_weights)
    assert all(version in str(signature) for signature in _numba_topk._select_positions.signatures)
    assert _numba_draws.draw_positions.py_func.__defaults__ == (version,)
