"""Selection inside vLLM's worker with the real engine: against its public route and float32 transformers, and its refusals.

The contract itself runs on the worker route in test_vllm_teacher.py (it is what `auto` takes), on the public route here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from contracts.teacher import PROMISES, SELECTIONS, TeacherCase, closing, make_sequence, random_sequences, score, top_k
from dense_forward import dense_forward

from kdcache.config.teacher import TeacherConfig, VllmConfig
from kdcache.errors import ConfigError, TeacherError
from kdcache.format.manifest import SelectionInfo
from kdcache.format.record import Distributions, TokenSequence
from kdcache.format.record_checks import check_distributions
from kdcache.teacher import load_teacher
from kdcache.teacher.select.reference import select_reference

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

LENGTHS = [255, 100, 1, 2, 97, 200, 33]
K = 64


def config(folder: Path, **options: Any) -> TeacherConfig:
    # 64 tokens per step and chunks of 24 positions: most sequences are split over steps, most steps over chunks.
    return TeacherConfig(
        model=str(folder), backend="vllm", **{"tokens_per_forward": 64, "chunk_positions": 24, "dtype": "float32"} | options
    )


def masked_sequences(case: TeacherCase) -> list[TokenSequence]:
    """Long and short ones, whole and with holes."""
    rng = np.random.default_rng(7)
    whole = random_sequences(case, LENGTHS, seed=1)
    return [*whole, *(make_sequence(s.input_ids_N, rng.random(s.num_tokens) < 0.3) for s in whole if s.num_tokens > 2)]


@contextmanager
def warnings_of_ours() -> Iterator[list[str]]:
    """What kdcache's side of the engine logs meanwhile; a fixture of a module has no caplog."""
    from kdcache.teacher.vllm import teacher as _vllm

    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    _vllm.log.addHandler(handler)
    yield messages
    _vllm.log.removeHandler(handler)


@dataclass
class WorkerAnswers:
    """Of the worker route, on a release that is newer than any proven one, and what was logged when it started."""

    answers: list[Distributions]
    warnings: list[str]


@pytest.fixture(scope="module")
def worker(tiny_model_dir: Path) -> WorkerAnswers:
    """Its engine is gone by the time that another starts."""
    import vllm

    with pytest.MonkeyPatch.context() as patch, warnings_of_ours() as warnings:
        patch.setattr(vllm, "__version__", "0.99.0")
        teacher: Any = load_teacher(config(tiny_model_dir, engine_options={"max_logprobs": 5}))
    assert teacher.route == "worker"
    case = TeacherCase(teacher, dense_forward(tiny_model_dir), 5e-5)
    # More than the engine's own limit on logprobs.
    answers = score(case, masked_sequences(case), K)
    teacher.close()
    return WorkerAnswers(answers, warnings)


@dataclass
class PublicCase:
    """The public route, taken because the worker's numbers were found to be wrong, and what was logged then."""

    case: TeacherCase
    warnings: list[str]


@pytest.fixture(scope="module")
def public(tiny_model_dir: Path, worker: WorkerAnswers) -> Iterator[PublicCase]:
    from kdcache.teacher.vllm import internals

    span = internals.Span

    def one_row_early_in_all_texts_but_the_first(extra_args: Any, row: int, position: int, length: int) -> Any:
        return span(extra_args, max(0, row - 1), position, length)

    with pytest.MonkeyPatch.context() as patch, warnings_of_ours() as warnings:
        patch.setattr(internals, "Span", one_row_early_in_all_texts_but_the_first)
        teacher: Any = load_teacher(config(tiny_model_dir))
    assert teacher.route == "public"
    yield PublicCase(TeacherCase(teacher, dense_forward(tiny_model_dir), 5e-5), warnings)
    teacher.close()


def largest_difference(ours: Distributions, theirs: Distributions) -> float:
    return float(np.abs(ours.padded()[1] - theirs.padded()[1]).max(initial=0))


def agreement(ours: list[Distributions], theirs: list[Distributions]) -> str:
    errors = np.concatenate([np.abs(a.logprobs_E - b.logprobs_E) for a, b in zip(ours, theirs, strict=True)])
    same = np.concatenate([a.token_ids_E == b.token_ids_E for a, b in zip(ours, theirs, strict=True)])
    return f"max |error| {errors.max():.2e} nats, mean {errors.mean():.2e}, same id at the same rank {same.mean():.4f}"


