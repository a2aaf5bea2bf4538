"""Nothing that is not finite is published, and damage to a checkpoint is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from adapter_cases import OPTIONS, first_batches, make_student
from safetensors.torch import load_file, save_file
from test_evaluate import _options
from train_caches import train_config
from transformers import AutoModelForCausalLM, TrainingArguments

from kdcache.cli.main import main
from kdcache.config.train import TrainConfig
from kdcache.errors import ConfigError, NotFiniteError, StateError
from kdcache.loader.loader import Loader
from kdcache.train import step
from kdcache.train.adapters import BatchStream, KDTrainer, StudentLoss
from kdcache.train.evaluation.evaluate import evaluate
from kdcache.train.runs.run_folder import read_metrics
from kdcache.train.trainer import train

WILD = {"lr": 1e6, "warmup_fraction": 0.0, "schedule": "constant"}


def weights(folder: Path) -> list[torch.Tensor]:
    return list(load_file(folder / "model.safetensors").values())


def checkpoints(config: TrainConfig) -> list[Path]:
    return sorted((Path(config.out) / "checkpoints").iterdir())


def all_finite(tensors: list[torch.Tensor]) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


@pytest.mark.parametrize("lr", [1e6, 1e38])
def test_a_wild_rate_ends_the_run_with_its_last_finite_checkpoint(
    small_cache: Path, tiny_model_dir: Path, tmp_path: Path, lr: float, capsys: pytest.CaptureFixture[str]
) -> None:
    config = train_config(small_cache, tiny_model_dir, tmp_path / "run", optimizer=WILD | {"lr": lr}, checkpoint_every_steps=1)
    (tmp_path / "train.json").write_bytes(msgspec.json.encode(config))
    assert main(["train", str(tmp_path / "train.json")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    expected = (
        "step 3: the gradient's norm is nan" if lr == 1e6 else "step 1: the weight 'model.embed_tokens.weight' is not finite"
    )
    assert expected in captured.err
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "run" / "model").exists()
    kept = checkpoints(config) if (tmp_path / "run" / "checkpoints").exists() else []
    assert len(kept) == (1 if lr == 1e6 else 0)
    assert all(all_finite(weights(folder)) for folder in kept)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The batches with these ids have a NaN loss; the first five batches of all runs are noted in it."""
    bad: list[bytes] = []
    right = step.student_loss

    def student_loss(model: Any, batch: Any, *rest: Any) -> torch.Tensor:
        loss = right(model, batch, *rest)
        return loss * float("nan") if batch.input_ids_BT.numpy().tobytes() in bad else loss

    monkeypatch.setattr(step, "student_loss", student_loss)
    return bad


def test_a_bad_batch_ends_the_run_or_is_left_out_as_asked(
    small_cache: Path, tiny_model_dir: Path, tmp_path: Path, poisoned: list[bytes]
) -> None:
    config = train_config(small_cache, tiny_model_dir, tmp_path / "run")
    with Loader(str(small_cache), config.loader) as loader:
        stream = BatchStream(loader)
        poisoned.append(stream[4].input_ids_BT.numpy().tobytes())
        expected = loader.sources_before(loader.state_dict())
        stream.pause()
    with pytest.raises(NotFiniteError, match=r"step 5: the loss is nan") as stopped:
        train(config, show_progress=False)
    assert all(source in str(stopped.value) for source in expected)
    assert "step-00000003 stays" in str(stopped.value)
    assert not (tmp_path / "run" / "model").exists()

    # The advice: the same run goes on with leave to skip, and is the run that had it from the beginning.
    allowed: dict[str, Any] = {"max_skipped_steps": 1}
    assert train(train_config(small_cache, tiny_model_dir, tmp_path / "run", **allowed), show_progress=False).num_skipped == 1
    train(train_config(small_cache, tiny_model_dir, tmp_path / "whole", **allowed), show_progress=False)
    lines = read_metrics(tmp_path / "run")
    assert lines == read_metrics(tmp_path / "whole")
    assert [line["step"] for line in lines if "left_out" in line] == [5]
    assert all_finite(weights(tmp_path / "run" / "model"))


def test_a_step_that_is_left_out_changes_no_weight_and_no_mean(
    small_cache: Path, tiny_model_dir: Path, tmp_path: Path, poisoned: list[bytes]
) -> None:
    config = train_config(small_cache, tiny_model_dir, tmp_path)
    (batch,) = first_batches(small_cache, OPTIONS, 1)
    model = make_student()
    optimizer = step.make_optimizer(model, config.optimizer)
    step.optimize(model, optimizer, batch, config, 1e-3)
    before = [p.detach().clone() for p in model.parameters()]
    means = [state["exp_avg"].clone() for state in optimizer.state.values()]
    poisoned.append(batch.input_ids_BT.numpy().tobytes())
    loss, _ = step.optimize(model, optimizer, batch, config, 1e-3)
    assert loss != loss
    assert all(torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))
    assert all(torch.equal(one, s["exp_avg"]) for one, s in zip(means, optimizer.state.values(), strict=True))


