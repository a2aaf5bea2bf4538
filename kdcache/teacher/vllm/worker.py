"""Selection inside the engine's worker: vLLM adds `CaptureExtension` to its worker's bases, in whatever process that runs.

In every step, right after the hidden states are computed, the supervised positions are projected a chunk at a time, and of each
chunk's logits the selection and the target's logprob are kept. Scheduling, batching and chunked prefill are the engine's own.
What is kept goes to its index in a buffer of the whole group, so a position that is computed twice (preemption) is written
twice, and one that never was leaves its mark unset.

`hidden` is what a step computes: (tokens of the step, H).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, NoReturn

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcache.format.manifest import SelectionInfo
from kdcache.shown import first_line, get_logger
from kdcache.teacher.select.found import Layout
from kdcache.teacher.select.torch_selector import Selector
from kdcache.teacher.select.uniforms import position_states
from kdcache.teacher.vllm import internals
from kdcache.teacher.vllm.layers import SeenLayers, watch_layers
from kdcache.teacher.vllm.wire import NOT_SUPERVISED, TARGET_IDS, Buffer, unpack_request
from kdcache.teacher.vllm.worker_features import GroupFeatures
from kdcache.teacher.vllm.worker_projection import read_projection

log = get_logger(__name__)

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_LARGEST_KEPT = 32 * 2**20  # the most that glibc takes
_MOST_FREE = 256 * 2**20


class CaptureExtension:
    """What vLLM's worker learns from us. Public names have a prefix: vLLM refuses those that its worker has."""

    kdcache_capture: Capture | None = None

    def kdcache_install(self) -> str | None:
        """Take part in every step from now on, or change nothing and give the reason."""
        if self.kdcache_capture is not None:
            return None
        if not internals.is_last_stage(self):
            return None
        alone = internals.num_ranks(self) == 1
        capture = Capture(internals.projection(self), keeps=internals.is_first_of_its_stage(self), alone=alone)
        problem = internals.install(self, capture.on_step)
        if problem is None:
            self.kdcache_capture = capture
            if not torch.accelerator.is_available():
                keep_freed_memory()
        return problem

    def kdcache_watch(self) -> str | None:
        """Watch decoder layers from now on, or change nothing and give the reason."""
        capture = self.kdcache_capture
        if capture is None or capture.seen is not None:
            return None
        seen = watch_layers(self)
        if isinstance(seen, str):
            return seen
        capture.seen = seen
        return None

    def kdcache_projection(self) -> dict[str, Any] | None:
        """The output projection; see `read_projection`."""
        return None if self.kdcache_capture is None else read_projection(self, keeps=internals.is_first_of_its_stage(self))

    def kdcache_misfits(self) -> list[str]:
        """Modules that the adapter has weights for, and this worker's part of the model lacks or has in another size."""
        return list(internals.misfits(self))

    def kdcache_begin(
        self,
        num_positions: int,
        chunk: int,
        selection: dict[str, Any] | None,
        vocab_size: int,
        features: dict[str, Any] | None = None,
    ) -> str | None:
        """Expect the requests of a group; see `Capture.begin`. Gives the reason if a chunk has no room on this rank.

        Selection and features come as plain values, since they cross processes; see `wire.pack_asked`.
        """
        if self.kdcache_capture is None:
            return None
        selector = None if selection is None else Selector(msgspec.convert(selection, SelectionInfo), vocab_size)
        if problem := self.kdcache_capture.try_chunk(chunk, selector, self._kdcache_trial):
            return problem
        self.kdcache_capture.begin(num_positions, chunk, selector, None if features is None else GroupFeatures(features))
        return None

    def _kdcache_trial(self, chunk: int) -> Tensor | None:
        size, dtype, device = internals.hidden_layout(self)
        return internals.project_alone(self, torch.zeros(chunk, size, dtype=dtype, device=device))

    def kdcache_end(self) -> list[Any] | None:
        """The group's result: an error's text or None, then `Buffer.pack`. None on workers whose answer does not count."""
        return None if self.kdcache_capture is None else self.kdcache_capture.end()

    def kdcache_features(self) -> list[Any] | None:
        """The group's features, after `kdcache_end`; see `GroupFeatures.pack`. None on workers whose answer does not count."""
        return None if self.kdcache_capture is None else self.kdcache_capture.end_features()


class _LeftError(RuntimeError):
    """A rank left a projection that the others are in."""


class _Pending(NamedTuple):
    """What was kept of some positions, on the device or on its way to the host."""

    group_index_C: NDArray[np.int64]
    found: tuple[Tensor, ...]


