"""The losses between ranks: gradients averaged by DDP, and a vocabulary split between ranks. Two gloo processes each."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from contracts import kernels as contract
from contracts.kernels import make_problem
from test_head import P, Tied, V, make

from kdcache.loss.fused import fused_sparse_kd_loss
from kdcache.loss.sparse_kd import sparse_kd_loss
from kdcache.loss.vocab_parallel import vocab_parallel_sparse_kd_loss

WORLD_SIZE = 2


def in_ranks(function, folder: Path) -> None:
    multiprocessing.spawn(run_rank, (function, str(folder / "store")), nprocs=WORLD_SIZE)


def run_rank(rank: int, function, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD_SIZE)
    try:
        function(rank)
    finally:
        dist.destroy_process_group()


def check_ddp(rank: int) -> None:
    """Each rank has half of the rows; the mean over ranks of the means over equal weights is the whole batch's mean."""
    torch.manual_seed(0)
    model, (_, targets), ids_P = Tied(), make(), torch.arange(P) % V
    rows_of = [slice(0, 18), slice(18, 36)]
    targets["weights_P"] = torch.ones(P)
    whole = {name: tensor[:36] for name, tensor in targets.items()}
    wanted = torch.autograd.grad(model(ids_P[:36], whole), list(model.parameters()))
    parallel, part = torch.nn.parallel.DistributedDataParallel(model), rows_of[rank]
    parallel(ids_P[part], {name: tensor[part] for name, tensor in targets.items()}).backward()
    for parameter, want in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, want, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_ddp_averages_the_fused_losses_gradients(tmp_path):
    in_ranks(check_ddp, tmp_path)


def check_split_vocabulary(rank: int) -> None:
    for shape in ((5, 33, 5), (4, 3, 3), (3, 3, 0)):
        problem = make_problem(*shape)
        bounds = [0, shape[1] // 2 + 1, shape[1]]
        part = slice(bounds[rank], bounds[rank + 1])
        problem.targets.weights_P[0] = 0
        problem.logits_PV[0] = float("nan")
        names = ("token_ids_PK", "logprobs_PK", "tail_mass_P", "labels_P", "weights_P")
        targets = {name: torch.tensor(getattr(problem.targets, name)) for name in names}
        for objective in contract.OBJECTIVES:
            if objective.tail == "uniform" or objective.temperature != 1:
                continue
            options = {"tail": objective.tail, "alpha": objective.alpha, "divergence": objective.divergence}
            z_PV = torch.tensor(problem.logits_PV, dtype=torch.float64, requires_grad=True)
            expected = sparse_kd_loss(z_PV, **targets, **options, backend="torch")
            (want_PV,) = torch.autograd.grad(expected, z_PV)
            own_PW = z_PV.detach()[:, part].clone().requires_grad_()
            loss = vocab_parallel_sparse_kd_loss(own_PW, **targets, **options, first_id=part.start, vocab_size=shape[1])
            torch.testing.assert_close(loss, expected, rtol=1e-11, atol=1e-11)
            (gradient_PW,) = torch.autograd.grad(loss, own_PW)
            torch.testing.assert_close(gradient_PW, want_PV[:, part], rtol=1e-9, atol=1e-11)


@pytest.mark.slow
def test_a_vocabulary_split_between_ranks_gives_the_whole_loss_and_each_rank_its_gradient(tmp_path):
    in_ranks(check_split_vocabulary, tmp_path)


def check_split_projection(rank: int) -> None:
    """hidden's gradient is the sum over ranks of G W, dW each rank's own."""
    (hidden_PH, weight_VH, _), targets = make()
    expected = fused_sparse_kd_loss(hidden_PH, weight_VH, **targets, alpha=0.5)
    want_hidden_PH, want_VH = torch.autograd.grad(expected, (hidden_PH, weight_VH))
    part = [slice(0, 50), slice(50, V)][rank]
    own_WH = weight_VH.detach()[part].clone().requires_grad_()
    loss = vocab_parallel_sparse_kd_loss(hidden_PH @ own_WH.T, **targets, alpha=0.5, first_id=part.start, vocab_size=V)
    own_hidden_PH, own_gradient_WH = torch.autograd.grad(loss, (hidden_PH, own_WH))
    dist.all_reduce(own_hidden_PH)
    torch.testing.assert_close(own_hidden_PH, want_hidden_PH, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(own_gradient_WH, want_VH[part], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_split_projection_gets_the_gradients_of_the_whole_one(tmp_path):
    in_ranks(check_split_projection, tmp_path)
