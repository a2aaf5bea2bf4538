"""The device that a benchmark runs on: what times a call there, what memory it takes, and what it is called.

On a CPU seconds are those of the process, since wall time measures the machine's other jobs; on a GPU they are between two
events on its stream, so that the host's queueing is in them only where the GPU waits for it.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Device:
    """`cpu` or `cuda`."""

    kind: str

    @property
    def unit(self) -> str:
        """Whose seconds `clock` gives."""
        return "CPU" if self.kind == "cpu" else "GPU"

    @property
    def name(self) -> str:
        """The processor's or the GPU's."""
        return processor_name() if self.kind == "cpu" else torch.cuda.get_device_name()

    def use(self) -> None:
        """Tensors that are made without a device are made here."""
        torch.set_default_device(None if self.kind == "cpu" else self.kind)

    def clock(self, call: Callable[[], Any]) -> float:
        """Seconds of one call."""
        if self.kind == "cpu":
            start = time.process_time()
            call()
            return time.process_time() - start
        torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def peak_memory(self, call: Callable[[], Any]) -> int:
        """Bytes that one call takes at most beyond what is held before it.

        On a CPU of the whole process, which must be fresh: memory that it freed before is still its own.
        """
        if self.kind == "cpu":
            # 5 sets the peak back to what is in use (proc_pid_clear_refs(5)).
            Path("/proc/self/clear_refs").write_text("5")
            before = _process_peak()
            call()
            return _process_peak() - before
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def add_argument(parser: argparse.ArgumentParser) -> None:
    """`--device`."""
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU where there is one")


def chosen(name: str) -> Device:
    """Of `--device`."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no CUDA device here")
    return Device(name)


def processor_name() -> str:
    """As Linux says it, else as Python does."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


def processor_features() -> str:
    """What torch uses of the processor, which decides much of every CPU second: `AVX512, bfloat16 in hardware`."""
    from kdcache.half_precision import is_emulated

    bfloat16 = "emulated" if is_emulated(torch.bfloat16) else "in hardware"
    return f"{torch.backends.cpu.get_cpu_capability()}, bfloat16 {bfloat16}"


def _process_peak() -> int:
    """Of this process so far, on Linux. Not getrusage, whose maximum a new process inherits from the one that started it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM line; use --no-memory")
