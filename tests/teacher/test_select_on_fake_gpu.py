"""Every selection at real sizes on a GPU that is not there: nothing waits for it or leaves it, and what memory it takes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from selection_cases import KINDS, of_kind

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from fake_gpu import FakeGpu, peak_of

from kdcache.format.manifest import SelectionInfo
from kdcache.teacher.select import _torch_topk
from kdcache.teacher.select._torch_topk import select_top_k, select_top_k_reference
from kdcache.teacher.select.torch_selector import Selector

VOCAB = 151_936
BLOCK = 4 * _torch_topk.MAX_ELEMENTS


SELECTIONS = {kind: of_kind(kind) for kind in KINDS} | {
    "top_k with scalars": of_kind("top_k", entropy=True, temperatures=(2.0,)),
    "top_k of a sampler": of_kind("top_k", filters={"temperature": 0.7, "top_k": 50, "top_p": 0.9}),
}


def peak(selection: SelectionInfo, positions: int) -> int:
    with FakeGpu() as gpu:
        logits_CV = torch.empty(positions, VOCAB, dtype=torch.bfloat16, device="cuda")
        words_C = torch.empty(positions, dtype=torch.int64, device="cuda")
        return peak_of(lambda: Selector(selection, VOCAB).select(logits_CV, words_C, words_C), gpu)[0]


@pytest.mark.parametrize("name", SELECTIONS)
def test_memory_does_not_grow_with_the_chunk(name):
    blocks = {"top_k": 2.1, "top_k of a sampler": 8.4}.get(name, 4.2)
    small, large = (peak(SELECTIONS[name], positions) for positions in (512, 2048))
    assert max(small, large) <= blocks * BLOCK
    assert large <= 1.02 * small


def test_the_parts_of_a_chunk_are_the_whole(monkeypatch):
    """The device's way, on a CPU; NaN, a row of -inf and +inf make NaN of their rows alone."""
    monkeypatch.setattr(_torch_topk, "MAX_ELEMENTS", 250)
    logits_CV = torch.randn(7, 100, generator=torch.Generator().manual_seed(0)) * 3
    logits_CV[2, 5], logits_CV[3], logits_CV[4, 6] = torch.nan, -torch.inf, torch.inf
    targets_C = torch.arange(7)
    found = _torch_topk.select_on_device(logits_CV, targets_C, 5)
    expected = select_top_k_reference(logits_CV, targets_C, 5)
    sound = [0, 1, 5, 6]
    assert torch.equal(found.token_ids_PK[sound], expected.token_ids_PK[sound])
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(ours[sound], theirs[sound], rtol=1e-6, atol=1e-6)
    assert found.logprobs_PK[2:5].isnan().all()
    assert select_top_k(logits_CV[sound], targets_C[sound], 5).token_ids_PK.tolist() == found.token_ids_PK[sound].tolist()
