"""Ranks for real: gloo processes of one thread each, compared with one process over the same cache."""

from __future__ import annotations

import multiprocessing as standard_multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from adapter_cases import FOUR_ROWS, LR, first_batches, make_student, plain_losses
from torch.nn.parallel import DistributedDataParallel

from kdcache.config.loader import LoaderConfig
from kdcache.loader.loader import Loader
from kdcache.loss.global_mean import global_mean_scale, global_weight
from kdcache.train.adapters import BatchStream, StudentLoss

NUM_STEPS = 6


def in_ranks(num_ranks: int, function: Callable[..., None], folder: Path, *arguments: Any) -> None:
    """Run a function in so many processes. One server imports what is large, and each process is a fork of it."""
    standard_multiprocessing.set_forkserver_preload(["torch.distributed", "kdcache.train.adapters._transformers"])
    store = folder / f"store-{len(list(folder.glob('store-*')))}"
    given = (num_ranks, str(store), function, folder, *arguments)
    multiprocessing.start_processes(_rank, given, nprocs=num_ranks, start_method="forkserver")


def _rank(rank: int, num_ranks: int, store: str, function: Callable[..., None], folder: Path, *arguments: Any) -> None:
    torch.set_num_threads(1)
    # As torchrun sets them: Trainer reads its rank from there.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=num_ranks)
    try:
        function(folder, *arguments)
    finally:
        dist.destroy_process_group()


def train_ranks(folder: Path, cache: Path, last_step: int, accumulated: int = 1) -> None:
    """Go on from `folder/checkpoint.pt` if it is there, to a step; write that file, and what every rank read and saw."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    model = make_student()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    with Loader(cache, FOUR_ROWS, rank=rank, world_size=num_ranks) as loader:
        stream, loss_of, step = BatchStream(loader), StudentLoss(model, loader), 0
        if (folder / "checkpoint.pt").exists():
            saved = torch.load(folder / "checkpoint.pt")
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            stream.load_state_dict(saved["loader"])
            step = saved["step"]
        parallel = DistributedDataParallel(model)
        dist.barrier()  # all have read the checkpoint before it is written again
        while step < last_step:
            batches = [stream[stream.next_index] for _ in range(accumulated)]
            scale, total = loss_of.scale(batches), torch.zeros(())
            for number, batch in enumerate(batches):
                parallel.require_backward_grad_sync = number == accumulated - 1
                loss = loss_of(parallel, batch, scale)
                loss.backward()
                total += loss.detach() / num_ranks
            dist.all_reduce(total)
            step += 1
            seen = {"loss": float(total), "ids": [b.input_ids_BT for b in batches], "state": stream.state_dict()}
            seen["positions"] = sum(len(b.flat_positions_P) for b in batches)
            seen["gradients"] = [p.grad.clone() for p in model.parameters() if p.grad is not None]
            torch.save(seen, folder / f"step-{step}-rank-{rank}-of-{num_ranks}.pt")
            optimizer.step()
            optimizer.zero_grad()
        stream.pause()
        if rank == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "loader": stream.state_dict()}
            torch.save(state | {"step": step}, folder / "checkpoint.pt")


def seen_by(folder: Path, step: int, num_ranks: int) -> list[dict[str, Any]]:
    return [torch.load(folder / f"step-{step}-rank-{rank}-of-{num_ranks}.pt") for rank in range(num_ranks)]


def gradients_of_one(cache: Path, num_steps: int, accumulated: int = 1) -> list[list[torch.Tensor]]:
    """Of each step, in one process."""
    model, batches = make_student(), first_batches(cache, FOUR_ROWS, num_steps * accumulated)
    optimizer, gradients = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0), []
    with Loader(cache, FOUR_ROWS) as loader:
        loss_of = StudentLoss(model, loader)
    for step in range(num_steps):
        of_step = batches[step * accumulated : (step + 1) * accumulated]
        scale = loss_of.scale(of_step)
        for batch in of_step:
            loss_of(model, batch, scale).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        optimizer.step()
        optimizer.zero_grad()
    return gradients


def assert_gradients(seen: list[dict[str, Any]], wanted: list[torch.Tensor]) -> None:
    """Of each rank those of one process: to float32's rounding, which optimiser steps carry on."""
    for rank in seen:
        for ours, one in zip(rank["gradients"], wanted, strict=True):
            torch.testing.assert_close(ours, one, rtol=1e-3, atol=1e-4 * float(one.abs().max()))


@pytest.mark.slow
def test_two_ranks_read_and_learn_what_one_process_does(small_cache: Path, tmp_path: Path) -> None:
    in_ranks(2, train_ranks, tmp_path, small_cache, NUM_STEPS)
    batches = first_batches(small_cache, FOUR_ROWS, NUM_STEPS)
    gradients = gradients_of_one(small_cache, NUM_STEPS)
    losses, is_uneven = [], False
    for step, batch in enumerate(batches, 1):
        seen = seen_by(tmp_path, step, 2)
        assert torch.equal(torch.cat([rank["ids"][0] for rank in seen]), batch.input_ids_BT)
        assert seen[0]["state"] == seen[1]["state"]
        assert all(map(torch.equal, seen[0]["gradients"], seen[1]["gradients"]))
        assert_gradients(seen, gradients[step - 1])
        losses.append(seen[0]["loss"])
        is_uneven |= seen[0]["positions"] != seen[1]["positions"]
    assert is_uneven, "equal numbers of positions would not tell the mean over positions from the mean over ranks"
    assert losses == pytest.approx(plain_losses(small_cache, FOUR_ROWS, NUM_STEPS), rel=1e-5)