class Capture:
    """One worker's part in a group, between `begin` and `end`."""

    def __init__(self, project: Callable[[Tensor], Tensor | None], *, keeps: bool, alone: bool = True) -> None:
        """Idle.

        Args:
            project: hidden states (C, H) to logits (C, V).
            keeps: whether this rank selects. Others only take part in the projection, which may be collective.
            alone: whether no other rank takes part in the projection.
        """
        self._project = project
        self._keeps = keeps
        self._alone = alone
        self._tried: tuple[int, Selector | None] | None = None
        self.seen: SeenLayers | None = None
        self._features: GroupFeatures | None = None
        self._buffer: Buffer | None = None
        self._selector: Selector | None = None
        self._chunk = 0
        self._arrived: list[_Pending] = []
        self._pending: list[_Pending] = []
        self._error: str | None = None

    def try_chunk(self, chunk: int, selector: Selector | None, trial: Callable[[int], Tensor | None]) -> str | None:
        """Find out whether a chunk has room here, before another rank waits for this one in a projection.

        Args:
            chunk: positions.
            selector: what will be kept of them.
            trial: the logits of that many positions, without the other ranks.

        Returns:
            What is wrong, or None.
        """
        if self._alone or self._tried == (chunk, selector):
            return None
        try:
            with torch.inference_mode():
                logits_CV = trial(chunk)
                if self._keeps and selector is not None and logits_CV is not None:
                    nothing_C = torch.zeros(len(logits_CV), dtype=torch.int64, device=logits_CV.device)
                    selector.select(logits_CV, nothing_C, nothing_C)
        except Exception as error:
            return f"a chunk of {chunk} positions fails on one rank: {type(error).__name__}: {first_line(error)}"
        self._tried = (chunk, selector)
        return None

    def begin(self, num_positions: int, chunk: int, selector: Selector | None, features: GroupFeatures | None = None) -> None:
        """Drop what was begun before, and allocate the buffer.

        Args:
            num_positions: supervised positions of all requests to come.
            chunk: the most positions whose logits exist at once.
            selector: what to keep. None projects only, which is the limit that `benchmarks/capture.py` measures against.
            features: hidden states to keep, with a selector only.
        """
        layout = Layout(0, False, 0) if selector is None else selector.layout
        self._buffer, self._selector, self._chunk = Buffer.empty(num_positions, layout), selector, chunk
        self._arrived, self._pending, self._error = [], [], None
        self._features = features
        if features is not None and self._keeps:
            features.watch(self.seen)

    def end(self) -> list[Any] | None:
        """See `CaptureExtension.kdcache_end`."""
        buffer, self._buffer = self._buffer, None
        if buffer is None or not self._keeps:
            return None
        if self._pending or self._features is not None:
            _synchronize()
        _write(buffer, self._pending)
        self._pending = []
        if self._features is not None:
            self._features.settle()
            self._features.unwatch()
        return [self._error, *buffer.pack()]

    def end_features(self) -> list[Any] | None:
        """See `CaptureExtension.kdcache_features`."""
        features, self._features = self._features, None
        return None if features is None or not self._keeps else features.pack()

    def on_step(self, hidden: Tensor, spans: Callable[[], Iterator[Any]]) -> None:
        """Handle a step. Raises, which ends the engine, only where other ranks would wait for this one: see `_leave`."""
        if self._buffer is None:
            return
        try:
            with torch.inference_mode():
                self._select(hidden, spans())
        except _LeftError:
            raise
        except Exception as error:  # memory above all
            self._error = self._error or f"{type(error).__name__}: {first_line(error)}"

    def _select(self, hidden: Tensor, spans: Iterable[Any]) -> None:
        spans = list(spans)
        self._take(hidden, spans)
        wanted = wanted_positions(spans, None if self._selector is None else self._selector.seed)
        num_positions = len(wanted.step_index_P)
        if num_positions == 0:
            return
        # Chunks of equal size: a small last one would cost the projection as much as a whole one.
        for here_C in np.array_split(np.arange(num_positions), -(-num_positions // self._chunk)):
            chunk = WantedPositions(*(array_P[here_C[0] : here_C[-1] + 1] for array_P in wanted))
            try:
                logits_CV = self._project(_states_at(hidden, chunk.step_index_P))
            except Exception as error:
                if self._alone:
                    raise
                self._leave(error)
            if self._keeps and self._selector is not None and logits_CV is not None and self._error is None:
                self._keep(self._selector, logits_CV, chunk)
            del logits_CV  # before the next chunk's are made: one at a time
        self._send()

    def _leave(self, error: Exception) -> NoReturn:
        """End the engine: the other ranks are in this projection and would wait for this one until they time out.

        vLLM hears an exception of the first rank; the failure of another rank it notices when that process ends.
        """
        log.error(
            "a projection failed on one of several ranks, which ends vLLM: %s: %s", type(error).__name__, first_line(error)
        )
        if self._keeps:
            raise _LeftError(f"{type(error).__name__}: {first_line(error)}") from error
        raise SystemExit(1) from error

    def _take(self, hidden: Tensor, spans: list[Any]) -> None:
        """Take the inner states of the step's wanted positions."""
        if self._features is None or not self._keeps:
            return
        try:
            self._features.take(hidden, spans, self._chunk)
        except Exception as error:  # not raised, as in `_keep`
            self._error = self._error or f"{type(error).__name__}: {first_line(error)}"

    def _keep(self, selector: Selector, logits_CV: Tensor, chunk: WantedPositions) -> None:
        try:
            given = (torch.from_numpy(x).to(logits_CV.device, non_blocking=True) for x in (chunk.target_ids_P, chunk.states_P))
            found = selector.select(logits_CV, *given)
        except Exception as error:
            # Not raised: the other ranks move on to the next chunk's projection, and would wait for this one forever.
            self._error = f"{type(error).__name__}: {first_line(error)}"
            return
        self._arrived.append(_Pending(chunk.group_index_P, tuple(found)))
        if _is_on_host(logits_CV):
            self._send()

    def _send(self) -> None:
        """Write what arrived to the buffer, or start it on its way there.

        From a device it goes to pinned memory, without waiting, so that the next step can be prepared meanwhile. The chunks of
        a step go as one copy: each copy takes a piece of pinned memory, which the first group has to ask CUDA for.
        """
        arrived, self._arrived = self._arrived, []
        if not arrived or self._buffer is None:
            return
        if all(map(_is_on_host, arrived[0].found)):
            _write(self._buffer, arrived)
            return
        found = (torch.cat(parts).to("cpu", non_blocking=True) for parts in zip(*(each.found for each in arrived), strict=True))
        self._pending.append(_Pending(np.concatenate([each.group_index_C for each in arrived]), tuple(found)))


class WantedPositions(NamedTuple):
    """The wanted positions of a step, (P,) int64 each.

    Attributes:
        step_index_P: among the step's tokens, ascending.
        group_index_P: among the group's positions.
        target_ids_P: NO_TARGET where nothing follows.
        states_P: the bits of `position_states`; 0 without draws.
    """

    step_index_P: NDArray[np.int64]
    group_index_P: NDArray[np.int64]
    target_ids_P: NDArray[np.int64]
    states_P: NDArray[np.int64]


def wanted_positions(spans: Iterable[Any], seed: int | None = None) -> WantedPositions:
    """The positions of the group that a step computes, in the order of its tokens. `seed` is the selection's, if it draws."""
    parts = [_wanted_of(span, seed) for span in sorted(spans, key=lambda span: span.start) if TARGET_IDS in span.extra_args]
    return (
        WantedPositions(*np.concatenate(parts, axis=1, dtype=np.int64))
        if parts
        else WantedPositions(*np.empty((4, 0), np.int64))
    )


def _wanted_of(span: Any, seed: int | None) -> WantedPositions:
    wanted = unpack_request(span.extra_args)
    here = slice(span.position, span.position + span.length)
    supervised = np.flatnonzero(wanted.target_ids_N[here] != NOT_SUPERVISED)
    states_P = np.zeros(len(supervised), np.int64)
    if seed is not None:
        states_P = position_states(seed, wanted.key, span.position + supervised).view(np.int64)
    target_ids_P = wanted.target_ids_N[here][supervised].astype(np.int64)
    return WantedPositions(span.start + supervised, wanted.group_index_N[here][supervised], target_ids_P, states_P)


def _states_at(hidden: Tensor, step_index_C: NDArray[np.int64]) -> Tensor:
    first, last = int(step_index_C[0]), int(step_index_C[-1])
    if last - first + 1 == len(step_index_C):
        return hidden[first : last + 1]
    return hidden[torch.from_numpy(step_index_C).to(hidden.device, non_blocking=True)]


def _is_on_host(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _write(buffer: Buffer, pending: Iterable[_Pending]) -> None:
    for group_index_C, found in pending:
        buffer.write(group_index_C, [tensor.numpy() for tensor in found])


def _synchronize() -> None:
    """Wait for the device, where there is one: what is on its way to the host has then arrived."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def keep_freed_memory() -> bool:
    """Have the C library keep up to 256 MiB of freed memory for new arrays of up to 32 MiB, for the rest of the process.

    Otherwise glibc maps the logits of each chunk again, and each of their pages costs an interrupt and is zeroed: tens of
    microseconds for one position of a vocabulary of 152k (benchmarks/LOG.md). Gives whether the C library complies.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library
        return False
    return all([mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT), mallopt(_TRIM_THRESHOLD, _MOST_FREE)])
