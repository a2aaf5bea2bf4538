"""Carry out a plan on the actors of a Ray cluster: each has a teacher of its own, takes a unit at a time and publishes it.

The driver holds the plan and the counts; no record passes through it. A unit is done when its journal record is on disk, so an
actor that dies costs only its current unit: the unit is given to another actor, and a new one is started. The machines must
share the input and `out`.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from kdcache.capture.attempts import UnitFailed
from kdcache.capture.executors import placement
from kdcache.capture.executors.actor import CaptureWorker, UnitAnswer
from kdcache.capture.executors.endings import folded_on_failure, translated_interrupts
from kdcache.capture.executors.placement import Needs, replica_needs
from kdcache.capture.executors.tally import CaptureSummary, Tally
from kdcache.capture.job import Job
from kdcache.capture.plan import Unit
from kdcache.capture.watch._nvml import GpuState
from kdcache.capture.watch.progress import CaptureProgress
from kdcache.capture.watch.signals import StopRequest
from kdcache.config.capture import RunConfig
from kdcache.errors import CaptureError, KdcacheError
from kdcache.extras import needed_for
from kdcache.shown import first_line, get_logger
from kdcache.store import chain
from kdcache.store.writing.set_aside import FailedUnit
from kdcache.store.writing.writer import CacheWriter

# Ray reads these when it is imported. It reports its use to its makers unless told not to; and without the second it hides all
# GPUs from an actor that asks for none, with a warning that this will change.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
with needed_for("run.executor 'ray'"):
    import ray
    from ray.exceptions import RayActorError, RayError, RayTaskError

log = get_logger(__name__)

MAX_DEATHS_PER_UNIT = 3
"""Workers that may die at the same unit: one machine that is taken away is not the unit's fault, three are."""

MAX_FAILED_STARTS = 3
"""Consecutive workers that may die before they are ready."""

WAIT_SECONDS = 1.0
"""Seconds between two checks for a requested stop."""

LEAVE_SECONDS = 30.0
CONNECT_SECONDS = 10.0


@dataclass
class _Replica:
    """An actor as the driver sees it; `unit` is its current one."""

    name: str
    actor: Any
    placed: Any
    pid: int | None = None
    unit: Unit | None = None
    gpus: Sequence[GpuState] = ()
    hired: float = field(default_factory=time.monotonic)

    def is_waiting(self) -> bool:
        """Whether Ray has not placed it for so long that a warning is due."""
        is_late = self.pid is None and time.monotonic() - self.hired > placement.WARN_SECONDS
        return is_late and not ray.wait([self.placed], timeout=0)[0]


@dataclass
class _Crew:
    """The actors, their pending calls, and the units that no actor has."""

    make: Any
    needs: Needs
    num_replicas: int
    progress: CaptureProgress
    waiting: deque[Unit] = field(default_factory=deque)
    pending: dict[Any, _Replica] = field(default_factory=dict)
    deaths: Counter[int] = field(default_factory=Counter)
    num_made: int = 0
    num_lost: int = 0
    num_failed_starts: int = 0
    has_warned: bool = False
    leaving: list[Any] = field(default_factory=list)

    def hire(self) -> None:
        """Start as many actors as there are replicas, but no more than there is work for."""
        while len(self.pending) < min(self.num_replicas, self.num_open):
            actor = self.make()
            # Answered as soon as its process runs, which tells waiting for placement from loading a model.
            replica = _Replica(f"worker-{self.num_made}", actor, actor.placed.remote())
            self.num_made += 1
            self.pending[replica.actor.ready.remote()] = replica

    def wait(self) -> list[Any]:
        """Return the finished calls, or none after a second; warn once about actors that are not placed."""
        if not self.pending:
            return []
        done, _ = ray.wait(list(self.pending), num_returns=1, timeout=WAIT_SECONDS)
        num_waiting = 0 if self.has_warned else sum(replica.is_waiting() for replica in self.pending.values())
        if num_waiting:
            self.has_warned = True
            log.warning("%s", placement.not_placed(num_waiting, self.needs, ray.cluster_resources(), ray.available_resources()))
        return done

    def give(self, replica: _Replica) -> None:
        """Give an actor the next unit, or dismiss it."""
        replica.unit = self.waiting.popleft() if self.waiting else None
        if replica.unit is None:
            self.dismiss(replica)
            return
        self.progress.worker(replica.name, replica.pid, replica.unit.index, replica.gpus)
        self.pending[replica.actor.capture.remote(replica.unit)] = replica

    def dismiss(self, replica: _Replica) -> None:
        """Close an actor that has nothing left to do. Ray ends it after its earlier calls, once nothing refers to it."""
        self.progress.worker(replica.name, None, None)
        self.leaving.append(replica.actor.close.remote())

    def lose(self, replica: _Replica, error: Exception) -> None:
        """Note that an actor died, and give up if none gets ready."""
        self.progress.worker(replica.name, None, None)
        if replica.pid is None:
            self.num_failed_starts += 1
            if self.num_failed_starts >= MAX_FAILED_STARTS:
                raise CaptureError(
                    f"{self.num_failed_starts} consecutive workers died before they were ready, the last one with: "
                    f"{first_line(error)}; see their output above, and Ray's logs"
                ) from error
        else:
            self.num_lost += 1
            unit = "no unit" if replica.unit is None else f"unit {replica.unit.index}"
            log.warning("%s (pid %d) died while capturing %s: %s", replica.name, replica.pid, unit, first_line(error))

    def verdict(self, unit: Unit) -> FailedUnit | None:
        """Decide about the unit of a dead actor: it goes to the front of the queue, or is given up as the cause."""
        self.deaths[unit.index] += 1
        num_deaths = self.deaths[unit.index]
        if num_deaths < MAX_DEATHS_PER_UNIT:
            self.waiting.appendleft(unit)
            return None
        reason = f"{num_deaths} workers died while capturing it"
        return FailedUnit(unit=unit.index, error="WorkerDied", reason=reason, attempts=num_deaths)

    @property
    def num_open(self) -> int:
        """Units that wait, and those being captured."""
        return len(self.waiting) + sum(replica.unit is not None for replica in self.pending.values())