def test_the_routes_and_float32_transformers_agree(worker: WorkerAnswers, public: PublicCase, tiny_model_dir: Path):
    sequences = masked_sequences(public.case)
    public_answers = score(public.case, sequences, K)
    transformers = load_teacher(TeacherConfig(model=str(tiny_model_dir), backend="transformers", dtype="float32"))
    hf_answers = list(transformers.score(sequences, top_k(K)))
    print(f"worker - public: {agreement(worker.answers, public_answers)}")
    print(f"worker - transformers: {agreement(worker.answers, hf_answers)}")
    for sequence, ours, theirs, hf in zip(sequences, worker.answers, public_answers, hf_answers, strict=True):
        assert ours.num_positions == len(sequence.positions_P)
        assert largest_difference(ours, theirs) < 2e-5
        assert largest_difference(ours, hf) < 5e-5
        np.testing.assert_allclose(ours.tail_mass_P, hf.tail_mass_P, atol=1e-5)
        targets_P = sequence.target_ids_P
        np.testing.assert_allclose(ours.target_logprobs(targets_P), hf.target_logprobs(targets_P), atol=5e-5)
        same = (ours.token_ids_E == theirs.token_ids_E).mean() if ours.num_entries else 1.0
        assert same > 0.98  # the rest: neighbours that are equal up to rounding


def test_a_release_that_nobody_has_tried_takes_the_worker_route_and_one_line_says_which_was_proven_last(worker: WorkerAnswers):
    (line,) = worker.warnings
    assert line.startswith("kdcache was last proven with vLLM 0.33, and this is 0.99.0: signatures and the proof")


def test_wrong_numbers_are_noticed_at_the_start_and_said_once(public: PublicCase):
    (warning,) = public.warnings
    assert "cannot be captured inside vLLM's worker: on a probe of 8 tokens its logprobs are" in warning
    assert "slower" in warning


def test_the_public_route_refuses_what_needs_the_whole_distribution_and_says_why_it_was_taken(public: PublicCase):
    (sequence,) = random_sequences(public.case, [5])
    with pytest.raises(ConfigError, match=r"'threshold' needs the whole .* \(public route\) .*no worker route: on a probe"):
        public.case.teacher.score([sequence], SelectionInfo(kind="threshold", params=SELECTIONS["threshold"]))
    with pytest.raises(ConfigError, match=r"selection\.entropy needs the whole distribution"):
        public.case.teacher.score([sequence], SelectionInfo(kind="top_k", params={"k": 3}, entropy=True))


def test_the_most_probable_tokens_up_to_a_mass_can_be_had_on_the_public_route(public: PublicCase):
    selection = SelectionInfo(kind="top_p_k", params={"p": 0.3, "k": 20})
    sequence = masked_sequences(public.case)[1]
    (answer,) = public.case.teacher.score([sequence], selection)
    check_distributions(answer, vocab_size=public.case.vocab_size)
    states_P = np.zeros(sequence.num_tokens, np.uint64)
    expected = select_reference(public.case.dense(sequence), sequence.target_ids_P, selection, states_P)
    np.testing.assert_array_equal(answer.num_entries_P, expected.num_entries_P)
    np.testing.assert_allclose(answer.tail_mass_P, expected.tail_mass_P, atol=5e-5)


@pytest.mark.slow
@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.__name__)
def test_the_public_route_keeps_every_promise(promise: Callable[[TeacherCase], None], public: PublicCase):
    promise(public.case)


def test_what_an_unusable_vllm_lacks_is_said_before_it_is_started(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch):
    from kdcache.teacher.vllm import teacher as _vllm

    with pytest.raises(TeacherError, match="engine_options has a worker_extension_cls of its own"):
        load_teacher(
            config(tiny_model_dir, vllm=VllmConfig(route="worker"), engine_options={"worker_extension_cls": "mine.Extension"})
        )
    monkeypatch.setattr(_vllm, "WORKER_SAMPLING", ("extra_args", "gone_field"))
    for options in ({"strict": True}, {"vllm": VllmConfig(route="worker")}):
        with pytest.raises(TeacherError, match=r"SamplingParams has no gone_field; set teacher\.vllm\.route to public"):
            load_teacher(config(tiny_model_dir, **options))


