"""GPUs as NVIDIA's management library sees them; none without the package nvidia-ml-py or without a driver."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

pynvml: Any
try:
    import pynvml  # of the package nvidia-ml-py
except ImportError:  # it is optional
    pynvml = None

_T = TypeVar("_T")


@dataclass(frozen=True)
class GpuState:
    """One GPU at one moment; None for what the device does not tell.

    Attributes:
        utilization_percent: over the last second or less, as nvidia-smi shows it.
    """

    index: int
    name: str
    memory_used_bytes: int | None
    memory_total_bytes: int | None
    utilization_percent: int | None
    power_watts: float | None


def gpu_states() -> list[GpuState]:
    """Read the GPUs that this process may use; empty if none can be read."""
    return [_state(index, handle) for index, handle in enumerate(_handles())]


def energy_joules(num_gpus: int) -> float | None:
    """Energy that the first `num_gpus` of them have used since their driver was loaded; None where one does not say (before
    Volta), or where there are fewer."""
    handles = _handles()[:num_gpus]
    if len(handles) < max(1, num_gpus):
        return None
    used = [_ask(lambda handle=handle: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) for handle in handles]
    return None if None in used else sum(used) / 1000


def num_gpus() -> int:
    """Count the GPUs that can be read."""
    return len(_handles())


@cache
def _handles() -> tuple[Any, ...]:
    if pynvml is None or _ask(pynvml.nvmlInit, failed=False) is False:
        return ()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        count = _ask(pynvml.nvmlDeviceGetCount) or 0
        names = [str(index) for index in range(count)]
    else:
        names = [name.strip() for name in visible.split(",") if name.strip()]
    handles = (_ask(lambda name=name: _handle(name)) for name in names)
    return tuple(handle for handle in handles if handle is not None)


def _handle(name: str) -> Any:
    # By number in the order of the bus, as nvidia-smi counts; CUDA counts so too unless the machine mixes models.
    return pynvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdigit() else pynvml.nvmlDeviceGetHandleByUUID(name)


def _state(index: int, handle: Any) -> GpuState:
    memory = _ask(lambda: pynvml.nvmlDeviceGetMemoryInfo(handle))
    utilization = _ask(lambda: pynvml.nvmlDeviceGetUtilizationRates(handle))
    milliwatts = _ask(lambda: pynvml.nvmlDeviceGetPowerUsage(handle))
    name = _ask(lambda: pynvml.nvmlDeviceGetName(handle))
    return GpuState(
        index=index,
        name=name.decode() if isinstance(name, bytes) else str(name),
        memory_used_bytes=None if memory is None else int(memory.used),
        memory_total_bytes=None if memory is None else int(memory.total),
        utilization_percent=None if utilization is None else int(utilization.gpu),
        power_watts=None if milliwatts is None else milliwatts / 1000,
    )


def _ask(question: Callable[[], _T], failed: Any = None) -> _T | Any:
    """Return the answer, or `failed`: what a device, a driver or a container does not offer is not an error."""
    try:
        return question()
    except pynvml.NVMLError:
        return failed