def nan_model(source: Path, out: Path) -> Path:
    model = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        model.lm_head.weight[3, 2] = float("nan")
    model.save_pretrained(out)
    return out


def test_a_model_that_is_not_finite_is_neither_trained_nor_evaluated(
    small_cache: Path,
    tiny_model_dir: Path,
    heldout: Path,
    tmp_path: Path,
) -> None:
    broken = nan_model(tiny_model_dir, tmp_path / "broken")
    student = {"model": str(broken), "init": "pretrained", "tokenizer": str(tiny_model_dir)}
    with pytest.raises(ConfigError, match=r"student.model: the weight 'lm_head.weight' .* not finite"):
        train(train_config(small_cache, tiny_model_dir, tmp_path / "run", student=student), show_progress=False)
    with pytest.raises(ConfigError, match=r"--student bad: the weight 'lm_head.weight'"):
        evaluate(_options(tmp_path, tiny_model_dir, heldout, tmp_path / "out", students={"bad": str(broken)}))
    # Finite weights, and logits that are not.
    huge = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    with torch.no_grad():
        huge.lm_head.weight.mul_(1e38)
    huge.save_pretrained(tmp_path / "huge")
    with pytest.raises(NotFiniteError, match="'bad' cannot be scored: on held-out text 0"):
        evaluate(_options(tmp_path, tiny_model_dir, heldout, tmp_path / "out", students={"bad": str(tmp_path / "huge")}))
    assert not (tmp_path / "out" / "results.json").exists()


def test_a_held_out_loss_that_is_not_finite_ends_the_run(
    small_cache: Path,
    tiny_model_dir: Path,
    heldout: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kdcache.train.trainer.heldout_nats_per_token", lambda *_: float("inf"))
    config = train_config(small_cache, tiny_model_dir, tmp_path / "run", heldout={"data": str(heldout)})
    with pytest.raises(NotFiniteError, match="step 0: the held-out loss is inf"):
        train(config, show_progress=False)


def test_other_trainers_stop_and_save_nothing(small_cache: Path, tmp_path: Path) -> None:
    arguments = TrainingArguments(
        str(tmp_path), max_steps=4, save_steps=1, learning_rate=1e30, report_to=[], use_cpu=True, disable_tqdm=True
    )
    trainer = KDTrainer(make_student(), arguments, cache=str(small_cache), loader=OPTIONS)
    with pytest.raises(NotFiniteError, match=r"the student's loss is nan, in the batch of the sequences random#"):
        trainer.train()
    saved = [folder for folder in tmp_path.glob("checkpoint-*") if not all_finite(weights(folder))]
    assert saved == []
    with torch.no_grad():
        trainer.model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(NotFiniteError, match=r"the weight 'lm_head.weight' is not finite"):
        trainer.save_model(str(tmp_path / "final"))
    trainer.close()


def test_a_loop_of_ones_own_stops_too_unless_it_takes_what_comes(small_cache: Path) -> None:
    model = make_student()
    with Loader(str(small_cache), OPTIONS) as loader:
        careful, careless = (StudentLoss(model, loader, check_finite=check) for check in (True, False))
        batch = BatchStream(loader)[0]
        with torch.no_grad():
            model.model.norm.weight.fill_(float("inf"))
        assert not careless(model, batch).isfinite()
        with pytest.raises(NotFiniteError, match=r"sequences random#.*: the weight 'model.norm.weight' is not finite"):
            careful(model, batch)
        with pytest.raises(ConfigError, match=r"the weight 'model.norm.weight' of LlamaForCausalLM is not finite"):
            StudentLoss(model, loader)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "digests.json"])
def test_a_flipped_byte_of_a_checkpoint_is_named(small_cache: Path, tiny_model_dir: Path, tmp_path: Path, name: str) -> None:
    config = train_config(small_cache, tiny_model_dir, tmp_path / "run", steps=1)
    train(config, show_progress=False)
    (folder,) = checkpoints(config)
    data = bytearray((folder / name).read_bytes())
    data[-3 if name != "digests.json" else len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(StateError, match=rf"step-00000001: this checkpoint cannot be loaded \({name} "):
        train(config, show_progress=False)


def test_a_flipped_byte_of_a_finished_model_is_named(
    small_cache: Path,
    tiny_model_dir: Path,
    heldout: Path,
    tmp_path: Path,
) -> None:
    config = train_config(small_cache, tiny_model_dir, tmp_path / "run", steps=1)
    file = train(config, show_progress=False).model / "model.safetensors"
    tensors = load_file(file)
    save_file({name: tensor + 1e-3 for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
    options = _options(tmp_path / "run", tiny_model_dir, heldout, tmp_path / "out", students={"kd": str(tmp_path / "run")})
    with pytest.raises(ConfigError, match=r"--student kd: .* model.safetensors is damaged: .* delete digests.json"):
        evaluate(options)
    (file.parent / "digests.json").unlink()  # the advice
    evaluate(options)
