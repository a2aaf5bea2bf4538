"""What a teacher's replica asks of a cluster, and what to say if the cluster does not have it. Pure functions; no Ray."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kdcache.config.capture import CaptureConfig
from kdcache.teacher import find_backend

WARN_SECONDS = 30.0
"""A replica that is not placed for this long is reported. A worker process needs some seconds to start."""


@dataclass(frozen=True)
class Needs:
    """What must be free on one machine for one replica."""

    num_cpus: int
    num_gpus: int

    def __str__(self) -> str:
        return _resources(self.num_cpus, self.num_gpus)


def replica_needs(config: CaptureConfig, cluster: Mapping[str, float]) -> Needs:
    """Compute what each replica asks for.

    Args:
        config: of the capture.
        cluster: what the cluster has, by Ray's names. One without GPUs is asked for none unless `run.gpus_per_replica` says so:
            it may be one of CPUs alone, or one that has not grown yet, and nobody else knows which.
    """
    asked = config.run.gpus_per_replica
    if asked is None:
        asked = find_backend(config.teacher.backend).num_gpus(config.teacher) if cluster.get("GPU", 0) > 0 else 0
    return Needs(num_cpus=1, num_gpus=asked)


def not_placed(num_waiting: int, needs: Needs, total: Mapping[str, float], free: Mapping[str, float]) -> str:
    """Describe replicas that wait: what was asked for, what there is, what to do.

    Args:
        num_waiting: replicas that are not placed.
        needs: what each asks for.
        total, free: what the cluster has, by Ray's names.
    """
    whose = "1 replica has" if num_waiting == 1 else f"{num_waiting} replicas have"
    has = _resources(total.get("CPU", 0), total.get("GPU", 0))
    left = _resources(free.get("CPU", 0), free.get("GPU", 0))
    gpus = ", or set run.gpus_per_replica to what one needs" if needs.num_gpus else ""
    return (
        f"{whose} not been placed by the Ray cluster for {WARN_SECONDS:g} seconds: each asks for {needs} on "
        f"one machine, and the cluster has {has}, of which {left} are free; waiting. Add machines (a cluster "
        f"that grows by itself may still do so), free what is in use, or run fewer replicas{gpus}. The "
        "replicas that are placed do the work meanwhile"
    )


def _resources(num_cpus: float, num_gpus: float) -> str:
    return f"{num_cpus:g} CPU{'' if num_cpus == 1 else 's'} and {num_gpus:g} GPU{'' if num_gpus == 1 else 's'}"
