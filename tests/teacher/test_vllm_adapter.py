"""A LoRA adapter on vLLM's worker route, with the real engine: the distributions of the merged weights, and who they are of."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from contracts.generation import GenerationCase, make_prompts, write
from contracts.teacher import TeacherCase, make_sequence, random_sequences, score, top_k
from dense_forward import dense_forward
from lora_adapters import merge, write_adapter

from kdcache.config.capture import TeacherConfig
from kdcache.errors import TeacherError
from kdcache.format.manifest import SelectionInfo
from kdcache.teacher import load_teacher, load_tokenizer
from kdcache.teacher.select.reference import select_reference

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm


def config(base: Path, adapter: Path, **options: Any) -> TeacherConfig:
    # 64 tokens per step and chunks of 24 positions: sequences are split over steps, steps over chunks.
    return TeacherConfig(
        model=str(base), adapter=str(adapter), backend="vllm", tokens_per_forward=64, chunk_positions=24, **options
    )


@pytest.fixture(scope="module")
def adapter(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapted") / "adapter", tiny_model_dir)


@pytest.fixture(scope="module")
def merged(tiny_model_dir: Path, adapter: Path) -> Path:
    return merge(tiny_model_dir, adapter, adapter.parent / "merged")


@pytest.fixture(scope="module")
def case(tiny_model_dir: Path, adapter: Path, merged: Path) -> Iterator[TeacherCase]:
    teacher: Any = load_teacher(config(tiny_model_dir, adapter, strict=True))
    assert teacher.route == "worker"
    yield TeacherCase(teacher, dense_forward(merged), 5e-5)
    teacher.close()


def test_an_adapters_distributions_are_those_of_the_merged_weights(case: TeacherCase, tiny_model_dir: Path, merged: Path):
    rng = np.random.default_rng(2)
    whole = random_sequences(case, [150, 3, 64, 1, 99])
    sequences = [*whole, *(make_sequence(s.input_ids_N, rng.random(s.num_tokens) < 0.4) for s in whole[:3])]
    transformers = load_teacher(TeacherConfig(model=str(merged), backend="transformers"))
    expected = list(transformers.score(sequences, top_k(32)))
    transformers.close()
    for sequence, ours, theirs in zip(sequences, score(case, sequences, 32), expected, strict=True):
        assert ours.num_positions == len(sequence.positions_P)
        np.testing.assert_allclose(ours.padded()[1], theirs.padded()[1], atol=5e-5)
        assert (ours.token_ids_E == theirs.token_ids_E).mean() > 0.98  # the rest: neighbours that are equal up to rounding
    base_NV, merged_NV = dense_forward(tiny_model_dir)(whole[0]), case.dense(whole[0])
    assert np.abs(base_NV - merged_NV).mean() > 0.5


def test_draws_from_an_adapter_are_those_of_the_merged_weights(case: TeacherCase):
    from kdcache.teacher.select.uniforms import position_states

    selection = SelectionInfo(kind="top_k_sampled", params={"k": 4, "num_draws": 20, "seed": 5}, entropy=True)
    (sequence,) = random_sequences(case, [80], seed=3)
    (answer,) = case.teacher.score([sequence], selection)
    states_P = position_states(5, sequence.key, sequence.positions_P)
    expected = select_reference(case.dense(sequence), sequence.target_ids_P, selection, states_P)
    assert answer.entropy_P is not None
    assert expected.entropy_P is not None
    np.testing.assert_allclose(answer.entropy_P, expected.entropy_P, atol=1e-4)
    np.testing.assert_array_equal(answer.token_ids_E, expected.token_ids_E)


def test_answers_come_from_the_adapter_too(case: TeacherCase, tiny_model_dir: Path):
    teacher: Any = case.teacher
    generation = GenerationCase(teacher, load_tokenizer(str(tiny_model_dir)), case.dense, 5e-5)
    prompts = make_prompts(generation, [5, 20])
    answers = write(generation, prompts, temperature=0.0, max_tokens=12, ignore_eos=True)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = [*prompt.sequence.input_ids_N.tolist(), *answer.token_ids_N.tolist()]
        most_probable_N = case.dense(make_sequence(ids)).argmax(axis=-1)
        assert most_probable_N[prompt.sequence.num_tokens - 1 : -1].tolist() == answer.token_ids_N.tolist()


def test_the_identity_tells_adapters_apart(case: TeacherCase, tiny_model_dir: Path, adapter: Path):
    from kdcache.teacher.checkpoint import folder_digest, weights_digest

    identity = case.teacher.identity
    assert identity.engine_options["adapter"] == folder_digest(adapter)
    assert identity.engine_options["lora"] is True
    assert identity.weights_digest not in (None, weights_digest(str(tiny_model_dir)))


@pytest.mark.slow
@pytest.mark.parametrize("astray", [{"prefix": "layers"}, {"wider": -8}], ids=["other layers", "a narrower model"])
def test_what_vllm_would_leave_out_without_a_word_is_refused(tiny_model_dir: Path, tmp_path: Path, astray: dict[str, Any]):
    adapter = write_adapter(tmp_path / "adapter", tiny_model_dir, **astray)
    with pytest.raises(TeacherError, match=r"the weights of \S*layers\.0\.\S+, .* fit no part of the model; merge"):
        load_teacher(config(tiny_model_dir, adapter))


def test_an_adapter_that_vllm_does_not_take_is_refused_and_leaves_no_engine(tiny_model_dir: Path, tmp_path: Path):
    adapter = write_adapter(tmp_path / "adapter", tiny_model_dir, wider=8)
    with pytest.raises(TeacherError, match=r"the adapter '\S+adapter' does not load with vLLM: "):
        load_teacher(config(tiny_model_dir, adapter))
