"""A loader's state: a small JSON dict that says which batch comes next, and of what."""

from __future__ import annotations

from typing import Any

import msgspec

from kdcache.config.loader import LoaderConfig
from kdcache.errors import StateError
from kdcache.loader.order.shuffle import ORDER_VERSION
from kdcache.loader.rows.packing import PACKING_VERSION

STATE_VERSION = 3
MOST_STEPS = 2**62
"""No epoch or batch has this number: sums of them stay whole numbers of 64 bits."""

_NOT_OF_THE_STREAM = {
    *("num_threads", "prefetch_batches", "logprob_dtype", "seed"),
    *("features", "with_roles", "with_domains", "with_target_logprobs"),
}
# Later than states that may be resumed: absent from those in which they are off.
_LATER = {"pairs"}


class LoaderState(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The same on all ranks, under 1 kB, and of constant structure.

    Attributes:
        version: of this struct.
        order_version, packing_version: of the algorithms that made the stream.
        snapshots: of each cache, in their order: the digest of its manifest, and of what is selected from it.
        config: the fields of LoaderConfig that decide the stream, but for the seed.
        seed, epoch: of the order.
        next_batch: number in the epoch of the global batch that comes next; 0 of the next epoch after the last.
    """

    version: int = STATE_VERSION
    order_version: int = ORDER_VERSION
    packing_version: int = PACKING_VERSION
    snapshots: tuple[str, ...]
    config: dict[str, Any]
    seed: int
    epoch: int
    next_batch: int


def stream_config(config: LoaderConfig) -> dict[str, Any]:
    """The fields of the config that decide the stream, as JSON values; the seed has a field of its own in a state."""
    fields = {name: value for name, value in as_json(config).items() if name not in _NOT_OF_THE_STREAM}
    return {name: value for name, value in fields.items() if value or name not in _LATER}


def as_json(struct: msgspec.Struct) -> dict[str, Any]:
    """What JSON makes of a struct: lists for tuples too, so that it equals what comes back from a file."""
    return msgspec.json.decode(msgspec.json.encode(struct))


def parse_state(fields: Any, *, here: LoaderState) -> LoaderState:
    """The state in a dict, checked against a loader's own.

    Args:
        fields: what `state_dict` gave, perhaps by way of a file.
        here: the state of the loader that is to resume; its epoch and next_batch do not matter.

    Raises:
        StateError: not a state, or one of another cache, of another config or of another version; the message shows both sides.
    """
    if isinstance(fields, dict) and fields.get("version", STATE_VERSION) != STATE_VERSION:
        raise StateError(f"the loader state has version {fields['version']!r}, this kdcache reads version {STATE_VERSION}")
    try:
        state = msgspec.convert(fields, LoaderState)
    except msgspec.ValidationError as error:
        raise StateError(f"not a state of a kdcache loader: {error}") from error
    try:
        differences = _differences(_leaves(state), _leaves(here))
    except (TypeError, OverflowError, RecursionError) as error:
        raise StateError(f"not a state of a kdcache loader: a value that JSON cannot hold: {error}") from error
    if differences:
        raise StateError(
            f"the loader state was saved under {'; '.join(differences)}: give the loader the cache and the config that it was "
            f"saved with, or begin again without it"
        )
    if not (0 <= state.epoch < MOST_STEPS and 0 <= state.next_batch < MOST_STEPS):
        raise StateError(
            f"the loader state names epoch {state.epoch}, batch {state.next_batch}; expected numbers from 0 to 2^62"
        )
    return state


def _leaves(state: LoaderState) -> dict[str, Any]:
    """What two states must agree in."""
    fields = as_json(state)
    versions = {name: fields[name] for name in ("order_version", "packing_version", "seed")}
    snapshots = fields["snapshots"]
    named = {"snapshot": snapshots[0]} if len(snapshots) == 1 else {f"snapshot {i}": name for i, name in enumerate(snapshots)}
    return versions | named | _opened(fields["config"])


def _opened(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Sections opened, so that a difference names the field: `mask.roles`."""
    leaves: dict[str, Any] = {}
    for name, value in config.items():
        # A mapping with free keys (role_weights) opens as well: an absent key differs from every number.
        leaves |= _opened(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return leaves


def _differences(saved: dict[str, Any], here: dict[str, Any]) -> list[str]:
    names = [*saved, *(name for name in here if name not in saved)]
    return [f"{n} {saved.get(n)!r}, here {here.get(n)!r}" for n in names if saved.get(n) != here.get(n)]
