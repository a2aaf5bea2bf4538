"""A small Llama, trained for a given time rather than a given number of steps.

Shape letters: B sequences, T positions per sequence, P = B * T, H hidden, V vocabulary, N tokens of the whole text.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from teacher_muon import Muon
from teacher_replicas import Replicas, single_threads
from teacher_text import TextError
from torch import Tensor, nn

HEAD_DIM = 64  # vLLM's CPU attention takes 32, 64, 80, 96, 112, 128 and up


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The model's shape and how it is trained; the defaults are the best of those tried in benchmarks/LOG.md.

    Attributes:
        seconds: of training, by the clock; the learning rate falls to zero over them.
        steps: of training, in place of seconds: the same weights on every run of the same machine.
        min_steps: with seconds: a machine too slow for so many takes longer.
        batch_size: sequences per step.
        matrix_lr: peak learning rate of the matrices, under Muon.
        lr: peak learning rate of the rest (embeddings, norms), under AdamW.
        warmup: share of the time over which the rates rise.
        dtype: of the model's matrix products; weights and optimiser are float32.
        matrix_dtype: of the products in Muon.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    seq_len: int
    seconds: float = 120.0
    steps: int | None = None
    min_steps: int = 0
    batch_size: int = 8
    matrix_lr: float = 0.02
    lr: float = 6e-3
    weight_decay: float = 0.1
    warmup: float = 0.03
    dtype: torch.dtype = torch.float32
    matrix_dtype: torch.dtype = torch.float32
    seed: int = 0


@dataclass(frozen=True)
class Trained:
    """What training did: tokens seen (with repeats), steps, seconds, and the mean loss of the last steps in nats per token."""

    num_tokens: int
    num_steps: int
    seconds: float
    loss: float


def build_model(recipe: Recipe, bos_token_id: int) -> Any:
    """A LlamaForCausalLM with tied embeddings and random weights, which depend on the recipe's seed alone."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(recipe.seed)
    heads = recipe.hidden_size // HEAD_DIM
    config = LlamaConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        num_hidden_layers=recipe.num_layers,
        intermediate_size=-(-recipe.hidden_size * 8 // 3 // HEAD_DIM) * HEAD_DIM,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        # Engines want room for a generated token beyond a prompt of the length trained on.
        max_position_embeddings=2 * recipe.seq_len,
        tie_word_embeddings=True,
        bos_token_id=bos_token_id,
        eos_token_id=bos_token_id,
        pad_token_id=bos_token_id,
        use_cache=False,
    )
    # Eager attention: at these lengths torch's CPU kernel for bfloat16 takes half as long again.
    config._attn_implementation = "eager"
    return LlamaForCausalLM(config)


def train(model: Any, ids_N: NDArray[np.int32], recipe: Recipe, num_threads: int) -> Trained:
    """Train the model in place until the time is up."""
    from tqdm import tqdm

    from kdcache.bars import bar_options

    num_threads = min(num_threads, recipe.batch_size)
    optimizers = make_optimizers(model, recipe, num_threads)
    batches = draw_batches(torch.from_numpy(ids_N), recipe)
    losses: list[float] = []
    with single_threads(num_threads) as pool, tqdm(**bar_options(total=100, desc="training", bar_format=BAR)) as bar:
        replicas = Replicas(model, pool, num_threads, recipe.dtype)
        # Compiling the loss's kernels is no part of the time; at the rate 0 the step changes nothing but the running means.
        set_rates(optimizers, 0.0)
        replicas.step(next(batches), optimizers, max_norm=1.0)
        started = time.monotonic()
        while (done := share_done(len(losses), time.monotonic() - started, recipe)) < 1:
            set_rates(optimizers, rate_at(done, recipe.warmup))
            losses.append(replicas.step(next(batches), optimizers, max_norm=1.0))
            show(bar, time.monotonic() - started, losses, recipe)
    num_tokens = len(losses) * recipe.batch_size * recipe.seq_len
    return Trained(num_tokens, len(losses), time.monotonic() - started, float(np.mean(losses[-20:])))


