"""The losses between ranks: gradients averaged by DDP, and a vocabulary split between ranks. Two gloo processes each."""

from __future__ import annotations

import gc
from pathlib import Path

import fsdp_promises
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from contracts import kernels as contract
from contracts.kernels import make_problem
from loose_calls import fused_sparse_kd_loss, sparse_kd_loss, vocab_parallel_sparse_kd_loss
from test_head import P, Tied, V, make
from test_sparse_kd import with_estimates

from kdcache.kernels.base import Objective

WORLD_SIZE = 2


def in_ranks(function, folder: Path) -> None:
    multiprocessing.spawn(run_rank, (function, str(folder / "store")), nprocs=WORLD_SIZE)


def run_rank(rank: int, function, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD_SIZE)
    try:
        function(rank)
        # DDP's hooks and its model refer to each other: a rank that left them to its end aborted in one of four runs.
        gc.collect()
        dist.barrier()
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


def log_z_P(problem: contract.Problem, temperature: float) -> torch.Tensor:
    """Of a teacher that has the problem's entries, and its tail's mass on as many ids again, evenly."""
    log_p_PK = torch.tensor(problem.targets.logprobs_PK).double()
    num_entries = max(log_p_PK.shape[1], 1)
    even_PK = (torch.tensor(problem.targets.tail_mass_P).double() / num_entries).log()[:, None].expand(-1, num_entries)
    return (torch.cat([log_p_PK, even_PK], dim=1) / temperature).logsumexp(dim=1).float()


def check_split_vocabulary(rank: int) -> None:
    for shape in ((5, 33, 5), (4, 3, 3), (3, 3, 0)):
        problem = make_problem(*shape)
        bounds = [0, shape[1] // 2 + 1, shape[1]]
        part = slice(bounds[rank], bounds[rank + 1])
        problem.targets.weights_P[0] = 0
        problem.logits_PV[0] = float("nan")
        for objective in [*contract.OBJECTIVES, Objective("drop", 0.3), Objective("bucket", 0.3, temperature=4.0)]:
            if objective.tail == "uniform":
                continue
            targets = with_estimates(problem, objective)
            options = {"tail": objective.tail, "alpha": objective.alpha, "divergence": objective.divergence}
            if objective.temperature != 1:
                options |= {"temperature": objective.temperature, "log_z_P": log_z_P(problem, objective.temperature)}
            is_unbiased = objective.divergence.requirements.tail_sample or objective == Objective("drop", 0.3)
            options["entries"] = "unbiased" if is_unbiased else "exact"
            z_PV = torch.tensor(problem.logits_PV, dtype=torch.float64, requires_grad=True)
            expected = sparse_kd_loss(z_PV, **targets, **options, backend="torch")
            (want_PV,) = torch.autograd.grad(expected, z_PV)
            own_PW = z_PV.detach()[:, part].clone().requires_grad_()
            loss = vocab_parallel_sparse_kd_loss(own_PW, **targets, **options, first_id=part.start, vocab_size=shape[1])
            torch.testing.assert_close(loss, expected, rtol=1e-11, atol=1e-11)
            (gradient_PW,) = torch.autograd.grad(loss, own_PW)
            torch.testing.assert_close(gradient_PW, want_PV[:, part], rtol=1e-9, atol=1e-11)


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


def check_all(rank: int) -> None:
    check_ddp(rank)
    check_split_vocabulary(rank)
    check_split_projection(rank)
    fsdp_promises.check_all(rank)


@pytest.mark.slow
def test_ranks_give_the_gradients_of_one_process(tmp_path):
    """Under DDP, with a split vocabulary, and under FSDP2 (`fsdp_promises`): one start of two ranks for all."""
    in_ranks(check_all, tmp_path)
