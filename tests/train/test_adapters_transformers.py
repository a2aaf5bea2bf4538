"""transformers' Trainer over a cache: equal to a plain loop, and a stopped run goes on exactly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_cases import LR, OPTIONS, make_student, plain_losses
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainingArguments

from kdcache.config.loader import LoaderConfig
from kdcache.config.train import LossConfig
from kdcache.errors import ConfigError, StateError
from kdcache.loader.loader import Loader
from kdcache.train.adapters import KDTrainer, num_stream_batches


class StopAt(TrainerCallback):
    """A failure after so many steps, as a crash would be one."""

    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def arguments(out: Path, **changes: Any) -> TrainingArguments:
    fields: dict[str, Any] = {
        "output_dir": str(out),
        "max_steps": 9,
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
        "adam_beta2": 0.999,
        "optim": "adamw_torch",
        "logging_steps": 1,
        "save_steps": 2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return TrainingArguments(**(fields | changes))


def run(
    cache: Path, out: Path, *, stop: int | None = None, resume: bool = False, student: Any = None, **changes: Any
) -> list[float]:
    """The losses of all steps, those before a resume too."""
    kd = {name: changes.pop(name) for name in ("loss", "loader") if name in changes}
    trainer = KDTrainer(
        student or make_student(),
        arguments(out, **changes),
        cache=cache,
        callbacks=[StopAt(stop)],
        **({"loader": OPTIONS} | kd),
    )
    try:
        trainer.train(resume_from_checkpoint=resume)
    except KeyboardInterrupt:
        assert stop is not None
    finally:
        trainer.close()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def test_trainer_trains_as_a_plain_loop_does(small_cache: Path, tmp_path: Path) -> None:
    ours = run(small_cache, tmp_path, save_strategy="no")
    assert ours == pytest.approx(plain_losses(small_cache, OPTIONS, 9), rel=1e-4)
    assert ours[0] - ours[-1] > 0.1


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_accumulated_batches_weigh_by_their_positions(small_cache: Path, tmp_path: Path, alpha: float) -> None:
    loss = LossConfig(alpha=alpha)
    ours = run(small_cache, tmp_path, gradient_accumulation_steps=3, max_steps=4, save_strategy="no", loss=loss)
    assert ours == pytest.approx(plain_losses(small_cache, OPTIONS, 4, accumulated=3, loss=loss), rel=1e-4)


@pytest.mark.parametrize(("accumulated", "stops"), [(1, (3, 5, 7)), (2, (5, 8))])
def test_a_run_stopped_at_any_step_and_resumed_is_the_run_that_was_not(
    small_cache: Path, tmp_path: Path, accumulated: int, stops: tuple[int, ...]
) -> None:
    """To the bit, with dropout: also at the ends of epochs, and with steps after the last checkpoint."""

    def go(out: Path, **options: Any) -> list[float]:
        student = make_student(attention_dropout=0.2)
        return run(small_cache, out, student=student, gradient_accumulation_steps=accumulated, **options)

    whole = go(tmp_path / "whole")
    assert len(whole) == 9
    for stop in stops:
        out = tmp_path / f"stopped-{stop}"
        go(out, stop=stop)
        assert go(out, resume=True) == whole
        for name, tensor in load_file(tmp_path / "whole" / "checkpoint-9" / "model.safetensors").items():
            assert torch.equal(tensor, load_file(out / "checkpoint-9" / "model.safetensors")[name]), name


def test_a_resume_reads_no_batch_that_was_read_before(
    small_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = LoaderConfig(seq_len=64, batch_rows=2, num_threads=0, seed=3)
    run(small_cache, tmp_path, stop=7, loader=options)
    read: list[int] = []
    original = Loader._read

    def counted(self: Loader, plan: Any, number: int) -> Any:
        read.append(number)
        return original(self, plan, number)

    monkeypatch.setattr(Loader, "_read", counted)
    run(small_cache, tmp_path, resume=True, loader=options)
    assert len(read) == 3, "of nine steps six are in the checkpoint"


def test_epochs_are_those_of_the_cache(small_cache: Path, tmp_path: Path) -> None:
    for accumulated, epochs in ((1, 2), (3, 1.5)):
        trainer = KDTrainer(
            make_student(),
            arguments(tmp_path, max_steps=-1, num_train_epochs=epochs, gradient_accumulation_steps=accumulated, save_steps=99),
            cache=small_cache,
            loader=OPTIONS,
        )
        trainer.train()
        num_batches = num_stream_batches(trainer.stream.loader, epochs)
        assert trainer.stream.next_index == trainer.state.global_step * accumulated
        assert 0 <= trainer.stream.next_index - num_batches < accumulated
        trainer.close()


def test_evaluation_is_the_trainers_own(small_cache: Path, tmp_path: Path) -> None:
    model = make_student()
    dataset = [{"input_ids": torch.arange(9) + i, "labels": torch.arange(9) + i} for i in range(4)]
    trainer = KDTrainer(model, arguments(tmp_path), cache=small_cache, loader=OPTIONS, eval_dataset=dataset)
    result = trainer.evaluate()
    trainer.close()
    ids = torch.stack([row["input_ids"] for row in dataset])
    with torch.no_grad():
        expected = model.eval()(input_ids=ids, labels=ids).loss
    assert result["eval_loss"] == pytest.approx(float(expected), rel=1e-5)


def test_bfloat16_is_close_to_float32(small_cache: Path, tmp_path: Path) -> None:
    ours = run(small_cache, tmp_path, bf16=True, save_strategy="no")
    assert ours == pytest.approx(run(small_cache, tmp_path, save_strategy="no"), rel=0.02)


def test_checkpoints_that_do_not_fit_are_refused(small_cache: Path, tmp_path: Path) -> None:
    run(small_cache, tmp_path, max_steps=4)
    with pytest.raises(StateError, match="seed 3, here 4"):
        run(small_cache, tmp_path, resume=True, loader=LoaderConfig(seq_len=64, batch_rows=2, seed=4))
    with pytest.raises(StateError, match="gradient_accumulation_steps"):
        run(small_cache, tmp_path, resume=True, gradient_accumulation_steps=2)
    path = tmp_path / "checkpoint-4" / "trainer_state.json"
    state = json.loads(path.read_text())
    del state["stateful_callbacks"]["kdcache_loader"]
    path.write_text(json.dumps(state))
    with pytest.raises(StateError, match="holds no state of a kdcache loader"):
        run(small_cache, tmp_path, resume=True)


def test_what_has_no_say_is_refused(small_cache: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="train_dataset is given"):
        KDTrainer(make_student(), arguments(tmp_path), cache=small_cache, train_dataset=[{"input_ids": [1]}])


def test_the_trainers_arguments_are_not_changed(small_cache: Path, tmp_path: Path) -> None:
    args = arguments(tmp_path, max_steps=-1, num_train_epochs=2)
    KDTrainer(make_student(), args, cache=small_cache, loader=OPTIONS).close()
    assert (args.max_steps, args.per_device_train_batch_size) == (-1, 8)
