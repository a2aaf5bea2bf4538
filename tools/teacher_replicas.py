"""Training steps on several cores: one thread and one replica of the model for each, with the weights in common.

A small model's operations are too short to be shared out among cores: on an idle machine OpenMP's threads wait for each other
half of the time, and on a busy one nearly always (10 times slower at a load of 5 per core; see benchmarks/LOG.md). Here each
thread works through a part of the batch alone, and they meet once per step.

Shape letters: B sequences, T positions per sequence, P = B * T, H hidden, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kdcache.loss.fused import fused_sparse_kd_loss


@contextmanager
def single_threads(num_threads: int) -> Iterator[ThreadPoolExecutor]:
    """Threads to share work among, in each of which, as in the caller, torch uses no others meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


class Replicas:
    """A model and what trains it."""

    def __init__(self, model: Any, pool: ThreadPoolExecutor, num_replicas: int, dtype: torch.dtype) -> None:
        """Share a model's weights among replicas of it.

        Args:
            model: trained in place.
            pool: of `single_threads`.
            num_replicas: at least 1; one thread of the pool for each.
            dtype: float32, or bfloat16 for the matrix products alone.
        """
        self._pool, self._dtype = pool, dtype
        self._models = [model, *(copy.deepcopy(model) for _ in range(num_replicas - 1))]
        for replica in self._models:
            for weight, shared in zip(replica.parameters(), model.parameters(), strict=True):
                weight.data = shared.data
                weight.grad = torch.zeros_like(weight)

    def step(self, ids: Tensor, optimizers: Sequence[torch.optim.Optimizer], max_norm: float) -> float:
        """One step of optimisers of separate weights on (B, T + 1) ids; the mean loss in nats per token, before it."""
        parts = ids.tensor_split(len(self._models))
        losses = self._each(lambda model, part: self._backward(model, part, len(part) / len(ids)), self._models, parts)
        self._gather_gradients()
        torch.nn.utils.clip_grad_norm_(self._models[0].parameters(), max_norm)
        self._each(lambda optimizer: optimizer.step(), optimizers)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=False)
        return sum(losses)

    def _each(self, function: Callable[..., Any], *arguments: Iterable[Any]) -> list[Any]:
        return list(self._pool.map(function, *arguments))

    def _backward(self, model: Any, ids: Tensor, share: float) -> float:
        """Gradients of a part of the batch, into the replica; its share of the batch's mean loss."""
        if not len(ids):
            return 0.0
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self._dtype == torch.bfloat16):
            hidden_BTH = model.model(input_ids=ids[:, :-1]).last_hidden_state
        hidden_PH, weight_VH = hidden_BTH.flatten(0, 1).to(self._dtype), model.lm_head.weight.to(self._dtype)
        loss = share * fused_sparse_kd_loss(hidden_PH, weight_VH, None, target_ids=ids[:, 1:].flatten(), alpha=0.0)
        loss.backward()
        return loss.item()

    @torch.no_grad()
    def _gather_gradients(self) -> None:
        """The sum of the replicas' gradients in the first, always in the same order; zero in the others."""
        for weight, *copies in zip(*(model.parameters() for model in self._models), strict=True):
            for part in copies:
                weight.grad.add_(part.grad)
                part.grad.zero_()