def share_done(num_steps: int, elapsed: float, recipe: Recipe) -> float:
    """How much of the training is behind, 0 to 1 and above."""
    if recipe.steps:
        return num_steps / recipe.steps
    by_clock = elapsed / recipe.seconds
    return min(by_clock, num_steps / recipe.min_steps) if recipe.min_steps else by_clock


def make_optimizers(model: Any, recipe: Recipe, num_parts: int) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, in num_parts optimisers of about equal work, and AdamW for embeddings and norms."""
    matrices = [weight for layer in model.model.layers for weight in layer.parameters() if weight.ndim == 2]
    taken = set(map(id, matrices))
    rest = [weight for weight in model.parameters() if id(weight) not in taken]
    parts = [matrices[start::num_parts] for start in range(min(num_parts, len(matrices)))]
    return [
        torch.optim.AdamW(rest, lr=recipe.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
        *(
            Muon(part, lr=recipe.matrix_lr, weight_decay=recipe.weight_decay, momentum=0.95, dtype=recipe.matrix_dtype)
            for part in parts
        ),
    ]


def rate_at(done: float, warmup: float) -> float:
    """The learning rate's factor after a share of the time: a linear rise, then a linear fall to zero.

    By the clock and not by steps, so that it ends low on a slow or busy machine too.
    """
    return max(min(done / warmup if warmup else 1.0, 1.0 - done), 1e-3)


def set_rates(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("peak_lr", group["lr"]) * factor


def draw_batches(ids_N: Tensor, recipe: Recipe) -> Iterator[Tensor]:
    """Endless batches (B, T + 1) of windows; each pass covers the text once, cut at another place and in another order.

    Raises:
        TextError: fewer tokens than one batch takes.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    offsets_T = torch.arange(recipe.seq_len + 1)
    num_windows = (len(ids_N) - 1) // recipe.seq_len - 1
    if num_windows < recipe.batch_size:
        needed = (recipe.batch_size + 1) * recipe.seq_len + 1
        raise TextError(f"the text to train on has {len(ids_N):,} tokens, but a batch takes {needed:,}; give more text")
    while True:
        first = int(torch.randint(0, recipe.seq_len, (1,), generator=generator))
        order = torch.randperm(num_windows, generator=generator)
        for starts_B in order.split(recipe.batch_size)[: num_windows // recipe.batch_size]:
            yield ids_N[(starts_B * recipe.seq_len + first)[:, None] + offsets_T].long()


def mean_nll(model: Any, ids_N: NDArray[np.int32], seq_len: int, num_threads: int) -> float:
    """The model's mean loss in nats per token over windows of seq_len, in float32; nan where there is no window."""
    num_windows = (len(ids_N) - 1) // seq_len
    if num_windows == 0:
        return math.nan
    ids = torch.from_numpy(ids_N[: num_windows * seq_len + 1]).long()
    windows = ids[:-1].view(num_windows, seq_len), ids[1:].view(num_windows, seq_len)

    @torch.no_grad()
    def total(input_ids: Tensor, labels: Tensor) -> float:
        logits_PV = model(input_ids=input_ids).logits.flatten(0, 1)
        return nn.functional.cross_entropy(logits_PV, labels.flatten(), reduction="sum").item()

    with single_threads(num_threads) as pool:
        return sum(pool.map(total, *(part.split(4) for part in windows))) / (num_windows * seq_len)


BAR = "{desc}: {n:3.0f}% {bar} {elapsed}{postfix}"


def show(bar: Any, elapsed: float, losses: list[float], recipe: Recipe) -> None:
    tokens_per_second = len(losses) * recipe.batch_size * recipe.seq_len / elapsed
    bar.set_postfix_str(f"loss {np.mean(losses[-20:]):.3f}, {tokens_per_second:,.0f} tokens/s", refresh=False)
    bar.update(min(100.0, 100 * share_done(len(losses), elapsed, recipe)) - bar.n)
