"""The selection of a chunk's logits against its definition: values, ids, ties, NaN, infinities, dtypes, threads."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from kdcache.teacher.select import _numba_topk  # noqa: E402
from kdcache.teacher.select._torch_topk import select_top_k, select_top_k_reference  # noqa: E402
from kdcache.teacher.select.found import Selected  # noqa: E402

SIZES = [
    (1, 1), (2, 1), (5, 5), (63, 64 - 1), (100, 7), (520, 520), (4095, 33), (4096, 64), (4097, 256), (8192, 16), (8193, 8193),
    (20_000, 1), (33000, 64), (151936, 256),
]  # fmt: skip


def draw(num_rows: int, vocab_size: int, dtype: torch.dtype, scale: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(vocab_size + num_rows)
    return (torch.randn(num_rows, vocab_size, generator=generator) * scale).to(dtype)


def targets_of(logits_CV: torch.Tensor) -> torch.Tensor:
    targets_C = torch.arange(len(logits_CV)) * 31 % logits_CV.shape[-1]
    targets_C[-1] = -1
    return targets_C


def check(logits_CV: torch.Tensor, k: int) -> Selected[torch.Tensor]:
    """Selection equals definition: ids exactly, ties included, logprobs to float32 accuracy."""
    targets_C = targets_of(logits_CV)
    found, expected = select_top_k(logits_CV, targets_C, k), select_top_k_reference(logits_CV, targets_C, k)
    assert [tensor.dtype for tensor in found] == [torch.int32, torch.float32, torch.float32, torch.int32, torch.float32]
    torch.testing.assert_close(found.token_ids_PK, expected.token_ids_PK, rtol=0, atol=0)
    torch.testing.assert_close(found.logprobs_PK, expected.logprobs_PK, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(found.target_logprobs_P[:-1], expected.target_logprobs_P[:-1], rtol=2e-6, atol=2e-6)
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("vocab_size", "k"), SIZES)
def test_every_size_and_dtype_gives_what_a_sort_of_the_whole_row_gives(vocab_size: int, k: int, dtype: torch.dtype):
    check(draw(3, vocab_size, dtype), k)


@pytest.mark.parametrize("k", [1, 63, 300])
def test_of_equal_logits_the_smaller_ids_are_kept(k: int):
    # Seven values in nine thousand places: almost every entry ties, also at the last place.
    logits_CV = torch.randint(-3, 4, (4, 9000), generator=torch.Generator().manual_seed(0)).bfloat16()
    check(logits_CV, k)
    found = check(torch.zeros(2, 5000), k)
    assert found.token_ids_PK.tolist() == [list(range(k))] * 2
    # Zeros of both signs are equal logits, of equal probability; the order between them is not the definition's.
    signed = torch.where(torch.arange(100) % 2 == 0, 0.0, -0.0)[None]
    assert set(select_top_k(signed, torch.zeros(1, dtype=torch.int64), 100).token_ids_PK[0].tolist()) == set(range(100))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_tokens_that_the_model_rules_out_have_probability_zero(dtype: torch.dtype):
    logits_CV = draw(3, 10_000, dtype)
    logits_CV[:, 100:] = -torch.inf  # whole blocks of them
    logits_CV[1, :9_990] = -torch.inf  # and at the start
    logits_CV[1, 9_990:] = 1.0
    found = check(logits_CV, 128)
    assert (found.logprobs_PK[:, 100:] == -torch.inf).all()
    assert found.token_ids_PK[1, :11].tolist() == [*range(9_990, 10_000), 0]


@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 4_500, 9_999])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_an_overflow_anywhere_makes_the_whole_row_nan(bad: float, place: int, dtype: torch.dtype):
    logits_CV = draw(2, 10_000, dtype)
    # x86 makes NaNs with the sign set, which as an integer is below everything.
    logits_CV[1, place] = torch.tensor(bad).copysign(torch.tensor(-1.0)) if bad != bad else bad
    found = select_top_k(logits_CV, torch.zeros(2, dtype=torch.int64), 4)
    assert not found.logprobs_PK[0].isnan().any()
    assert found.logprobs_PK[1].isnan().all()
    logits_CV[1] = -torch.inf
    assert select_top_k(logits_CV, torch.zeros(2, dtype=torch.int64), 4).logprobs_PK[1].isnan().all()


def test_a_peak_far_above_the_rest_and_far_from_zero_keeps_its_accuracy():
    for offset in (-80.0, 0.0, 80.0):
        logits_CV = draw(2, 6000, torch.float32, scale=0.1) + offset
        logits_CV[0, 17] += 60.0
        check(logits_CV, 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_candidates_of_any_distribution_come_in_order(dtype: torch.dtype):
    # One logit far above, so that all others are in one bucket; logits that a model masks with its dtype's lowest number.
    logits_CV = draw(3, 12_000, dtype)
    logits_CV[0, 77] = 1e6
    logits_CV[1, 200:] = torch.finfo(dtype).min
    logits_CV[2] = torch.linspace(-9, -1, 12_000).exp().neg().to(dtype)  # all negative, crowded at the top
    check(logits_CV, 300)


def test_neighbouring_ids_can_all_be_kept():
    # All k in one block, and k ids that lie side by side: groups are spread over the block, so none holds more than a few.
    logits_CV = draw(1, 40_000, torch.float32)
    logits_CV[0, 8_192:8_448] += 40.0
    assert sorted(check(logits_CV, 256).token_ids_PK[0].tolist()) == list(range(8_192, 8_448))


def test_threads_and_strides_change_nothing():
    logits_CV = draw(7, 3000, torch.bfloat16)
    bits_CV, targets_C = logits_CV.view(torch.uint16).numpy(), np.arange(7)
    alone = _numba_topk.select_top_k(bits_CV, targets_C, 9)
    for one, other in zip(alone, _numba_topk.select_top_k(bits_CV, targets_C, 9, num_threads=3), strict=True):
        np.testing.assert_array_equal(one, other)
    check(draw(4, 6000, torch.float32)[:, :5001], 9)


def test_what_the_loops_would_read_out_of_bounds_is_refused():
    logits_CV, targets_C = draw(2, 10, torch.float32), torch.zeros(2, dtype=torch.int64)
    for k, target in ((11, 0), (0, 0), (3, 10)):
        with pytest.raises(ValueError, match="outside a vocabulary of 10 tokens"):
            select_top_k(logits_CV, targets_C + target, k)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_the_selection_is_the_definition_up_to_ties():
    logits_CV = draw(5, 33_000, torch.float32).cuda()
    targets_C = targets_of(logits_CV).cuda()
    found, expected = select_top_k(logits_CV, targets_C, 64), select_top_k_reference(logits_CV, targets_C, 64)
    torch.testing.assert_close(found.token_ids_PK, expected.token_ids_PK)
    torch.testing.assert_close(found.logprobs_PK, expected.logprobs_PK, rtol=2e-6, atol=2e-6)
