import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from train_caches import load_teacher_model, train_config, write_cache
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from kdcache.config.train import TrainConfig
from kdcache.errors import ConfigError, InputError, MismatchError, StateError
from kdcache.loader.batches.batch import NO_TARGET, Batch
from kdcache.loader.loader import Loader
from kdcache.loader.torch_batches import to_torch
from kdcache.loss.prepare import LossSettings
from kdcache.loss.sparse_kd import sparse_kd_loss
from kdcache.store.reader import open_reader
from kdcache.train.body import hidden_states, output_projection
from kdcache.train.runs.run_folder import RunFolder, read_metrics
from kdcache.train.schedule import learning_rate
from kdcache.train.step import make_optimizer, student_loss
from kdcache.train.student import build_student
from kdcache.train.trainer import Trainer, train


def _run(config: TrainConfig) -> list[dict[str, Any]]:
    train(config, show_progress=False)
    return read_metrics(config.out)


def _sequences(batch: Batch) -> list[np.ndarray]:
    """The token ids of each sequence of a packed batch."""
    found = []
    for row, segments in zip(batch.input_ids_BT, batch.segment_ids_BT, strict=True):
        found += [row[segments == segment] for segment in range(1, segments.max() + 1)]
    return found


def _dense_kl(student: PreTrainedModel, teacher: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Mean KL over all positions, one sequence at a time, both models live: no cache, no packing, no kernel of ours."""
    total, count = torch.zeros(()), 0
    for ids_N in _sequences(batch):
        ids_1N = torch.from_numpy(ids_N).long()[None]
        with torch.no_grad():
            teacher_logprobs = torch.log_softmax(teacher(ids_1N).logits[0], dim=-1)
        student_logprobs = torch.log_softmax(student(ids_1N).logits[0], dim=-1)
        total = total + torch.nn.functional.kl_div(student_logprobs, teacher_logprobs, reduction="sum", log_target=True)
        count += len(ids_N)
    return total / count


@pytest.mark.parametrize("tail", ["bucket", "drop", "renormalize"])
def test_training_from_a_full_cache_is_training_with_the_live_teacher(
    full_cache: Path, tiny_model_dir: Path, tmp_path: Path, tail: str
) -> None:
    config = train_config(full_cache, tiny_model_dir, tmp_path / "run", loss={"tail": tail, "chunk_positions": 48})
    cached = [line["loss"] for line in _run(config)]

    teacher, student = load_teacher_model(tiny_model_dir), build_student(config.student, seed=config.seed)
    optimizer = make_optimizer(student, config.optimizer)
    live: list[float] = []
    with open_reader(full_cache) as reader, Loader(reader, config.loader) as loader:
        while len(live) < 8:
            for batch in loader:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(len(live), 8, config.optimizer)
                loss = _dense_kl(student, teacher, batch)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                live.append(float(loss.detach()))
                if len(live) == 8:
                    break
    assert live[0] - live[-1] > 0.1, "the student should have learned something, or the comparison says little"
    assert cached == pytest.approx(live, rel=2e-5)
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    for (name, ours), theirs in zip(trained.named_parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_alpha_zero_is_plain_cross_entropy_on_the_text(small_cache: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    config = train_config(small_cache, tiny_model_dir, tmp_path / "run", loss={"alpha": 0.0}, steps=1)
    loss = _run(config)[0]["loss"]
    student = build_student(config.student, seed=config.seed)
    with open_reader(small_cache) as reader, Loader(reader, config.loader) as loader:
        sequences = _sequences(next(iter(loader)))
    parts = []
    for ids_N in sequences:
        ids_1N = torch.from_numpy(ids_N).long()[None]
        parts.append(torch.nn.functional.cross_entropy(student(ids_1N).logits[0, :-1], ids_1N[0, 1:], reduction="none"))
    assert loss == pytest.approx(float(torch.cat(parts).mean().detach()), rel=1e-5)


def test_alpha_mixes_both_losses(small_cache: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    configs = {alpha: train_config(small_cache, tiny_model_dir, tmp_path, loss={"alpha": alpha}) for alpha in (0.0, 0.25, 1.0)}
    model = build_student(configs[0.0].student, seed=0)
    with open_reader(small_cache) as reader, Loader(reader, configs[0.0].loader) as loader:
        batch = next(iter(loader))
    # Only positions with a label: there both terms are defined, and both means are over the same rows.
    batch.weights_P[:] = batch.target_ids_BT.reshape(-1)[batch.flat_positions_P] != NO_TARGET
    losses = {alpha: float(student_loss(model, to_torch(batch), config).detach()) for alpha, config in configs.items()}
    assert losses[0.25] == pytest.approx(0.75 * losses[0.0] + 0.25 * losses[1.0], rel=1e-5)


def test_the_tail_policy_and_the_backend_reach_the_loss(small_cache: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    def loss(**settings: Any) -> float:
        config = train_config(small_cache, tiny_model_dir, tmp_path, loss=settings)
        model = build_student(config.student, seed=0)
        with open_reader(small_cache) as reader, Loader(reader, config.loader) as loader:
            batch = to_torch(next(iter(loader)))
        head = output_projection(model)
        hidden_PH = hidden_states(model, batch.input_ids_BT, batch.position_ids_BT).flatten(0, 1)[batch.flat_positions_P]
        asked = LossSettings(tail=settings["tail"], backend="torch")
        expected = sparse_kd_loss(head(hidden_PH), batch.teacher, settings=asked)
        ours = float(student_loss(model, batch, config).detach())
        assert ours == pytest.approx(float(expected.detach()), rel=1e-5)
        return ours

    losses = [loss(tail=tail) for tail in ("bucket", "drop", "renormalize")]
    assert len(set(losses)) == 3
    assert loss(tail="drop", backend="torch") == pytest.approx(losses[1], rel=1e-5)


def test_weights_decay_in_matrices_alone(tiny_model_dir: Path, tmp_path: Path) -> None:
    config = train_config(tmp_path, tiny_model_dir, tmp_path, optimizer={"weight_decay": 0.3})
    model = build_student(config.student, seed=0)
    decayed, spared = make_optimizer(model, config.optimizer).param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.3, 0.0)
    assert {p.ndim for p in decayed["params"]} == {2}
    assert {p.ndim for p in spared["params"]} == {1}
    assert len(decayed["params"]) + len(spared["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_a_sequence_has_the_same_loss_packed_and_alone(
    small_cache: Path, tiny_model_dir: Path, tmp_path: Path, alpha: float
) -> None:
    def sequence_losses(packing: str) -> dict[bytes, float]:
        loader = {"seq_len": 128, "batch_rows": 4, "packing": packing, "num_threads": 0}
        config = train_config(small_cache, tiny_model_dir, tmp_path, loss={"alpha": alpha}, loader=loader)
        model, losses = build_student(config.student, seed=0).eval(), {}
        with open_reader(small_cache) as reader, Loader(reader, config.loader) as batches:
            for batch in batches:
                flat_positions_P = np.stack(np.unravel_index(batch.flat_positions_P, batch.segment_ids_BT.shape), axis=1)
                segments_P = batch.segment_ids_BT.reshape(-1)[batch.flat_positions_P]
                for row, segment in sorted({(int(r[0]), int(s)) for r, s in zip(flat_positions_P, segments_P, strict=True)}):
                    batch.weights_P[:] = (flat_positions_P[:, 0] == row) & (segments_P == segment)
                    ids = batch.input_ids_BT[row][batch.segment_ids_BT[row] == segment]
                    losses[ids.tobytes()] = float(student_loss(model, to_torch(batch), config).detach())
        return losses

    packed, alone = sequence_losses("first_fit"), sequence_losses("none")
    assert len(packed) == 14
    assert packed.keys() == alone.keys()
    for key, loss in packed.items():
        assert loss == pytest.approx(alone[key], rel=1e-5)


def test_distillation_and_labels_read_the_same_batches(small_cache: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    kd = _run(train_config(small_cache, tiny_model_dir, tmp_path / "kd"))
    labels = _run(train_config(small_cache, tiny_model_dir, tmp_path / "labels", loss={"alpha": 0.0}))
    assert [line["tokens"] for line in kd] == [line["tokens"] for line in labels]
    assert [line["lr"] for line in kd] == [line["lr"] for line in labels]


def test_epochs_read_the_whole_cache_so_many_times(small_cache: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    config = train_config(small_cache, tiny_model_dir, tmp_path / "run", steps=None, epochs=2)
    result = train(config, show_progress=False)
    with open_reader(small_cache) as reader:
        assert result.num_tokens == 2 * int(reader.num_tokens_S.sum())


def test_bfloat16_arithmetic_trains_close_to_float32(small_cache: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    exact = _run(train_config(small_cache, tiny_model_dir, tmp_path / "a"))
    rounded = _run(train_config(small_cache, tiny_model_dir, tmp_path / "b", dtype="bfloat16"))
    assert [line["loss"] for line in rounded] == pytest.approx([line["loss"] for line in exact], rel=0.02)
    assert load_file(tmp_path / "b" / "model" / "model.safetensors")["model.norm.weight"].dtype == torch.float32


def test_the_finished_model_is_a_folder_that_transformers_opens(
    small_cache: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    result = train(train_config(small_cache, tiny_model_dir, tmp_path / "run"), show_progress=False)
    model = AutoModelForCausalLM.from_pretrained(result.model)
    assert (model.config.hidden_size, model.config.num_hidden_layers, model.config.head_dim) == (32, 1, 16)
    saved, original = (AutoTokenizer.from_pretrained(folder) for folder in (result.model, tiny_model_dir))
    assert saved.encode("import abc") == original.encode("import abc")


class _Stop(Exception):
    pass


class _BreakingLoader(Loader):
    """Fails when asked for one batch too many."""

    num_left = 0

    def __iter__(self) -> Iterator[Batch]:
        for batch in super().__iter__():
            if self.num_left == 0:
                raise _Stop
            self.num_left -= 1
            yield batch


def _stop_after(config: TrainConfig, num_steps: int) -> None:
    """Train in this process until a failure after so many steps."""
    model = build_student(config.student, seed=config.seed)
    with (
        open_reader(config.cache) as reader,
        RunFolder(config, reader.snapshot) as folder,
        _BreakingLoader(reader, config.loader) as loader,
    ):
        trainer = Trainer(config, model, loader, folder)
        loader.num_left = num_steps - trainer.step
        with pytest.raises(_Stop):
            trainer.run()


def test_a_run_stopped_at_any_step_and_resumed_is_the_run_that_was_not(
    small_cache: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    student = {"model": str(tiny_model_dir), "overrides": {"attention_dropout": 0.2}}
    whole = train_config(small_cache, tiny_model_dir, tmp_path / "whole", student=student)
    expected = _run(whole)
    for stop in range(8):
        config = msgspec.structs.replace(whole, out=str(tmp_path / f"stopped-{stop}"))
        _stop_after(config, stop)
        assert _run(config) == expected
        _assert_same_model(whole, config)


def test_a_run_resumed_twice_is_the_run_that_was_not(small_cache: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    whole = train_config(small_cache, tiny_model_dir, tmp_path / "whole", checkpoint_every_steps=1)
    config = msgspec.structs.replace(whole, out=str(tmp_path / "stopped"))
    expected = _run(whole)
    for stop in (2, 5):
        _stop_after(config, stop)
    assert _run(config) == expected
    assert train(config, show_progress=False).num_resumed == 8, "a finished run trains no further"
    assert read_metrics(config.out) == expected


# One process imports; each run is a fork of it.
KILLED_CHILDREN = """
import json, os, signal, sys
from kdcache.config.load import convert_config
from kdcache.config.train import TrainConfig
from kdcache.train import trainer
from kdcache.train.runs import checkpoint

def run(fields, module, name, num_calls):
    module = {"checkpoint": checkpoint, "trainer": trainer}[module]
    original = getattr(module, name)

    def deadly(*args, **kwargs):
        nonlocal num_calls
        num_calls -= 1
        if num_calls < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(module, name, deadly)
    trainer.train(convert_config(fields, TrainConfig), show_progress=False)

statuses = []
for arguments in json.load(sys.stdin):
    if (child := os.fork()) == 0:
        run(*arguments)
        os._exit(0)
    statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(statuses))
