"""Every selection, by numba and by torch operations, against its float64 definition; seeds, chunks, filters, refusals."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from selection_cases import BACKENDS, KINDS, check_rows, define, draw_logits, of_kind, select  # noqa: E402

from kdcache.errors import TeacherError  # noqa: E402
from kdcache.format.record import Distributions  # noqa: E402
from kdcache.format.record_checks import check_distributions  # noqa: E402
from kdcache.format.selection import most_entries  # noqa: E402
from kdcache.teacher.select import torch_selector  # noqa: E402
from kdcache.teacher.select._torch_draws import apply_filters  # noqa: E402
from kdcache.teacher.select.reference import filter_reference  # noqa: E402
from kdcache.teacher.select.torch_selector import Selector  # noqa: E402

DTYPES = [torch.bfloat16, torch.float32, torch.float16]
SCALARS = {"temperatures": (2.0, 0.5, 0.05), "entropy": True}


def check_against_definition(logits: torch.Tensor, selection, backend: str) -> Distributions:
    found, expected = select(logits, selection, backend), define(logits, selection)
    check_distributions(found, vocab_size=logits.shape[-1])
    assert (found.num_entries_P <= most_entries(selection, logits.shape[-1])).all()
    exact, expected_exact = found.is_exact_E, expected.is_exact_E
    # In the order of ids: logprobs that differ by less than float32 holds may change places.
    here, there = by_id(found), by_id(expected)
    np.testing.assert_array_equal(found.token_ids_E[here][exact[here]], expected.token_ids_E[there][expected_exact[there]])
    logprobs_E = expected.logprobs_E[there][expected_exact[there]]
    np.testing.assert_allclose(found.logprobs_E[here][exact[here]], logprobs_E, rtol=3e-6, atol=3e-6)
    np.testing.assert_allclose(found.tail_mass_P, expected.tail_mass_P, atol=2e-6)
    np.testing.assert_allclose(found.outside_target_logprobs, expected.outside_target_logprobs, rtol=3e-6, atol=3e-6)
    for name in ("num_exact_P", "log_z_PL", "entropy_P"):
        assert (getattr(found, name) is None) == (getattr(expected, name) is None)
        if getattr(expected, name) is not None:
            np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=5e-6, atol=5e-6)
    check_rows(found, logits, selection)
    return found


def by_id(record: Distributions) -> np.ndarray:
    return np.lexsort((record.token_ids_E, np.repeat(np.arange(record.num_positions), record.num_entries_P)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab_size", [21, 512, 4097, 9000])
def test_every_selection_is_its_definition(kind: str, vocab_size: int, backend: str):
    for dtype in DTYPES:
        # Of equal logits, which half precision makes, torch.topk may keep any: these rows have none.
        logits = draw_logits(6, vocab_size, dtype)
        if dtype != torch.float32:
            logits = (torch.argsort(torch.argsort(logits.float())) - vocab_size) * (9.0 / vocab_size)
        check_against_definition(logits, of_kind(kind, **SCALARS), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_logits_in_half_precision_are_read_as_they_are(backend: str, dtype: torch.dtype):
    logits = draw_logits(8, 3000, dtype)
    selection = of_kind("threshold", tau=0.01)
    record = select(logits, selection, backend)
    check_rows(record, logits, selection)
    np.testing.assert_allclose(np.sort(record.tail_mass_P), np.sort(define(logits, selection).tail_mass_P), atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["sampled", "threshold", "top_k_sampled"])
@pytest.mark.parametrize("scale", [0.0, 0.5, 8.0, 40.0])
def test_flat_and_peaked_distributions_keep_the_definition(kind: str, scale: float, backend: str):
    logits = draw_logits(8, 2000, scale=scale)
    if scale == 0.0:
        logits = torch.linspace(0, 1e-3, 2000).expand(8, -1).contiguous()  # no ties
    for params in ({}, {"tau": 0.2, "k": 1, "num_draws": 1}, {"tau": 0.00053, "k": 300, "num_draws": 500}):
        names = KINDS[kind]
        check_against_definition(logits, of_kind(kind, **{n: v for n, v in params.items() if n in names}), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_that_are_ruled_out_are_never_drawn(kind: str, backend: str):
    logits = draw_logits(5, 5000)
    logits[:, 100:] = -torch.inf
    logits[0, 3:] = -torch.inf
    logits[1, 1:] = -torch.inf
    check_against_definition(logits, of_kind(kind, k=2, entropy=True, temperatures=(3.0,)) if "k" in KINDS[kind] else
                             of_kind(kind, entropy=True, temperatures=(3.0,)), backend)  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_smallest_vocabularies_have_all_their_tokens(kind: str, backend: str):
    for vocab_size in (1, 2, 3):
        options = {"k": vocab_size} if "k" in KINDS[kind] else {}
        check_against_definition(draw_logits(4, vocab_size), of_kind(kind, **options), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_overflow_is_an_error_that_names_the_position(kind: str, bad: float, backend: str):
    logits = draw_logits(6, 700)
    logits[4, 650] = bad
    with pytest.raises(TeacherError, match="NaN at position 4"):
        select(logits, of_kind(kind), backend)


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_threads_and_backends_change_no_draw(kind: str, monkeypatch: pytest.MonkeyPatch):
    logits, selection = draw_logits(7, 3000), of_kind(kind, **SCALARS)
    whole = select(logits, selection)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        in_threads = select(logits, selection)
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setattr(torch_selector, "MAX_ELEMENTS", 2 * 3000)
    monkeypatch.setattr(torch_selector.Selector, "_on_cpu", torch_selector.Selector.on_device)
    on_device = select(logits, selection, "torch")
    in_parts = select(logits, selection)
    for other in (in_threads, on_device, in_parts):
        np.testing.assert_array_equal(other.token_ids_E, whole.token_ids_E)
        np.testing.assert_allclose(other.logprobs_E, whole.logprobs_E, atol=3e-6)


def test_another_seed_draws_otherwise_and_the_same_seed_the_same():
    logits = draw_logits(5, 400)
    first, again, other = (select(logits, of_kind("threshold", seed=seed)).token_ids_E.tolist() for seed in (1, 1, -1))
    assert first == again
    assert first != other


FILTERS = [
    {"temperature": 0.7},
    {"temperature": 2.0, "top_k": 5.0},
    {"top_p": 0.6},
    {"temperature": 1.3, "min_p": 0.1, "top_k": 12.0, "top_p": 0.9},
    {"top_k": 0.0, "top_p": 1.0, "min_p": 0.0},
]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_a_samplers_filters_come_before_the_selection(filters: dict[str, float]):
    logits = draw_logits(6, 300)
    expected = np.stack([filter_reference(row, filters) for row in logits.double().numpy()])
    filtered = apply_filters(logits, filters)
    np.testing.assert_array_equal(filtered.isneginf().numpy(), np.isneginf(expected))
    finite = np.isfinite(expected)
    np.testing.assert_allclose(filtered.numpy()[finite], expected[finite], rtol=1e-6)
    for kind in KINDS:
        check = check_against_definition_of_filtered(logits, of_kind(kind, filters=filters))
        assert (np.exp(check.padded()[1].astype(np.float64)).sum(axis=-1) < 1.2).all()


def check_against_definition_of_filtered(logits: torch.Tensor, selection) -> Distributions:
    found, expected = select(logits, selection), define(logits, selection)
    np.testing.assert_array_equal(found.token_ids_E, expected.token_ids_E)
    np.testing.assert_allclose(np.exp(found.logprobs_E), np.exp(expected.logprobs_E), atol=2e-6)
    np.testing.assert_allclose(found.tail_mass_P, expected.tail_mass_P, atol=2e-6)
    return found


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_the_filters_are_vllms_own(filters: dict[str, float]):
    pytest.importorskip("vllm")
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch

    logits = draw_logits(6, 300)
    theirs = logits / filters.get("temperature", 1.0)
    # MinPLogitsProcessor.apply, which needs a batch's state.
    probabilities = theirs.softmax(dim=-1)
    theirs[probabilities < filters.get("min_p", 0.0) * probabilities.amax(dim=-1, keepdim=True)] = -torch.inf
    k = int(filters.get("top_k", 0)) or 300
    theirs = apply_top_k_top_p_pytorch(theirs, torch.full((6,), k), torch.full((6,), filters.get("top_p", 1.0)))
    torch.testing.assert_close(apply_filters(logits, filters), theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_on_a_device_no_shape_follows_from_a_value(kind: str):
    # Tensors without values: whatever asks for one, as a mask's count or `.item()` would, raises. So the host never waits.
    selector = Selector(of_kind(kind, **SCALARS), 3000)
    logits = torch.empty((7, 3000), dtype=torch.bfloat16, device="meta")
    targets, states = (torch.empty(7, dtype=torch.int64, device="meta") for _ in range(2))
    found, layout = selector.select(logits, targets, states), selector.layout
    assert found.token_ids_PK.shape == found.logprobs_PK.shape == (7, layout.num_columns)
    assert found.counts_P2.shape == (7, 2 * layout.is_ragged)
    assert found.scalars.shape == (7, layout.num_scalars)
    assert [tensor.dtype for tensor in found] == [torch.int32, torch.float32, torch.float32, torch.int32, torch.float32]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu_every_selection_is_its_definition(kind: str):
    for vocab_size in (521, 33_000):
        check_against_definition(draw_logits(40, vocab_size).cuda(), of_kind(kind, **SCALARS), "torch")