@pytest.mark.slow
def test_a_vllm_with_another_signature_is_captured_on_the_public_route_with_one_warning(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    import vllm
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    original = GPUModelRunner._get_prompt_logprobs_dict

    def changed(self: Any, hidden_states: Any, scheduler_output: Any) -> Any:
        return original(self, hidden_states, scheduler_output)

    monkeypatch.setattr(GPUModelRunner, "_get_prompt_logprobs_dict", changed)
    monkeypatch.setattr(vllm, "__version__", "0.99.0")
    teacher: Any = load_teacher(config(tiny_model_dir))
    case = TeacherCase(teacher, dense_forward(tiny_model_dir), 5e-5)
    for sequence in random_sequences(case, [100, 3]):
        (answer,) = score(case, [sequence])
        assert np.abs(answer.padded()[1] - np.sort(case.dense(sequence), axis=-1)[:, :-9:-1]).max() < 5e-5
    assert teacher.route == "public"
    closing(case)
    ours = [
        record for record in caplog.records if record.name.startswith("kdcache")
    ]  # vLLM and torch have warnings of their own
    (warning,) = [record.getMessage() for record in ours if record.levelno >= logging.WARNING]
    assert "_get_prompt_logprobs_dict takes (hidden_states, scheduler_output) (kdcache was last proven with vLLM 0." in warning
    assert warning.endswith("using vLLM's own prompt logprobs, which are slower")


def test_a_projection_that_is_not_as_expected_is_said_at_the_start():
    import torch

    from kdcache.teacher.vllm.internals import projection_problem

    class Model(torch.nn.Module):
        def compute_logits(self, hidden_states: Any) -> Any:
            return hidden_states

    class OldModel(torch.nn.Module):
        def compute_logits(self, hidden_states: Any, sampling_metadata: Any) -> Any:
            return hidden_states

    class LogitsProcessorWithLoRA(torch.nn.Module):
        def _get_logits(self, hidden_states: Any, lm_head: Any, mapping: Any) -> Any:
            return hidden_states

    class LogitsProcessor(torch.nn.Module):
        def _get_logits(self, hidden_states: Any, lm_head: Any) -> Any:
            return hidden_states

    assert projection_problem(Model()) is None
    assert projection_problem(OldModel()) == "OldModel has no compute_logits(hidden_states)"
    assert projection_problem(torch.nn.Linear(2, 2)) == "Linear has no compute_logits(hidden_states)"
    model, wrapper = Model(), LogitsProcessorWithLoRA()
    model.logits_processor = wrapper
    assert projection_problem(model) == "LogitsProcessorWithLoRA or its base_layer has no _get_logits"
    wrapper.base_layer = LogitsProcessor()
    assert projection_problem(model) == "LogitsProcessorWithLoRA._get_logits takes mapping, which its base_layer's does not"


@pytest.mark.slow
def test_an_engine_that_could_take_adapters_gives_the_base_models_numbers(tiny_model_dir: Path):
    # With LoRA on, vLLM's projection expects as many rows as it samples from; ours has others.
    teacher = load_teacher(config(tiny_model_dir, vllm=VllmConfig(route="worker"), engine_options={"enable_lora": True}))
    case = TeacherCase(teacher, dense_forward(tiny_model_dir), 5e-5)
    for sequence in random_sequences(case, [100, 3]):
        (answer,) = score(case, [sequence])
        assert np.abs(answer.padded()[1] - np.sort(case.dense(sequence), axis=-1)[:, :-9:-1]).max() < 5e-5
    closing(case)


class TestWithAPrefixCache:
    """One engine whose prefix cache is on, in which most of a repeated prompt is found."""

    @pytest.fixture(scope="class")
    def case(self, tiny_model_dir: Path) -> Iterator[TeacherCase]:
        teacher: Any = load_teacher(
            config(tiny_model_dir, vllm=VllmConfig(route="worker"), engine_options={"enable_prefix_caching": True})
        )
        yield TeacherCase(teacher, dense_forward(tiny_model_dir), 5e-5)
        teacher.close()

    def test_every_position_of_a_cached_prompt_is_there(self, case: TeacherCase):
        sequences = random_sequences(case, [250, 250], seed=4)
        first, again = score(case, sequences), score(case, sequences)
        for one, other in zip(first, again, strict=True):
            np.testing.assert_allclose(one.logprobs_E, other.logprobs_E, atol=5e-5)
        teacher: Any = case.teacher  # vLLM's own way has every row too, or `read_output` would say so
        for one, other in zip(first, teacher._score_publicly(sequences, top_k(8)), strict=True):
            np.testing.assert_allclose(one.logprobs_E, other.logprobs_E, atol=5e-5)

    def test_a_position_that_was_read_from_the_cache_is_an_error(self, case: TeacherCase, monkeypatch: pytest.MonkeyPatch):
        import vllm

        from kdcache.teacher.vllm import teacher as _vllm

        def params_that_read_the_cache(extra_args: dict[str, Any]) -> Any:
            return vllm.SamplingParams(max_tokens=1, temperature=0.0, detokenize=False, extra_args=extra_args)

        sequences = random_sequences(case, [250, 3], seed=5)
        score(case, sequences)
        monkeypatch.setattr(_vllm, "worker_params", params_that_read_the_cache)
        with pytest.raises(TeacherError, match=r"test#250: .* never computed 128 of 250 positions, the first of them 0"):
            score(case, sequences)

    def test_a_failed_selection_is_an_error_and_the_engine_lives_on(self, case: TeacherCase, monkeypatch: pytest.MonkeyPatch):
        from kdcache.teacher.vllm import worker as _vllm_worker

        def fail(*_: Any) -> Any:
            raise MemoryError("no room for the logits")

        sequences = random_sequences(case, [70, 3], seed=6)
        with monkeypatch.context() as patch:
            patch.setattr(_vllm_worker.Selector, "select", fail)
            with pytest.raises(TeacherError, match=r"MemoryError: no room for the logits; .*chunk_positions \(24\)"):
                score(case, sequences)
        assert [answer.num_positions for answer in score(case, sequences)] == [70, 3]
        closing(case)
