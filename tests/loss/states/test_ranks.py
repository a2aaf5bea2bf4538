"""Losses that compare sequences do not depend on how many ranks share them: two gloo processes against one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from oracle_numbers import values

from kdcache.loss.states.gathering import gathered
from kdcache.loss.states.rkd import rkd

SHARES = (slice(0, 7), slice(7, 9))


def test_one_process_has_all_there_is():
    given = values(60, 3, 2).requires_grad_()
    found = gathered(given)
    assert found.tensors[0] is given
    loss = given.square().sum()
    torch.testing.assert_close(found.share(loss), 3 * loss)


@pytest.mark.slow
def test_two_ranks_share_a_loss(tmp_path):
    multiprocessing.spawn(run_rank, (str(tmp_path / "store"),), nprocs=2)


def run_rank(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{Path(store)}", rank=rank, world_size=2)
    try:
        for shares in (SHARES, (slice(0, 9), slice(9, 9))):
            check(shares[rank])
    finally:
        dist.destroy_process_group()


def check(own: slice) -> None:
    student, teacher, weight = values(5, 9, 6), values(6, 9, 8), values(61, 6, 4).requires_grad_()
    expected = sum(rkd(student @ weight, teacher))
    (gradient,) = torch.autograd.grad(9 * expected, weight)
    found = gathered(student[own] @ weight, teacher[own])
    assert found.num_all == 9
    torch.testing.assert_close(found.tensors[1], teacher)
    loss = sum(rkd(*found.tensors))
    share = found.share(loss)
    (part,) = torch.autograd.grad(share, weight)
    sums = [part, share.detach(), torch.tensor(found.num_own)]
    for value in sums:
        dist.all_reduce(value)
    torch.testing.assert_close(sums[0], gradient)
    torch.testing.assert_close(sums[1] / sums[2], expected.detach())