"""
KILLS = [
    ("trainer", "learning_rate", 1),  # before the first checkpoint
    ("trainer", "learning_rate", 5),  # two steps after one
    ("checkpoint", "sync_directory", 2),  # the second is written, but not renamed
    ("checkpoint", "sync_directory", 3),  # it is renamed, but the first is still there
]


@pytest.fixture(scope="module")
def killed(small_cache: Path, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[TrainConfig]:
    """The configs of runs that were killed at KILLS."""
    folder = tmp_path_factory.mktemp("killed")
    configs = [train_config(small_cache, tiny_model_dir, folder / str(number)) for number in range(len(KILLS))]
    tasks = json.dumps([[msgspec.to_builtins(config), *kill] for config, kill in zip(configs, KILLS, strict=True)])
    command = [sys.executable, "-c", KILLED_CHILDREN]
    done = subprocess.run(command, input=tasks, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [-9] * len(KILLS), done.stderr
    return configs


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(KILLS)), ids=lambda number: "-".join(map(str, KILLS[number])))
def test_a_killed_run_goes_on_exactly(killed: list[TrainConfig], tmp_path: Path, number: int) -> None:
    config = killed[number]
    whole = msgspec.structs.replace(config, out=str(tmp_path / "whole"))
    assert _run(config) == _run(whole)
    _assert_same_model(whole, config)
    assert [path.name for path in (Path(config.out) / "checkpoints").iterdir()] == ["step-00000008"]


def _assert_same_model(one: TrainConfig, other: TrainConfig) -> None:
    a, b = (load_file(Path(config.out) / "model" / "model.safetensors") for config in (one, other))
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_a_run_with_other_settings_is_refused_with_both_sides(small_cache: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    train(train_config(small_cache, tiny_model_dir, tmp_path / "run"), show_progress=False)
    with pytest.raises(MismatchError, match=r"loss\.alpha: 1\.0 there, 0\.5 now"):
        train(train_config(small_cache, tiny_model_dir, tmp_path / "run", loss={"alpha": 0.5}), show_progress=False)


def test_settings_may_change_while_there_is_no_checkpoint(small_cache: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    """Whoever stops a run in its first minute to mend a setting has nothing to lose."""
    config = train_config(small_cache, tiny_model_dir, tmp_path / "run")
    _stop_after(config, 2)
    changed = train_config(small_cache, tiny_model_dir, tmp_path / "run", loss={"alpha": 0.5})
    fresh = train_config(small_cache, tiny_model_dir, tmp_path / "fresh", loss={"alpha": 0.5})
    assert _run(changed) == _run(fresh)


def test_another_cache_is_refused(small_cache: Path, full_cache: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    train(train_config(small_cache, tiny_model_dir, tmp_path / "run"), show_progress=False)
    with pytest.raises(MismatchError, match="cache's snapshot"):
        train(train_config(full_cache, tiny_model_dir, tmp_path / "run"), show_progress=False)


def test_a_directory_with_something_else_in_it_is_refused(small_cache: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("precious")
    with pytest.raises(ConfigError, match="is not empty and holds no training run"):
        train(train_config(small_cache, tiny_model_dir, tmp_path / "run"), show_progress=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be made a directory"):
        train(train_config(small_cache, tiny_model_dir, tmp_path / "file"), show_progress=False)


def test_a_damaged_checkpoint_is_an_error_of_ours(small_cache: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    config = train_config(small_cache, tiny_model_dir, tmp_path / "run")
    train(config, show_progress=False)
    (damaged,) = (tmp_path / "run" / "checkpoints").iterdir()
    (damaged / "optimizer.safetensors").write_bytes(b"nothing")
    with pytest.raises(StateError, match="step-00000008: this checkpoint cannot be loaded"):
        train(config, show_progress=False)


def test_a_checkpoint_that_cannot_be_written_is_an_error_of_ours(
    small_cache: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    (tmp_path / "run" / "checkpoints").write_text("a file where the directory should go")
    with pytest.raises(StateError, match="the checkpoint of step 3 cannot be written"):
        train(train_config(small_cache, tiny_model_dir, tmp_path / "run"), show_progress=False)


def test_a_directory_claimed_by_a_run_that_died_at_once_can_be_used(
    small_cache: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json-unfinished").write_text('{"con')
    assert train(train_config(small_cache, tiny_model_dir, tmp_path / "run", steps=1), show_progress=False).num_steps == 1


def test_held_out_loss_is_measured_before_during_and_after(small_cache: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    heldout = tmp_path / "heldout.jsonl"
    heldout.write_text(json.dumps({"text": "def heap(x): return sorted(x)\n" * 4}) + "\n")
    config = train_config(
        small_cache, tiny_model_dir, tmp_path / "run", heldout={"data": str(heldout), "every_steps": 3, "window": 32}
    )
    lines = [line for line in _run(config) if "heldout_nats_per_token" in line]
    assert [line["step"] for line in lines] == [0, 3, 6, 8]
    without = _run(train_config(small_cache, tiny_model_dir, tmp_path / "without"))
    assert [line["loss"] for line in _run(config) if "loss" in line] == [line["loss"] for line in without]


def test_a_capture_that_has_not_finished_is_not_trained_on_unless_asked(tiny_model_dir: Path, tmp_path: Path) -> None:
    cache = write_cache(tmp_path / "cache", tiny_model_dir, k=8, num_sequences=4, num_units=2)
    config = train_config(cache, tiny_model_dir, tmp_path / "out", steps=1, epochs=None)
    with pytest.raises(InputError, match="published 1 of 2 units"):
        train(config, show_progress=False)
    accepted = msgspec.structs.replace(config, accept=("incomplete",))
    assert train(accepted, show_progress=False).num_steps == 1


def test_a_run_that_saw_no_position_to_learn_from_publishes_no_model(small_cache: Path, tiny_model_dir: Path, tmp_path: Path):
    loader = {"seq_len": 64, "batch_rows": 2, "num_threads": 1, "mask": {"roles": ["assistant"]}}
    config = train_config(small_cache, tiny_model_dir, tmp_path / "run", loader=loader, steps=2)
    with pytest.raises(ConfigError, match=r"none of the 2 steps had a position to learn from.*loader\.mask"):
        train(config, show_progress=False)
    assert not (tmp_path / "run" / "model").exists()
