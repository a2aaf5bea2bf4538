"""What passes between the teacher and the engine's worker, and the worker's part in a step, without an engine."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from contracts.teacher import make_sequence, top_k  # noqa: E402

from kdcache.config.capture import TeacherConfig  # noqa: E402
from kdcache.errors import TeacherError  # noqa: E402
from kdcache.format.record import NO_TARGET  # noqa: E402
from kdcache.teacher.select.found import Layout  # noqa: E402
from kdcache.teacher.select.torch_selector import Selector  # noqa: E402
from kdcache.teacher.vllm import internals  # noqa: E402
from kdcache.teacher.vllm import worker as worker  # noqa: E402
from kdcache.teacher.vllm.options import chunk_positions, engine_options  # noqa: E402
from kdcache.teacher.vllm.wire import (  # noqa: E402
    NOT_SUPERVISED,
    Buffer,
    pack_requests,
    read_buffer,
    unpack_buffer,
    unpack_request,
)
from kdcache.teacher.vllm.worker import Capture, wanted_positions  # noqa: E402

V, H = 50, 4
WEIGHT_HV = torch.randn(H, V, generator=torch.Generator().manual_seed(0))


def project(hidden_CH: torch.Tensor) -> torch.Tensor:
    return hidden_CH @ WEIGHT_HV


def test_a_request_says_where_its_rows_start_and_what_each_is_about():
    sequences = [make_sequence([5, 6, 7]), make_sequence([8, 9, 1, 2], [False, True, False, True])]
    first, second = map(unpack_request, pack_requests(sequences))
    assert first.target_ids_N.tolist() == [6, 7, NO_TARGET]
    assert first.group_index_N.tolist() == [0, 1, 2]
    assert second.target_ids_N.tolist() == [NOT_SUPERVISED, 1, NOT_SUPERVISED, NO_TARGET]
    assert second.group_index_N[[1, 3]].tolist() == [3, 4]


def test_a_buffer_comes_back_as_it_was_sent():
    buffer, none = Buffer.empty(3, Layout(2, False, 0)), np.empty((2, 0))
    entries = (np.array([[1, 2], [3, 4]]), np.array([[-1, -2], [-3, -4]]))
    buffer.write(np.array([2, 0]), (*entries, np.array([-5, -6]), none, none))
    found, filled_P = unpack_buffer(buffer.pack())
    assert filled_P.tolist() == [True, False, True]
    assert found.token_ids_E.reshape(3, 2)[[0, 2]].tolist() == [[3, 4], [1, 2]]
    assert found.logprobs_E.reshape(3, 2)[[0, 2]].tolist() == [[-3, -4], [-1, -2]]
    assert found.target_logprobs_P[[0, 2]].tolist() == [-6, -5]


def test_of_ragged_rows_the_entries_alone_are_sent():
    buffer = Buffer.empty(3, Layout(3, True, 2))
    entries = (np.array([[1, 2, 9], [3, 9, 9]]), np.array([[-1, -2, 9], [-3, 9, 9]]))
    counts_C2, scalars = np.array([[1, 2], [0, 1]]), np.array([[0.5, 7], [1, 8]])
    buffer.write(np.array([2, 0]), (*entries, np.array([-5, -6]), counts_C2, scalars))
    found, filled_P = unpack_buffer(buffer.pack())
    assert filled_P.tolist() == [True, False, True]
    assert found.token_ids_E.tolist() == [3, 1, 2]
    assert found.logprobs_E.tolist() == [-3, -1, -2]
    assert found.offsets_P1.tolist() == [0, 1, 1, 3]
    assert found.num_exact_P.tolist() == [0, 0, 1]
    assert found.scalars[[0, 2]].tolist() == [[1, 8], [0.5, 7]]


def spans_of(extra_args: list[dict], cuts: list[tuple[int, int, int, int]]) -> list[internals.Span]:
    """(request, row, position, length) each."""
    return [internals.Span(extra_args[request], *rest) for request, *rest in cuts]


def test_the_rows_of_a_step_are_found_in_the_order_of_its_hidden_states():
    extra_args = pack_requests([make_sequence([5, 6, 7]), make_sequence([8, 9, 1, 2], [False, True, False, True])])
    # The second request comes first in the batch, its first token was in an earlier step; one request is not ours.
    spans = [*spans_of(extra_args, [(0, 3, 0, 3), (1, 0, 1, 3)]), internals.Span({"other": 1}, 6, 0, 4)]
    step_index_P, group_index_P, target_ids_P, states_P = wanted_positions(spans)
    assert step_index_P.tolist() == [0, 2, 3, 4, 5]
    assert group_index_P.tolist() == [3, 4, 0, 1, 2]
    assert target_ids_P.tolist() == [1, NO_TARGET, 6, 7, NO_TARGET]
    assert not states_P.any()
    # With a seed, where the draws of a position start: as if the whole sequence had come in one step.
    later, whole = (wanted_positions(cut, seed=3).states_P for cut in (spans, spans_of(extra_args, [(1, 0, 0, 4)])))
    assert later[:2].tolist() == whole.tolist()
    assert len(set(later.tolist())) == 5


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("chunk", [1, 2, 3, 100])
def test_a_group_cut_into_any_steps_and_chunks_gives_the_same_records(
    chunk: int, on_device: bool, monkeypatch: pytest.MonkeyPatch
):
    if on_device:  # as it goes there: a copy per tensor and step, which is waited for at the end
        monkeypatch.setattr(worker, "_is_on_host", lambda tensor: False)
        monkeypatch.setattr(torch.accelerator, "synchronize", lambda: None)
    sequences = [make_sequence([5, 6, 7]), make_sequence([8, 9, 1, 2], [False, True, False, True])]
    hidden = [torch.randn(3, H), torch.randn(4, H)]
    extra_args = pack_requests(sequences)
    capture = Capture(project, keeps=True)
    capture.begin(5, chunk, Selector(top_k(3), V))
    capture.on_step(torch.cat([hidden[0], hidden[1][:1]]), lambda: iter(spans_of(extra_args, [(0, 0, 0, 3), (1, 3, 0, 1)])))
    capture.on_step(hidden[1][1:], lambda: iter(spans_of(extra_args, [(1, 0, 1, 3)])))
    assert len(capture._pending) == (2 if on_device else 0)
    error, *packed = capture.end()
    assert error is None
    for sequence, hidden_NH, answer in zip(sequences, hidden, read_buffer(sequences, top_k(3), packed), strict=True):
        dense_PV = project(hidden_NH).log_softmax(dim=-1)[torch.from_numpy(sequence.supervised_N)]
        ids_PK, logprobs_PK = answer.padded()
        np.testing.assert_array_equal(ids_PK, dense_PV.topk(3).indices.numpy())
        np.testing.assert_allclose(logprobs_PK, dense_PV.topk(3).values.numpy(), atol=1e-5)
        target_ids_P = sequence.target_ids_P
        expected_P = dense_PV.numpy()[np.arange(len(target_ids_P)), np.maximum(target_ids_P, 0)]
        np.testing.assert_allclose(answer.target_logprobs(target_ids_P)[:-1], expected_P[:-1], atol=1e-5)


def test_a_position_that_no_step_computed_is_an_error_and_named():
    (sequence,) = sequences = [make_sequence([5, 6, 7, 8])]
    capture = Capture(project, keeps=True)
    capture.begin(4, 10, Selector(top_k(2), V))
    capture.on_step(torch.randn(2, H), lambda: iter(spans_of(pack_requests(sequences), [(0, 0, 2, 2)])))
    _, *packed = capture.end()
    with pytest.raises(TeacherError, match=rf"{sequence.source}: .* never computed 2 of 4 positions, the first of them 0"):
        list(read_buffer(sequences, top_k(2), packed))


def test_a_failure_in_a_step_is_told_at_the_end_and_leaves_no_trace_in_the_next_group():
    sequences = [make_sequence([5, 6, 7, 8])]
    spans = spans_of(pack_requests(sequences), [(0, 0, 0, 4)])
    calls: list[int] = []

    def project_badly(hidden_CH: torch.Tensor) -> torch.Tensor:
        calls.append(len(hidden_CH))
        return project(hidden_CH) if len(calls) > 4 else project(hidden_CH)[:, :1]  # too few columns for k

    capture = Capture(project_badly, keeps=True)
    capture.begin(4, 1, Selector(top_k(2), V))
    capture.on_step(torch.randn(4, H), lambda: iter(spans))
    # The other chunks are projected all the same: other ranks do, and wait for this one.
    assert capture.end()[0] is not None
    assert calls == [1] * 4
    capture.begin(4, 1, Selector(top_k(2), V))
    capture.on_step(torch.randn(4, H), lambda: iter(spans))
    error, *packed = capture.end()
    assert error is None
    assert len(list(read_buffer(sequences, top_k(2), packed))) == 1


def test_a_rank_whose_answer_does_not_count_projects_and_says_nothing():
    spans = spans_of(pack_requests([make_sequence([5, 6, 7])]), [(0, 0, 0, 3)])
    calls: list[int] = []
    capture = Capture(lambda hidden_CH: calls.append(len(hidden_CH)), keeps=False)
    capture.begin(3, 2, Selector(top_k(2), V))
    capture.on_step(torch.randn(3, H), lambda: iter(spans))
    assert capture.end() is None
    assert sum(calls) == 3
    # Between groups nothing is done at all.
    capture.on_step(torch.randn(3, H), lambda: iter(spans))
    assert sum(calls) == 3


class SoundModel:
    def compute_logits(self, hidden_states: object) -> None:
        """Takes what it should."""

    def modules(self) -> tuple[()]:
        return ()


class ChangedRunner:
    requests = query_start_loc = input_batch = None
    model = SoundModel()

    def _get_prompt_logprobs_dict(self, hidden_states: object, scheduler_output: object) -> None:
        """Takes something else."""


class ChangedPrompts:
    def compute_prompt_logprobs(self, logits_fn: object) -> None:
        """Takes less."""


@pytest.mark.parametrize(
    ("runner", "sentence"),
    [
        (ChangedRunner(), r"ChangedRunner\._get_prompt_logprobs_dict takes \(hidden_states, scheduler_output\)"),
        (SimpleNamespace(model=SoundModel()), "SimpleNamespace has no _get_prompt_logprobs_dict"),
        (
            SimpleNamespace(model=SoundModel(), prompt_logprobs_worker=ChangedPrompts()),
            r"compute_prompt_logprobs takes \(logits_fn\)",
        ),
    ],
)
def test_a_changed_signature_is_named_and_nothing_is_installed(runner: object, sentence: str):
    before = dict(vars(runner))
    problem = internals.install(SimpleNamespace(model_runner=runner), lambda hidden, spans: None)
    assert problem is not None
    assert re.search(sentence, problem)
    assert vars(runner) == before


def test_with_selection_in_the_worker_a_step_may_be_one_sequence():
    config = TeacherConfig(model="m")
    public = engine_options(config, {"max_position_embeddings": 4096}, is_cpu=False)
    worker = engine_options(config, {"max_position_embeddings": 4096}, is_cpu=False, extension="a.B")
    assert public["long_prefill_token_threshold"] == 1024
    assert worker == {name: value for name, value in public.items() if name != "long_prefill_token_threshold"} | {
        "worker_extension_cls": "a.B"
    }


def test_a_chunks_logits_stay_in_the_cache_of_a_cpu():
    config = TeacherConfig(model="m", chunk_positions=512)
    sizes = (8192, 32768, 151936)
    assert [chunk_positions(config, size, is_cpu=False) for size in sizes] == [512] * 3
    assert [chunk_positions(config, size, is_cpu=True) for size in sizes] == [512, 256, 64]
    assert chunk_positions(TeacherConfig(model="m", chunk_positions=3), 151936, is_cpu=True) == 3


def test_strict_stops_at_a_vllm_that_does_not_import(tmp_path: Path):
    (tmp_path / "vllm.py").write_text("raise RuntimeError('built for another machine')\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n" + (
        "from kdcache.config.capture import TeacherConfig; from kdcache.errors import TeacherError\n"
        "from kdcache.teacher import load_teacher\n"
        "try: load_teacher(TeacherConfig(model='m', strict=True))\n"
        "except TeacherError as error: print(error)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "vllm is installed but does not import: built for another machine" in result.stdout


class TestOneOfSeveralRanks:
    """Whatever fails on one rank must not leave the others waiting in a projection."""

    def test_a_chunk_without_room_is_said_before_any_rank_projects_and_is_tried_once(self):
        capture = Capture(project, keeps=True, alone=False)
        tried: list[int] = []

        def fails(num_positions: int) -> torch.Tensor:
            raise MemoryError("no room for the logits")

        def fits(num_positions: int) -> torch.Tensor:
            tried.append(num_positions)
            return torch.zeros(num_positions, V)

        selector = Selector(top_k(2), V)
        problem = capture.try_chunk(7, selector, fails)
        assert problem == "a chunk of 7 positions fails on one rank: MemoryError: no room for the logits"
        for chunk in (7, 7, 9):
            assert capture.try_chunk(chunk, Selector(top_k(2), V), fits) is None
        assert tried == [7, 9]

    def test_the_trial_makes_the_selection_too_where_the_answer_counts(self):
        def narrow(num_positions: int) -> torch.Tensor:
            return torch.zeros(num_positions, V - 1)

        answers = [
            Capture(project, keeps=keeps, alone=False).try_chunk(4, Selector(top_k(2), V), narrow) for keeps in (True, False)
        ]
        assert answers[0] is not None
        assert answers[1] is None

    def test_alone_nothing_is_tried(self):
        assert Capture(project, keeps=True).try_chunk(4, Selector(top_k(2), V), lambda _: 1 / 0) is None  # type: ignore[arg-type]

    @pytest.mark.parametrize(("keeps", "leaves_by"), [(True, RuntimeError), (False, SystemExit)])
    def test_a_projection_that_fails_in_a_step_ends_the_rank(
        self, keeps: bool, leaves_by: type[BaseException], caplog: pytest.LogCaptureFixture
    ):
        def fails(hidden_CH: torch.Tensor) -> torch.Tensor:
            raise MemoryError("no room for the logits")

        capture = Capture(fails, keeps=keeps, alone=False)
        capture.begin(4, 2, Selector(top_k(2), V))
        spans = spans_of(pack_requests([make_sequence([5, 6, 7, 8])]), [(0, 0, 0, 4)])
        with pytest.raises(leaves_by):
            capture.on_step(torch.randn(4, H), lambda: iter(spans))
        assert "one of several ranks, which ends vLLM: MemoryError: no room for the logits" in caplog.text

    def test_what_fails_on_all_ranks_alike_is_told_at_the_end(self):
        capture = Capture(project, keeps=True, alone=False)
        capture.begin(4, 2, Selector(top_k(2), V))
        capture.on_step(torch.randn(4, H), lambda: iter([SimpleNamespace()]))
        answer = capture.end()
        assert answer is not None
        assert "AttributeError" in answer[0]


def test_the_trial_projects_without_the_gather_and_puts_it_back(monkeypatch: pytest.MonkeyPatch):
    class Processor(torch.nn.Module):
        def _gather_logits(self, logits_CV: torch.Tensor) -> torch.Tensor:
            raise AssertionError("another rank is waited for")

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.logits_processor = Processor()

        def compute_logits(self, hidden_CH: torch.Tensor) -> torch.Tensor:
            return self.logits_processor._gather_logits(hidden_CH @ torch.ones(H, V // 2))[:, :V]  # type: ignore[operator]

    monkeypatch.setattr(internals, "num_ranks", lambda _: 2)
    model = Model()
    worker = SimpleNamespace(model_runner=SimpleNamespace(model=model))
    assert internals.project_alone(worker, torch.zeros(3, H)).shape == (3, V // 2 * 2)
    with pytest.raises(AssertionError, match="another rank"):
        model.compute_logits(torch.zeros(3, H))
