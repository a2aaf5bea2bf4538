"""What a selection costs per logit, without a model: `benchmarks/capture.py --kernel`.

Method: a chunk of random bfloat16 logits (standard deviation 3), of as many positions as the vLLM teacher gives at once; each
selection by `Selector.select`, on one thread, beside NumPy's sum of the same bytes as 64-bit integers, which is about what it
takes to read them; on a GPU beside torch's maximum of the logits, and the projection of as many positions at a hidden size of
2048. All take turns; seconds of the process, on a GPU of the device (`device.py`), the best of the rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from device import Device

KERNEL_ROUNDS = 20

Call = Callable[[], Any]


def kernel_rows(
    vocab_size: int, selections: dict[str, Any], chunk: int, device: Device, rounds: int = KERNEL_ROUNDS
) -> list[tuple[str, float]]:
    """Name and seconds per position, the plain read first."""
    import torch

    from kdcache.config.capture import TeacherConfig
    from kdcache.teacher.select.torch_selector import Selector
    from kdcache.teacher.vllm.options import chunk_positions

    torch.set_num_threads(1)
    num_rows = chunk_positions(TeacherConfig(model="none", chunk_positions=chunk), vocab_size, is_cpu=device.kind == "cpu")
    generator = torch.Generator().manual_seed(vocab_size)
    logits = (torch.randn(num_rows, vocab_size, generator=generator) * 3).bfloat16().to(device.kind)
    targets, states = (values.to(device.kind) for values in (torch.zeros(num_rows, dtype=torch.int64), torch.arange(num_rows)))
    calls: dict[str, Call] = {"read": logits.amax}
    if device.kind == "cpu":
        calls["read"] = logits.view(torch.int16).numpy().reshape(-1)[: logits.numel() // 4 * 4].view(np.uint64).sum
    else:
        hidden, weight = (logits.new_zeros(n, 2048) for n in (num_rows, vocab_size))
        calls["projection, H 2048"] = lambda: torch.mm(hidden, weight.T)
    for name, selection in selections.items():
        selector = Selector(selection, vocab_size)
        calls[name] = lambda selector=selector: selector.select(logits, targets, states)
    best = dict.fromkeys(calls, float("inf"))
    for number in range(rounds + 1):
        for name, call in calls.items():
            seconds = device.clock(call)
            best[name] = min(best[name], seconds) if number else best[name]
    return [(name, seconds / num_rows) for name, seconds in best.items()]


def kernel_table(machine: str, vocab_sizes: Sequence[int], selections: dict[str, Any], chunk: int, device: Device) -> str:
    """Markdown."""
    lines = ["# benchmarks/capture.py --kernel", "", machine, ""]
    lines += ["| vocabulary | selection | us per position | ns per logit | times the read |", "|---|---|---|---|---|"]
    for vocab_size in vocab_sizes:
        rows = kernel_rows(vocab_size, selections, chunk, device)
        read = rows[0][1]
        lines += [
            f"| {vocab_size} | {name} | {seconds * 1e6:.1f} | {seconds / vocab_size * 1e9:.3f} | {seconds / read:.1f} |"
            for name, seconds in rows
        ]
    return "\n".join(lines)
