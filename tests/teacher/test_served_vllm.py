"""The served teacher with a real `vllm serve` on CPUs, started once: promises, agreement with other teachers, a whole job."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from agreement import measure_agreement
from contracts.teacher import PROMISES, TeacherCase, closing, random_sequences, score, top_k
from dense_forward import dense_forward
from vllm_server import FrontServer, vllm_serve

import kdcache
from kdcache.cli.main import main
from kdcache.config.capture import TeacherConfig
from kdcache.config.server import ServerConfig
from kdcache.errors import ConfigError, TeacherError
from kdcache.teacher import load_teacher

pytest.importorskip("vllm")
pytest.importorskip("httpx2")
pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.fixture(scope="module")
def url(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with vllm_serve(tiny_model_dir, tmp_path_factory.mktemp("serve"), "--max-logprobs", "-1") as url:
        yield url


def config(url: str, folder: Path, **server: object) -> TeacherConfig:
    return TeacherConfig(model=str(folder), backend="served", server=ServerConfig(url=url, **server))  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module", params=["prompt_logprobs", "echo"])
def case(request: pytest.FixtureRequest, url: str, tiny_model_dir: Path) -> Iterator[TeacherCase]:
    teacher = load_teacher(config(url, tiny_model_dir, api=request.param))

    def reload_identity():
        other = load_teacher(config(url, tiny_model_dir))
        other.close()
        return other.identity

    yield (case := TeacherCase(teacher, dense_forward(tiny_model_dir), 5e-5, reload_identity))
    closing(case)


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.__name__)
def test_vllm_serve_keeps_every_promise(promise: Callable[[TeacherCase], None], case: TeacherCase):
    promise(case)


def test_it_gives_the_float64_forward(case: TeacherCase):
    agreement = measure_agreement(case, random_sequences(case, [255, 100, 31, 1, 2, 64]), 32)
    print(f"vllm serve, float32, against a float64 forward: {agreement}")
    assert agreement.max_error_nats < 5e-5
    assert agreement.top_k_share > 0.999


def test_it_says_the_same_as_the_vllm_teacher_and_float32_transformers(url: str, tiny_model_dir: Path):
    teacher = load_teacher(config(url, tiny_model_dir))
    sequences = random_sequences(TeacherCase(teacher, dense_forward(tiny_model_dir), 5e-5), [255, 100, 31, 1, 2, 64])
    served = list(teacher.score(sequences, top_k(32)))
    teacher.close()
    for backend in ("vllm", "transformers"):
        teacher = load_teacher(TeacherConfig(model=str(tiny_model_dir), backend=backend, dtype="float32"))
        for ours, theirs in zip(served, teacher.score(sequences, top_k(32)), strict=True):
            np.testing.assert_allclose(ours.logprobs_E, theirs.logprobs_E, atol=5e-5)
            np.testing.assert_allclose(ours.tail_mass_P, theirs.tail_mass_P, atol=5e-5)
            same = (np.sort(ours.token_ids_E.reshape(-1, 32)) == np.sort(theirs.token_ids_E.reshape(-1, 32))).all(axis=-1)
            assert same.mean() > 0.99  # but for ties for the last place
        teacher.close()


def test_prompts_that_are_read_in_several_steps_leave_the_server_alive(case: TeacherCase):
    # Sixteen in flight and 256 tokens to a step: most are cut.
    sequences = random_sequences(case, [250] * 24, seed=9)
    for sequence, answer in zip(sequences, score(case, sequences, 4), strict=True):
        assert answer.num_positions == sequence.num_tokens
    score(case, sequences[:1], 4)


def test_its_identity_says_what_the_server_says(case: TeacherCase):
    identity = case.teacher.identity
    assert (identity.engine, identity.model, identity.architecture) == ("served", "tiny-llama", "LlamaForCausalLM")
    assert (identity.vocab_size, identity.context_length) == (520, 255)
    assert identity.engine_options["served_model"] == "tiny-llama"
    assert identity.engine_options["system_fingerprint"].startswith(f"vllm-{identity.engine_version}-")


def test_the_servers_limit_of_k_is_learnt_from_its_own_words(url: str, tiny_model_dir: Path):
    teacher = load_teacher(config(url, tiny_model_dir, vocab_size=600))
    case = TeacherCase(teacher, dense_forward(tiny_model_dir), 5e-5)
    with pytest.raises(ConfigError, match=r"selection\.k is 530, .*max allowed: 520.*; set selection\.k to 520 or less"):
        teacher.score(random_sequences(case, [4]), top_k(530))
    teacher.close()


def test_a_name_that_it_does_not_serve_and_a_path_that_it_does_not_have_are_one_sentence(url: str, tiny_model_dir: Path):
    with pytest.raises(ConfigError, match=r"teacher\.server\.model is 'other', but the server .* serves '.*tiny-llama'"):
        load_teacher(config(url, tiny_model_dir, model="other"))
    with pytest.raises(ConfigError, match=r"status 404: Not Found; with most servers teacher\.server\.url ends in /v1"):
        load_teacher(config(url.removesuffix("/v1"), tiny_model_dir))


def test_another_tokenizer_than_the_servers_is_refused(url: str, tiny_model_dir: Path):
    teacher = TeacherConfig(model=str(tiny_model_dir), tokenizer="fake", backend="served", server=ServerConfig(url=url))
    with pytest.raises(TeacherError, match="has another tokenizer than 'fake': token"):
        load_teacher(teacher)


def test_a_capture_whose_server_is_killed_says_so_and_goes_on_when_it_is_back(
    url: str, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "a.txt").write_text("".join(f"def line_{n}(x): return x + {n}\n" for n in range(40)))
    front = FrontServer(url, completions=25)  # three to find the server, one for k, and 21 of the 40 lines
    sections = {
        "input": {"format": "lines", "paths": [str(tmp_path / "a.txt")], "window": {"size": 64}},
        "teacher": {
            "model": str(tiny_model_dir),
            "backend": "served",
            "server": {"url": front.url, "retries": 1, "concurrency": 2},
        },
        "selection": {"k": 16},
        "codec": {"id": "raw"},
        "out": str(tmp_path / "cache"),
        "shards": {"unit_items": 4},
    }
    (tmp_path / "c.yaml").write_text(json.dumps(sections))
    command = ["capture", str(tmp_path / "c.yaml")]
    assert main(command) == 2
    (sentence,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("kdcache: error: ")]
    assert f"the server {front.url} was asked 2 times" in sentence
    with kdcache.open(tmp_path / "cache") as reader:
        assert 0 < len(reader) < 40
    again = FrontServer(url, port=front.port)
    assert main(command) == 0
    assert "had been published by earlier runs" in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "cache")]) == 0
    again.close()
    _compare_with_transformers(sections, tmp_path)


def _compare_with_transformers(sections: dict[str, Any], folder: Path) -> None:
    local = {"model": sections["teacher"]["model"], "backend": "transformers", "dtype": "float32"}
    (folder / "local.yaml").write_text(json.dumps(sections | {"teacher": local, "out": str(folder / "local")}))
    assert main(["capture", str(folder / "local.yaml")]) == 0
    with kdcache.open(folder / "cache") as served, kdcache.open(folder / "local") as local_reader:
        assert len(served) == len(local_reader) == 40
        for index in range(40):
            ours, theirs = served[index], local_reader[index]
            assert ours.sequence.key == theirs.sequence.key
            np.testing.assert_allclose(ours.distributions.logprobs_E, theirs.distributions.logprobs_E, atol=5e-5)
