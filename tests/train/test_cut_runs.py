"""Students cut from their teacher in training runs, and as folders of their own."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from tiny_model import build_tiny_model, stdlib_texts
from train_caches import load_teacher_model, train_config, write_cache

from kdcache.cli.main import main
from kdcache.config.train import StudentConfig, TrainConfig
from kdcache.errors import ConfigError, StateError
from kdcache.loader.cache import open_cache
from kdcache.teacher import load_tokenizer
from kdcache.teacher.checkpoint import weights_digest
from kdcache.teacher.hf.activations import block_influence
from kdcache.train import trainer
from kdcache.train.init import initial
from kdcache.train.init.texts import source_of
from kdcache.train.runs.run_folder import read_metrics

LAYERS = {"drop": 2, "by": "block_influence"}
WIDTH = {"hidden_size": 48, "intermediate_size": 96}


@pytest.fixture(scope="module")
def teacher_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("deep") / "teacher", num_hidden_layers=4)


@pytest.fixture(scope="module")
def cache_dir(teacher_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cache(tmp_path_factory.mktemp("deep") / "cache", teacher_dir, k=16, num_sequences=10)


def run_config(cache: Path, teacher: Path, out: Path, **student: Any) -> TrainConfig:
    asked = {"model": str(teacher), "init": "from_teacher", "layers": LAYERS, "width": WIDTH}
    return train_config(cache, teacher, out, student=asked | student)


def weights_of(out: Path) -> bytes:
    return (out / "model" / "model.safetensors").read_bytes()


def stop_after(config: TrainConfig, num_steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """End a run without a word at some step."""
    real = trainer.optimize
    calls = iter(range(num_steps))

    def optimize(*args: Any) -> Any:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(trainer, "optimize", optimize)
    with pytest.raises(KeyboardInterrupt):
        trainer.train(config, show_progress=False)
    monkeypatch.undo()


def test_a_run_starts_from_what_was_cut_and_says_what_it_was(cache_dir: Path, teacher_dir: Path, tmp_path: Path) -> None:
    trainer.train(run_config(cache_dir, teacher_dir, tmp_path / "run"), show_progress=False)
    report = json.loads((tmp_path / "run" / "student" / "report.json").read_text())
    assert len(report["layers"]) == 2
    assert report["statistics"]["source"] == "the cache's sequences"
    assert report["statistics"]["num_sequences"] == 10
    assert (report["teacher"]["hidden_size"], report["student"]["hidden_size"]) == (64, 48)
    assert report["share_of_non_embedding"] == report["student"]["non_embedding"] / report["teacher"]["non_embedding"]
    fields = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert (fields["num_hidden_layers"], fields["hidden_size"], fields["intermediate_size"]) == (2, 48, 96)


def test_a_stopped_run_resumes_exactly_and_without_the_teacher(
    cache_dir: Path, teacher_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_config(cache_dir, teacher_dir, tmp_path / "whole")
    trainer.train(whole, show_progress=False)
    stopped = run_config(cache_dir, teacher_dir, tmp_path / "stopped")
    stop_after(stopped, 5, monkeypatch)
    monkeypatch.setattr(initial, "cut_from_teacher", lambda *_: pytest.fail("the teacher is not asked again"))
    trainer.train(stopped, show_progress=False)
    assert weights_of(tmp_path / "stopped") == weights_of(tmp_path / "whole")
    losses = [[line["loss"] for line in read_metrics(tmp_path / name) if "loss" in line] for name in ("whole", "stopped")]
    assert losses[0] == losses[1]


def test_a_run_that_forgot_what_was_cut_is_not_resumed(
    cache_dir: Path, teacher_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_config(cache_dir, teacher_dir, tmp_path / "run")
    stop_after(config, 5, monkeypatch)
    path = tmp_path / "run" / "student" / "config.json"
    path.write_text(path.read_text().replace('"hidden_size": 48', '"hidden_size": 44'))
    with pytest.raises(StateError, match=r"config\.json is damaged.*delete its checkpoints to train from the start"):
        trainer.train(config, show_progress=False)


def test_what_the_capture_measured_is_taken_where_it_is(cache_dir: Path, teacher_dir: Path) -> None:
    config = msgspec.convert({"model": str(teacher_dir), "init": "from_teacher"}, StudentConfig)
    with open_cache(cache_dir) as cache:
        source = source_of(config, lambda: load_tokenizer(str(teacher_dir)), cache)
        assert source is not None
        measured = source.measure(load_teacher_model(teacher_dir))

        class Sidecars:
            """A cache whose capture has measured the teacher."""

            manifest = msgspec.structs.replace(
                cache.manifest, sidecars=(type("Info", (), {"name": "activation_statistics"})(),)
            )

            def sidecar(self, name: str) -> Any:
                assert name == "activation_statistics"
                return {**measured, "block_influence": measured["block_influence"] * 2}

        def of_teacher(**changes: str | None) -> Any:
            teacher = msgspec.structs.replace(cache.manifest.identity.teacher, **changes)
            identity = msgspec.structs.replace(cache.manifest.identity, teacher=teacher)
            kept = Sidecars()
            kept.manifest = msgspec.structs.replace(kept.manifest, identity=identity)
            return kept

        kept = of_teacher(weights_digest=weights_digest(str(teacher_dir)))
        taken = source_of(config, lambda: load_tokenizer(str(teacher_dir)), kept)
        assert taken is not None
        assert taken.name == "the capture (activation_statistics)"
        assert (block_influence(taken.measure(load_teacher_model(teacher_dir))) == 2 * block_influence(measured)).all()
        hub = msgspec.structs.replace(config, model="some/model")
        for asked, changes, expected in (
            (config, {"weights_digest": "0" * 64}, "the cache's sequences"),
            (config, {"weights_digest": None, "model": "some/model"}, "the cache's sequences"),
            (hub, {"weights_digest": None, "model": "other/model"}, "the cache's sequences"),
            (hub, {"weights_digest": "0" * 64, "model": "model"}, "the cache's sequences"),
            (hub, {"weights_digest": None, "model": "some/model"}, "the capture (activation_statistics)"),
        ):
            found = source_of(asked, lambda: load_tokenizer(str(teacher_dir)), of_teacher(**changes))
            assert found is not None
            assert found.name == expected, changes


def test_the_command_writes_a_folder_that_loads_anywhere(
    cache_dir: Path, teacher_dir: Path, heldout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "student"
    arguments = ["--drop", "1", "--by", "angular_distance", "--num-attention-heads", "2", "--hidden-size", "48"]
    measured_on = ["--cache", str(cache_dir), "--heldout", str(heldout)]
    assert main(["student", str(teacher_dir), "--out", str(out), *arguments, *measured_on]) == 0
    printed = capsys.readouterr().out
    assert "held-out nats per token, before any training" in printed
    assert printed.splitlines()[0].split() == ["layer", "block", "influence", "in", "the", "student"]
    report = json.loads((out / "report.json").read_text())
    assert report["heldout_nats_per_token"]["student"] > 0
    program = (
        "import sys, torch; from transformers import AutoModelForCausalLM, AutoTokenizer; "
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1]); tokenizer = AutoTokenizer.from_pretrained(sys.argv[1]); "
        "ids = tokenizer('import sys', return_tensors='pt').input_ids; "
        "print(model.config.num_hidden_layers, model.config.hidden_size, model.generation_config.eos_token_id, "
        "bool(model(ids).logits.isfinite().all()), tokenizer.chat_template is not None)"
    )
    found = subprocess.run([sys.executable, "-c", program, str(out)], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["3", "48", "1", "True", "True"]


@pytest.mark.slow
@pytest.mark.vllm
def test_vllm_loads_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vllm")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    teacher, out = (
        build_tiny_model(tmp_path / "teacher", num_attention_heads=4, num_key_value_heads=2, head_dim=32),
        tmp_path / "out",
    )
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in stdlib_texts()[:2]))
    width = ["--hidden-size", "48", "--num-attention-heads", "2", "--intermediate-size", "96", "--num-sequences", "4"]
    assert main(["student", str(teacher), "--out", str(out), "--keep", "1", *width, "--data", str(texts)]) == 0
    model, ids = load_teacher_model(out), [0, 30, 77, 120, 200, 310]
    logprobs = torch.log_softmax(model(torch.tensor([ids])).logits[0].detach().double(), dim=-1)
    # In a process of its own: vLLM's kernels do not register in one that has trained.
    program = (
        "import json, sys; from vllm import LLM, SamplingParams; ids = json.loads(sys.argv[2]); "
        "engine = LLM(sys.argv[1], dtype='float32', enforce_eager=True, max_model_len=64); "
        "asked = SamplingParams(max_tokens=1, prompt_logprobs=0); "
        "(answer,) = engine.generate([{'prompt_token_ids': ids}], asked, use_tqdm=False); "
        "print('found', *(answer.prompt_logprobs[i][ids[i]].logprob for i in range(1, len(ids))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(out), json.dumps(ids)], capture_output=True, text=True, check=True
    )
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("found "))
    expected = [float(logprobs[position, token]) for position, token in enumerate(ids[1:])]
    assert [float(number) for number in line.split()[1:]] == pytest.approx(expected, abs=1e-4)


def test_the_command_refuses_in_one_sentence(
    cache_dir: Path, teacher_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    other = build_tiny_model(tmp_path / "other")
    path = other / "tokenizer.json"
    path.write_text(path.read_text().replace("<|tool|>", "<|tuul|>"))
    cases: list[tuple[list[str], str]] = [
        ([str(teacher_dir), "--out", str(tmp_path / "a")], "nothing is cut"),
        ([str(teacher_dir), "--out", str(tmp_path / "a"), "--drop", "2"], "--data or --cache"),
        ([str(teacher_dir), "--out", str(tmp_path / "taken"), "--every", "2"], "is not an empty folder"),
        ([str(teacher_dir), "--out", str(tmp_path / "a"), "--keep", "3,1"], "ascending order"),
        ([str(teacher_dir), "--out", str(tmp_path / "a"), "--every", "2", "--data", "x", "--cache", "y"], "are both given"),
        ([str(other), "--out", str(tmp_path / "a"), "--drop", "1", "--cache", str(cache_dir)], "which is not the teacher's"),
    ]
    for arguments, message in cases:
        assert main(["student", *arguments]) == 2
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("kdcache: error: ")]
        assert len(said) == 1
        assert message in said[0]
    assert not (tmp_path / "a").exists()


def test_a_folder_that_does_not_give_the_student_back_is_not_kept(
    teacher_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kdcache.train.init import folder

    model = load_teacher_model(teacher_dir)
    monkeypatch.setattr(folder, "load_model", lambda *_, **__: build_other(model))
    with pytest.raises(ConfigError, match="saved and loaded again, gives other logits"):
        folder.write_student(tmp_path / "out", model, {}, tokenizer=str(teacher_dir))
    assert list(tmp_path.iterdir()) == []


def build_other(model: Any) -> Any:
    torch.manual_seed(1)
    return type(model)(model.config)