@pytest.mark.slow
def test_four_ranks_to_two_and_back_is_one_stream(small_cache: Path, tmp_path: Path) -> None:
    stops = ((4, 2), (2, 4), (4, NUM_STEPS))
    for num_ranks, last_step in stops:
        in_ranks(num_ranks, train_ranks, tmp_path, small_cache, last_step)
    losses, gradients = [], gradients_of_one(small_cache, NUM_STEPS)
    for step, batch in enumerate(first_batches(small_cache, FOUR_ROWS, NUM_STEPS), 1):
        num_ranks = next(ranks for ranks, last in stops if step <= last)
        seen = seen_by(tmp_path, step, num_ranks)
        assert torch.equal(torch.cat([rank["ids"][0] for rank in seen]), batch.input_ids_BT)
        assert_gradients(seen, gradients[step - 1])
        losses.append(seen[0]["loss"])
    assert losses == pytest.approx(plain_losses(small_cache, FOUR_ROWS, NUM_STEPS), rel=1e-5)


@pytest.mark.slow
def test_accumulated_gradients_of_two_ranks_are_those_of_one_process(small_cache: Path, tmp_path: Path) -> None:
    in_ranks(2, train_ranks, tmp_path, small_cache, 3, 3)
    losses = [seen_by(tmp_path, step, 2)[0]["loss"] for step in (1, 2, 3)]
    assert losses == pytest.approx(plain_losses(small_cache, FOUR_ROWS, 3, accumulated=3), rel=1e-5)
    for step, gradients in enumerate(gradients_of_one(small_cache, 3, accumulated=3), 1):
        assert_gradients(seen_by(tmp_path, step, 2), gradients)


def _train_hf(folder: Path, cache: Path, max_steps: int) -> None:
    from test_adapters_transformers import run

    losses = run(cache, folder / "hf", loader=FOUR_ROWS, max_steps=max_steps, save_steps=3, resume=max_steps > 3)
    torch.save(losses, folder / f"losses-{dist.get_rank()}.pt")


@pytest.mark.slow
def test_trainer_on_four_ranks_then_two_goes_on_as_in_one_process(small_cache: Path, tmp_path: Path) -> None:
    for num_ranks, max_steps in ((4, 3), (2, 6)):
        in_ranks(num_ranks, _train_hf, tmp_path, small_cache, max_steps)
    losses = torch.load(tmp_path / "losses-0.pt")
    assert losses == pytest.approx(plain_losses(small_cache, FOUR_ROWS, 6), rel=1e-5)


def _train_lightning(folder: Path, cache: Path) -> None:
    from lightning.fabric.plugins.environments import TorchElasticEnvironment
    from lightning.pytorch.strategies import DDPStrategy
    from test_adapters_others import lightning_losses

    strategy = DDPStrategy(cluster_environment=TorchElasticEnvironment(), process_group_backend="gloo")
    options: dict[str, Any] = {"options": FOUR_ROWS, "devices": dist.get_world_size(), "strategy": strategy}
    rank = dist.get_rank()
    losses = lightning_losses(cache, folder / "lightning", stop=None, resume=False, **options)
    torch.save(losses, folder / f"losses-{rank}.pt")


@pytest.mark.slow
def test_lightning_on_two_ranks_learns_what_one_process_does(small_cache: Path, tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    in_ranks(2, _train_lightning, tmp_path, small_cache)
    parts = [torch.load(tmp_path / f"losses-{rank}.pt") for rank in (0, 1)]
    assert parts[0] != parts[1], "each rank has rows of its own"
    # Each rank's is its share of the sum times the number of ranks.
    losses = [sum(shares) / 2 for shares in zip(*parts, strict=True)]
    assert losses == pytest.approx(plain_losses(small_cache, FOUR_ROWS, 9), rel=1e-5)


def test_weights_of_one_process_are_summed_over_batches() -> None:
    parts = [torch.tensor([1.0, 0.5]), torch.zeros(0), torch.tensor([2.0])]
    assert global_weight(parts) == 3.5
    assert global_weight(parts[0]) == 1.5
    assert global_mean_scale(parts) == pytest.approx(1 / 3.5)
    assert global_mean_scale([torch.zeros(0)]) == 0, "a step without a position has a loss of 0, not NaN"


def test_an_empty_share_gives_a_loss_and_gradients_of_zero(small_cache: Path) -> None:
    """A rank that has only the empty rows of a last batch."""
    options = LoaderConfig(seq_len=64, batch_rows=12, num_threads=0)
    model = make_student()
    with Loader(small_cache, options, rank=11, world_size=12) as loader:
        loss_of, batch = StudentLoss(model, loader), BatchStream(loader)[0]
    assert len(batch.flat_positions_P) == 0
    for scale in (None, torch.tensor(0.5)):
        loss = loss_of(model, batch, scale)
        loss.backward()
        assert float(loss.detach()) == 0
        assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
