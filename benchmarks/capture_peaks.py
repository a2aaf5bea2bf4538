"""How much memory a variant of capture.py takes, apart from its time: once, in a process that has done nothing else.

A process that has warmed up holds what the C library keeps of freed arrays, and its peak over that is nothing. So each variant
has a fork of its own, made after the imports and before any engine; the peak is VmHWM, set back to what is resident once the
engine stands and has answered one short sequence, which compiles and loads what is needed once. Plain prefill's fork gives the
floor.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

MIB = 2**20
Prepared = tuple[Callable[[], None], Callable[[], None], int]
"""What warms up, what is measured, and the most positions whose logits the worker holds at once."""


def resident(name: str) -> int:
    """VmHWM or VmRSS of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1]) * 1024


def in_fork(call: Callable[[], Any]) -> Any:
    """What the call gives in a fork of this process."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child: Any = context.Process(target=_answer, args=(call, sender))
    child.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise RuntimeError("a process that measures memory ended without an answer; see its output above") from None
    finally:
        child.join()


def _answer(call: Callable[[], Any], sender: Connection) -> None:
    sender.send(call())
    sender.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # an engine's threads need not be waited for


def peak_of(prepare: Callable[[], Prepared]) -> dict[str, int]:
    """Bytes: resident before, and at most while it runs; and the chunk's positions."""
    warm_up, call, chunk = prepare()
    warm_up()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    call()
    return {"before": before, "peak": resident("VmHWM"), "chunk": chunk}


def memory_table(peaks: dict[str, dict[str, int]]) -> list[str]:
    """Markdown; MiB over plain prefill."""
    floor = peaks["prefill"]
    lines = ["| once, alone | peak, MiB | over what was there | over prefill's |", "|---|---|---|---|"]
    for name, found in peaks.items():
        over = ((found["peak"] - found["before"]) / MIB, (found["peak"] - floor["peak"]) / MIB)
        lines.append(f"| {name} | {found['peak'] / MIB:,.0f} | {over[0]:,.0f} | {over[1]:,.0f} |")
    return lines


def memory_target(peaks: dict[str, dict[str, int]], vocab_size: int, tokens: int, entries: Sequence[int]) -> list[str]:
    """Within plain prefill plus one chunk?"""
    chunk = max(found["chunk"] for found in peaks.values())
    half = 2 * chunk * vocab_size
    lines = [f"- one chunk: {chunk} positions, {half / MIB:.1f} MiB of bfloat16 logits ({2 * half / MIB:.1f} as float32)"]
    for k in entries:
        over = peaks[f"worker {k}"]["peak"] - peaks["prefill"]["peak"]
        rows = (8 * k + 5) * tokens
        lines.append(
            f"- K = {k}: {over / MIB:.0f} MiB over prefill's peak, {'within' if over <= half else 'above'} one chunk; "
            f"the records of all {tokens:,} positions are {rows / MIB:.1f}"
        )
    return lines
