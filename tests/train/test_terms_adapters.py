"""Terms with projectors in other trainers: one run whatever the ranks and stops, and nothing of theirs in the saved model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("transformers")

import term_cases
from adapter_cases import FOUR_ROWS, LR, OPTIONS, first_batches, make_student, plain_losses
from safetensors.torch import load_file
from test_adapters_ddp import assert_gradients, in_ranks
from test_adapters_transformers import run
from torch.nn.parallel import DistributedDataParallel

from kdcache import extensions
from kdcache.config.load import convert_config
from kdcache.config.train import LossConfig
from kdcache.errors import ConfigError, StateError
from kdcache.loader.loader import Loader
from kdcache.train.adapters import BatchStream, StudentLoss

RISING = {"schedule": "linear", "start": 0.2, "end": 1.0}
TERMS: list[dict[str, Any]] = [
    {"term": "divergence"},
    {"term": "cross_entropy", "weight": 0.1},
    {"term": "codes", "weight": RISING, "options": {"per_sequence": True}},
    {"term": "codes", "weight": 0.5, "balance": "equal", "options": {"layer": 0}},
]
PROJECTORS = ["terms.codes.projector", "terms.codes_2.projector"]


@pytest.fixture(autouse=True)
def codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(extensions.OWN, "losses", dict(extensions.OWN["losses"]))
    term_cases.register()


def loss_config(**fields: Any) -> LossConfig:
    return convert_config({"terms": TERMS, "projector_lr": LR} | fields, LossConfig)


def test_trainer_trains_as_a_plain_loop_does_and_goes_on_exactly(small_cache: Path, tmp_path: Path) -> None:
    plain = plain_losses(small_cache, OPTIONS, 9, loss=loss_config())
    whole = run(small_cache, tmp_path / "whole", seed=0, loss=loss_config())
    assert whole == pytest.approx(plain, rel=1e-4)
    run(small_cache, tmp_path / "stopped", stop=5, seed=0, loss=loss_config())
    assert run(small_cache, tmp_path / "stopped", resume=True, seed=0, loss=loss_config()) == whole, "to the bit"
    ours, theirs = (load_file(tmp_path / name / "checkpoint-9" / "kdcache_terms.safetensors") for name in ("whole", "stopped"))
    assert sorted(ours) == PROJECTORS
    assert all(torch.equal(ours[name], theirs[name]) for name in PROJECTORS)
    saved = load_file(tmp_path / "whole" / "checkpoint-9" / "model.safetensors")
    assert saved
    assert not any("kdcache" in name for name in saved)


@pytest.mark.slow
def test_accumulated_batches_are_one(small_cache: Path, tmp_path: Path) -> None:
    config = loss_config(terms=[term for term in TERMS if "balance" not in term])
    fields: dict[str, Any] = {"save_strategy": "no", "gradient_accumulation_steps": 2, "max_steps": 4, "seed": 0}
    ours = run(small_cache, tmp_path, loss=config, **fields)
    assert ours == pytest.approx(plain_losses(small_cache, OPTIONS, 4, accumulated=2, loss=config), rel=1e-4)


def test_projectors_have_a_group_of_their_own_and_the_log_has_the_terms(small_cache: Path, tmp_path: Path) -> None:
    from test_adapters_transformers import arguments

    from kdcache.train.adapters import KDTrainer

    config = loss_config(projector_lr=0.02)
    fields = {"max_steps": 2, "weight_decay": 0.3, "lr_scheduler_type": "linear"}
    trainer = KDTrainer(make_student(), arguments(tmp_path, **fields), cache=small_cache, loader=OPTIONS, loss=config)
    trainer.train()
    *_, own = trainer.optimizer.param_groups
    assert (own["initial_lr"], own["weight_decay"]) == (0.02, 0.0)
    assert {id(p) for p in own["params"]} == {id(p) for p in trainer.student_loss.loss.terms.parameters()}
    num_parameters = sum(len(group["params"]) for group in trainer.optimizer.param_groups)
    assert num_parameters == len(list(trainer.model.parameters()))
    (line, _) = [line for line in trainer.state.log_history if "loss" in line]
    names = ("divergence", "cross_entropy", "codes", "codes_2")
    assert all(line[f"terms/{name}"] > 0 for name in names)
    trainer.save_model(str(tmp_path / "final"))
    trainer.close()
    assert not list((tmp_path / "final").glob("kdcache*"))
    restored = type(trainer.model).from_pretrained(tmp_path / "final")
    assert "kdcache_terms" not in restored._modules


def test_a_checkpoint_of_another_loss_is_refused(small_cache: Path, tmp_path: Path) -> None:
    run(small_cache, tmp_path, stop=3)
    with pytest.raises(StateError, match=r"kdcache_terms\.safetensors is missing: the checkpoint was made with another loss"):
        run(small_cache, tmp_path, resume=True, loss=loss_config())


def _train_ranks(folder: Path, cache: Path, num_steps: int) -> None:
    term_cases.register()
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    model = make_student()
    with Loader(cache, FOUR_ROWS, rank=rank, world_size=num_ranks) as loader:
        stream, loss_of = BatchStream(loader), StudentLoss(model, loader, loss_config())
        parallel = DistributedDataParallel(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
        for step in range(num_steps):
            batch, loss_of.at = stream[step], (step, num_steps)
            loss = loss_of(parallel, batch, loss_of.scale([batch]))
            loss.backward()
            total = loss.detach() / num_ranks
            dist.all_reduce(total)
            gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
            torch.save({"loss": float(total), "gradients": gradients}, folder / f"step-{step}-rank-{rank}.pt")
            optimizer.step()
            optimizer.zero_grad()
        stream.pause()


@pytest.mark.slow
def test_two_ranks_learn_what_one_process_does_projectors_too(small_cache: Path, tmp_path: Path) -> None:
    num_steps = 4
    in_ranks(2, _train_ranks, tmp_path, small_cache, num_steps)
    model, batches = make_student(), first_batches(small_cache, FOUR_ROWS, num_steps)
    with Loader(small_cache, FOUR_ROWS) as loader:
        loss_of = StudentLoss(model, loader, loss_config())
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    for step, batch in enumerate(batches):
        loss_of.at = (step, num_steps)
        loss = loss_of(model, batch)
        loss.backward()
        seen = [torch.load(tmp_path / f"step-{step}-rank-{rank}.pt") for rank in (0, 1)]
        assert seen[0]["loss"] == pytest.approx(float(loss.detach()), rel=1e-4)
        assert all(map(torch.equal, seen[0]["gradients"], seen[1]["gradients"]))
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        assert len(gradients) == len(list(model.parameters()))
        assert_gradients(seen, gradients)
        optimizer.step()
        optimizer.zero_grad()


def _attach_late(_folder: Path, cache: Path) -> None:
    term_cases.register()
    model = make_student()
    parallel = DistributedDataParallel(model)
    with Loader(cache, FOUR_ROWS, rank=dist.get_rank(), world_size=2) as loader:
        loss_of, stream = StudentLoss(model, loader, loss_config()), BatchStream(loader)
        loss_of.at, batch = (0, 1), stream[0]
        stream.pause()
        with pytest.raises(ConfigError, match="made after the model was wrapped"):
            loss_of(parallel, batch)


@pytest.mark.slow
def test_a_loss_made_after_the_wrapper_is_refused(small_cache: Path, tmp_path: Path) -> None:
    in_ranks(2, _attach_late, tmp_path, small_cache)


def test_accelerate_keeps_projectors_in_its_states(small_cache: Path, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    from kdcache.train.adapters import AcceleratedStream

    losses: list[float] = []
    for last_step in (3, 6):
        accelerator = accelerate.Accelerator(cpu=True)
        plain = make_student()
        stream = AcceleratedStream(accelerator, small_cache, OPTIONS)
        loss_of = StudentLoss(plain, stream.loader, loss_config())
        optimizer = torch.optim.AdamW(loss_of.parameter_groups(plain), lr=LR, weight_decay=0.0)
        model, optimizer = accelerator.prepare(plain, optimizer)
        if losses:
            accelerator.load_state(str(tmp_path / "state"))
        while len(losses) < last_step:
            batch, loss_of.at = stream[len(losses)], (len(losses), 6)
            loss = loss_of(model, batch, loss_of.scale([batch]))
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        accelerator.save_state(str(tmp_path / "state"))
        accelerator.unwrap_model(model).save_pretrained(tmp_path / "model", state_dict=accelerator.get_state_dict(model))
        stream.close()
    assert losses == pytest.approx(plain_losses(small_cache, OPTIONS, 6, loss=loss_config()), rel=1e-6)
    assert not any("kdcache" in name for name in load_file(tmp_path / "model" / "model.safetensors"))


@pytest.mark.filterwarnings("ignore")
def test_lightning_keeps_projectors_in_its_checkpoints(small_cache: Path, tmp_path: Path) -> None:
    from test_adapters_others import lightning_losses

    before = lightning_losses(small_cache, tmp_path, stop=5, resume=False, loss=loss_config())
    after = lightning_losses(small_cache, tmp_path, stop=None, resume=True, loss=loss_config())
    expected = plain_losses(small_cache, OPTIONS, 9, loss=loss_config())
    assert before == pytest.approx(expected[:5], rel=1e-5)
    assert after == pytest.approx(expected[4:], rel=1e-5)


def test_adapters_of_peft_are_saved_without_projectors(small_cache: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    model = peft.get_peft_model(make_student(), peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    (batch,) = first_batches(small_cache, OPTIONS, 1)
    with Loader(small_cache, OPTIONS) as loader:
        loss_of = StudentLoss(model, loader, loss_config())
    loss_of.at = (0, 1)
    loss_of(model, batch).backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(grad is not None and grad.abs().max() > 0 for grad in trained.values())
    assert sum("projector" in name for name in trained) == 2
    assert sum("lora" in name for name in trained) == 2
    model.save_pretrained(tmp_path)
    assert all("lora" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    assert "kdcache_terms" not in model.merge_and_unload()._modules


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same(small_cache: Path, reentrant: bool) -> None:
    (batch,) = first_batches(small_cache, OPTIONS, 1)
    gradients = []
    for checkpointed in (False, True):
        model = make_student(num_hidden_layers=2)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        terms = [TERMS[0], {"term": "codes", "options": {"layer": 1}}]
        with Loader(small_cache, OPTIONS) as loader:
            loss_of = StudentLoss(model, loader, loss_config(terms=terms))
        loss_of(model, batch).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for plain, other in zip(*gradients, strict=True):
        torch.testing.assert_close(other, plain, rtol=1e-5, atol=1e-7)


def test_bfloat16_autocast_is_close_to_float32(small_cache: Path) -> None:
    (batch,), losses = first_batches(small_cache, OPTIONS, 1), []
    for is_half in (False, True):
        model = make_student()
        with Loader(small_cache, OPTIONS) as loader:
            loss_of = StudentLoss(model, loader, loss_config())
        loss_of.at = (0, 1)
        with torch.autocast("cpu", torch.bfloat16, enabled=is_half):
            loss = loss_of(model, batch)
        loss.backward()
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
        losses.append(float(loss.detach()))
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_a_schedule_asks_for_the_step(small_cache: Path) -> None:
    (batch,) = first_batches(small_cache, OPTIONS, 1)
    model = make_student()
    with Loader(small_cache, OPTIONS) as loader:
        loss_of = StudentLoss(model, loader, loss_config())
    with pytest.raises(ConfigError, match=r"set `at = \(step, num_steps\)` of the StudentLoss before each call"):
        loss_of(model, batch)