def capture_on_ray(job: Job, progress: CaptureProgress, stop: StopRequest) -> CaptureSummary:
    """Spread the units over Ray's actors.

    Raises:
        As `run_capture`. CaptureError: run.ray_address leads to no cluster, or workers do not start.
    """
    is_ours = _connect(job.config.run)
    try:
        with translated_interrupts(stop):
            return _drive(job, progress, stop)
    except RayError as error:
        raise CaptureError(f"Ray failed: {first_line(error)}; what is published is kept") from error
    finally:
        if is_ours:
            ray.shutdown()


def _drive(job: Job, progress: CaptureProgress, stop: StopRequest) -> CaptureSummary:
    stop.reinstall()  # Ray sets handlers of its own when it starts
    progress.loading(f"{job.config.teacher.model} in {job.config.run.replicas} workers")
    needs = replica_needs(job.config, ray.cluster_resources())
    crew = _Crew(_actor_maker(job, needs), needs, job.config.run.replicas, progress, deque(job.plan.units))
    first = _wait_for_first(crew)
    writer = CacheWriter.open(job.path, chain.newest_manifest(job.path))  # which the first worker has started
    tally = Tally(job, writer, progress, stop)
    crew.waiting = deque(tally.units)
    with folded_on_failure(tally, stop), stop.working():
        crew.give(first)
        _work(crew, tally, stop)
        tally.summary.num_workers_lost = crew.num_lost
        return tally.finish()


def _connect(run: RunConfig) -> bool:
    """Join or start a cluster; return False if this process was in one already."""
    if ray.is_initialized():
        return False
    address = run.ray_address or os.environ.get("RAY_ADDRESS") or ""
    where = repr(address) if address else "the default address"
    try:
        host, _, port = address.rpartition(":")
        if host and port.isdigit() and "//" not in host:
            # Ray itself would try for minutes, in silence.
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
        ray.init(address=run.ray_address, include_dashboard=False, logging_level=logging.ERROR)
    except (OSError, ValueError, RuntimeError) as error:
        raise CaptureError(
            f"run.ray_address: no Ray cluster at {where}: {first_line(error)}; check that it runs, and that "
            "RAY_AUTH_TOKEN holds its token if it asks for one"
        ) from error
    return True


def _actor_maker(job: Job, needs: Needs) -> Any:
    """Return a function that starts one more actor."""
    options = {"num_cpus": needs.num_cpus, "num_gpus": needs.num_gpus}
    kind: Any = ray.remote(CaptureWorker)
    plan = ray.put(job.plan)  # once per machine, however many actors there are
    return lambda: kind.options(max_restarts=0, max_task_retries=0, **options).remote(job.config, plan, os.getcwd())


def _wait_for_first(crew: _Crew) -> _Replica:
    """Wait for the first actor that has loaded its teacher and opened the cache."""
    while True:
        crew.hire()
        for future in crew.wait():
            replica = crew.pending.pop(future)
            if _answer(crew, replica, future) is not None:
                return replica


def _answer(crew: _Crew, replica: _Replica, future: Any) -> Any:
    """Return an actor's answer; None if the actor died."""
    try:
        answer: Any = ray.get(future)
    except RayActorError as error:
        crew.lose(replica, error)
        return None
    except RayTaskError as error:
        raise _own_error(error) from error
    if replica.pid is None:
        replica.pid, crew.num_failed_starts = answer, 0
    return answer


def _own_error(error: RayTaskError) -> KdcacheError:
    """Return our own error that ended a task, or wrap another one."""
    cause = error.cause
    return cause if isinstance(cause, KdcacheError) else CaptureError(f"a worker failed: {first_line(cause)}")


def _work(crew: _Crew, tally: Tally, stop: StopRequest) -> None:
    """Work until every unit is done; after a stop is requested, until the current ones are."""
    while crew.num_open:
        if stop.is_requested:
            crew.waiting.clear()
        crew.hire()
        for future in crew.wait():
            _take(crew, crew.pending.pop(future), future, tally)
    for replica in crew.pending.values():  # not ready yet, and not needed any more
        ray.kill(replica.actor)
    if crew.leaving:
        ray.wait(crew.leaving, num_returns=len(crew.leaving), timeout=LEAVE_SECONDS)


def _take(crew: _Crew, replica: _Replica, future: Any, tally: Tally) -> None:
    """Handle one actor's answer: it is ready, has finished its unit, or died."""
    unit = replica.unit
    answer = _answer(crew, replica, future)
    if unit is not None and answer is None:
        failed = crew.verdict(unit)
        if failed is not None:
            tally.add(UnitFailed(failed, None))
    elif unit is not None:
        _count(crew, replica, unit, answer, tally)
    if answer is not None:
        crew.give(replica)


def _count(crew: _Crew, replica: _Replica, unit: Unit, answer: UnitAnswer, tally: Tally) -> None:
    """Count a finished unit."""
    replica.gpus = answer.gpus
    if isinstance(answer.outcome, FailedUnit):
        tally.add(UnitFailed(answer.outcome, None))
        return
    crew.progress.start_unit(unit, answer.outcome.num_tokens)
    crew.progress.advance(answer.outcome.num_tokens)
    tally.add(answer.outcome)
