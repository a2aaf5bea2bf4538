"""The losses under FSDP2, for test_distributed.py: shards between two gloo ranks, gradients as of one process with all rows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from loose_calls import step
from test_head import H, P, Tied, V, make
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from kdcache.errors import LossError
from kdcache.loss.fused import Projection
from kdcache.loss.modules import FusedSparseKD, SparseKD

USED = P - P % 2  # both ranks get the same number of rows, so that the mean over ranks is the batch's mean


class Untied(torch.nn.Module):
    """An output projection of its own, which a child may hold (`Projected`) or the model itself."""

    def __init__(self, *, fused: bool = True) -> None:
        super().__init__()
        self.embedding, self.middle = torch.nn.Embedding(V, H), torch.nn.Linear(H, H)
        self.head = torch.nn.Linear(H, V, bias=False)
        self.fused, self.whole = FusedSparseKD(alpha=0.5), SparseKD(alpha=0.5)
        self.use_fused = fused

    def forward(self, ids_P: torch.Tensor, targets: dict[str, torch.Tensor]) -> torch.Tensor:
        hidden_PH = self.middle(self.embedding(ids_P)).tanh()
        if self.use_fused:
            return self.fused(hidden_PH, Projection(self.head.weight, chunk_positions=8), **step(targets))
        return self.whole(self.head(hidden_PH), **step(targets))


class Projected(torch.nn.Module):
    """The projection and its loss in one module, as the docstring of FusedSparseKD asks: its hooks gather the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.projection, self.loss = torch.nn.Linear(H, V, bias=False), FusedSparseKD(alpha=0.5)

    def forward(self, hidden_PH: torch.Tensor, targets: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.loss(
            hidden_PH, Projection(self.projection.weight, self.projection.bias, chunk_positions=8), **step(targets)
        )


class WithProjected(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = torch.nn.Embedding(V, H), Projected()

    def forward(self, ids_P: torch.Tensor, targets: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.head(self.embedding(ids_P).tanh(), targets)


def made(kind: str) -> torch.nn.Module:
    """The same weights on every rank."""
    torch.manual_seed(0)
    if kind == "tied":
        return Tied()
    if kind == "head of its own":
        return WithProjected()
    model = Untied(fused=kind != "whole logits")
    model.head.weight.requires_grad_(kind != "frozen head")
    return model


def trained(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def batch(rows: slice) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    targets = make()[1]
    targets["weights_P"] = torch.ones(P)
    return (torch.arange(P) % V)[rows], {name: tensor[rows] for name, tensor in targets.items()}


def wanted(kind: str) -> list[torch.Tensor]:
    model = made(kind)
    return list(torch.autograd.grad(model(*batch(slice(USED))), trained(model)))


def shard(model: torch.nn.Module, **options: object) -> torch.nn.Module:
    for child in model.children():
        if isinstance(child, Projected):
            fully_shard(child, **options)  # type: ignore[call-overload]
    return fully_shard(model, **options)  # type: ignore[call-overload]


def compare(model: torch.nn.Module, want: list[torch.Tensor], bound: float = 1e-5) -> None:
    for parameter, gradient in zip(trained(model), want, strict=True):
        assert parameter.grad is not None
        got = parameter.grad.full_tensor()  # type: ignore[attr-defined]
        assert ((got - gradient).norm() / gradient.norm()).item() < bound


def own_rows(rank: int) -> slice:
    return slice(rank * USED // 2, (rank + 1) * USED // 2)


def check_sharded(rank: int) -> None:
    for kind in ("tied", "own head", "whole logits", "frozen head", "head of its own"):
        model = shard(made(kind))
        model(*batch(own_rows(rank))).backward()
        compare(model, wanted(kind))


def halves(rows: slice) -> Iterator[slice]:
    middle = (rows.start + rows.stop) // 2
    yield slice(rows.start, middle)
    yield slice(middle, rows.stop)


def check_accumulated_and_checkpointed(rank: int) -> None:
    """The sums of two parts, gradients exchanged once; and a forward that is done again in backward."""
    for kind in ("tied", "head of its own"):
        model = shard(made(kind))
        assert isinstance(model, FSDPModule)
        for last, rows in enumerate(halves(own_rows(rank))):
            model.set_requires_gradient_sync(bool(last))
            # Ranks are averaged, parts are added up: each part's mean counts by its share of its rank's rows.
            (model(*batch(rows)) * (rows.stop - rows.start) / (USED // 2)).backward()
        compare(model, wanted(kind))
        model = shard(made(kind))
        checkpoint(model, *batch(own_rows(rank)), use_reentrant=False).backward()
        compare(model, wanted(kind))


def check_mixed_precision(rank: int) -> None:
    """Gathered in bfloat16, reduced in float32: the error is bfloat16's, the shards' gradients are float32."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for kind in ("tied", "own head", "frozen head"):
        model = shard(made(kind), mp_policy=policy)
        model(*batch(own_rows(rank))).backward()
        assert all(parameter.grad is not None and parameter.grad.dtype == torch.float32 for parameter in trained(model))
        compare(model, wanted(kind), 3e-2)


def check_refused(rank: int) -> None:
    """The weight of a child that is not gathered at this moment is a shard."""
    model = made("own head")
    assert isinstance(model, Untied)
    fully_shard(model.head)
    fully_shard(model)
    with pytest.raises(LossError, match=r"weight_VH is sharded between processes .* module that owns the projection"):
        model(*batch(own_rows(rank)))
    dist.barrier()


def check_all(rank: int) -> None:
    check_sharded(rank)
    check_accumulated_and_checkpointed(rank)
    check_mixed_precision(rank)
    check_refused(rank)
