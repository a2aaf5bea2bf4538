"""What a capture tells the person who waits for it: methods to override, and bars on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from kdcache.bars import bar_options
from kdcache.capture.plan import Unit
from kdcache.capture.watch import _nvml
from kdcache.inputs.content import Item
from kdcache.shown import shown

if TYPE_CHECKING:
    from kdcache.format.manifest import ShardInfo
    from kdcache.store.writing.set_aside import FailedUnit

_DELAY_SECONDS = 1.0


class CaptureProgress:
    """Shows nothing; subclasses do. A capture calls the methods in about this order."""

    def scanning(self, items: Iterable[Item]) -> Iterable[Item]:
        """Wrap the items while the plan is made."""
        return items

    def loading(self, model: str) -> None:
        """The teacher is about to be loaded."""

    def start(self, units: Sequence[Unit]) -> None:
        """These units, not published yet, are about to be captured."""

    def start_unit(self, unit: Unit, num_tokens: int) -> None:
        """A unit has been read and has this many tokens, or may have, before its answers are written.

        Called again when the unit is tried again, and when the lengths of its answers are known.
        """

    def advance(self, num_tokens: int) -> None:
        """The teacher has read or written this many more tokens; negative if answers are void because their unit failed."""

    def published(self, shard: ShardInfo) -> None:
        """A unit is done."""

    def set_aside(self, failed: FailedUnit) -> None:
        """A unit is given up for this run."""

    def worker(self, name: str, pid: int | None, unit: int | None, gpus: Sequence[_nvml.GpuState] = ()) -> None:
        """A worker of a cluster has taken a unit (None: it has none; with pid None it is gone).

        `gpus` are its own, as they were during its last unit.
        """

    def ended(self, state: str) -> None:
        """The capture ended: `finished`, `stopped` or `failed`."""

    def close(self) -> None:
        """The last call, after success or failure."""


def several(*others: CaptureProgress) -> CaptureProgress:
    """Tell several: each call goes to all of them, in order."""
    return _Several(others)


class _Several(CaptureProgress):
    def __init__(self, others: Sequence[CaptureProgress]) -> None:
        self._others = others
        for name in vars(CaptureProgress):
            if not name.startswith("_") and name != "scanning":
                setattr(self, name, partial(self._tell, name))

    def scanning(self, items: Iterable[Item]) -> Iterable[Item]:
        for other in self._others:
            items = other.scanning(items)
        return items

    def _tell(self, name: str, *arguments: Any) -> None:
        for other in self._others:
            getattr(other, name)(*arguments)


class TokensToCome:
    """Estimates how many tokens some units hold, from their characters and the tokens per character so far."""

    def __init__(self, units: Sequence[Unit]) -> None:
        self._chars_left = sum(unit.num_chars for unit in units)
        self._chars_read = self._tokens_read = 0
        self._seen: dict[int, int] = {}

    def read(self, unit: Unit, num_tokens: int) -> None:
        """Note that a unit holds this many tokens; the last call counts, as answers may be shorter than expected."""
        if unit.index not in self._seen:
            self._chars_left -= unit.num_chars
            self._chars_read += unit.num_chars
        self._tokens_read += num_tokens - self._seen.get(unit.index, 0)
        self._seen[unit.index] = num_tokens

    @property
    def total(self) -> int | None:
        """The tokens of all units; None before the first unit, and for a stream."""
        if not self._chars_read:
            return None
        return self._tokens_read + round(self._chars_left * self._tokens_read / self._chars_read)


class BarProgress(CaptureProgress):
    """Bars on stderr: items while planning; then tokens, with tokens/s, the time left, bytes, and the state of GPUs."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None
        self._to_come = TokensToCome(())
        self._num_bytes = self._num_set_aside = 0
        self._computes_here = True

    def scanning(self, items: Iterable[Item]) -> Iterable[Item]:
        return tqdm(items, **bar_options(desc="reading the input", unit=" items", unit_scale=True, delay=_DELAY_SECONDS))

    def loading(self, model: str) -> None:
        tqdm.write(shown(f"loading the teacher {model}"), file=sys.stderr)

    def start(self, units: Sequence[Unit]) -> None:
        self._to_come = TokensToCome(units)
        what = f"capturing {len(units)} unit{'' if len(units) == 1 else 's'}"
        self._bar = tqdm(**bar_options(desc=what, unit=" tok", unit_scale=True))

    def start_unit(self, unit: Unit, num_tokens: int) -> None:
        self._to_come.read(unit, num_tokens)
        if self._bar is not None:
            self._bar.total = self._to_come.total

    def advance(self, num_tokens: int) -> None:
        if self._bar is not None:
            self._bar.update(num_tokens)

    def published(self, shard: ShardInfo) -> None:
        self._num_bytes += shard.num_bytes
        if self._bar is not None:
            parts = [f"{tqdm.format_sizeof(self._num_bytes, 'B')} written"]
            parts += self._gpu_texts()
            if self._num_set_aside:
                parts.append(f"{self._num_set_aside} set aside")
            self._bar.set_postfix_str(", ".join(parts), refresh=False)

    def set_aside(self, failed: FailedUnit) -> None:
        self._num_set_aside += 1
        sentence = f"unit {failed.unit} is set aside after {failed.attempts} attempts: {failed.reason}"
        tqdm.write(shown(sentence), file=sys.stderr)

    def _gpu_texts(self) -> list[str]:
        return [_gpu_text(gpu) for gpu in _nvml.gpu_states()] if self._computes_here else []

    def worker(self, name: str, pid: int | None, unit: int | None, gpus: Sequence[_nvml.GpuState] = ()) -> None:
        del name, pid, unit, gpus  # a line has no room for the GPUs of many
        self._computes_here = False

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _gpu_text(gpu: _nvml.GpuState) -> str:
    memory = "" if gpu.memory_used_bytes is None else f" {tqdm.format_sizeof(gpu.memory_used_bytes, 'B')}"
    busy = "" if gpu.utilization_percent is None else f" {gpu.utilization_percent}%"
    return f"GPU {gpu.index}{memory}{busy}"
