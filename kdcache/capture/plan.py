"""Items -> units of work, and the fingerprints that tell whether a later run is the same capture. Reads no file.

A plan is a function of the items and of `unit_chars` and `unit_items`. Its input fingerprint is one of meaning: it covers
each item's content, in order, and the settings that decide which sequences come out of it; it does not cover file names, how
the items were spread over files, or how the work is cut.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
import xxhash

from kdcache.config.capture import InputConfig
from kdcache.format.manifest import fingerprint
from kdcache.inputs.content import BEGINNING, Item, Start


@dataclass(frozen=True, slots=True)
class Unit:
    """Consecutive items that make one shard.

    Attributes:
        index: from 0, without gaps.
        start: where its first item starts.
        first_item: index of its first item in the whole input.
        num_items: how many it has; for a stream, at most.
        num_chars: characters (for ids, tokens); 0 for a stream, where they are not known.
        digest: digest of its items' content, which shows inputs that change during a capture; "" for a stream.
    """

    index: int
    start: Start
    first_item: int
    num_items: int
    num_chars: int
    digest: str


@dataclass(frozen=True, slots=True)
class Plan:
    """The deterministic list of work of a capture.

    Attributes:
        units: in the order of the input.
        input_fingerprint: equal for equal items that are made into sequences in the same way.
        fingerprint: covers the input fingerprint and how the work is cut.
        num_items: items in all; for a stream, at most.
        num_empty_items: items with nothing to read, which give no sequence; 0 for a stream, where they are not known.
        num_chars: characters (for ids, tokens) of all items; 0 for a stream.
        is_stream: whether it was made without reading the input.
    """

    units: tuple[Unit, ...]
    input_fingerprint: str
    fingerprint: str
    num_items: int
    num_empty_items: int
    num_chars: int
    is_stream: bool = False


def make_plan(
    items: Iterable[Item], *, config: InputConfig, template_fingerprint: str, unit_chars: int, unit_items: int
) -> Plan:
    """Cut items into units as long as `unit_chars` and `unit_items` allow.

    An item longer than `unit_chars` is a unit of its own. The items are consumed once and not kept.


    Args:
        items: in order; already cut to `config.limit`.
        config: enters the fingerprint as far as it decides which sequences are made.
        template_fingerprint: of the chat template, from the tokenizer's identity.
    """
    units: list[Unit] = []
    content = hashlib.sha256()
    open_unit = _OpenUnit(BEGINNING, 0)
    num_items = num_empty = num_chars = 0
    for item in items:
        if open_unit.is_full(item, unit_chars, unit_items):
            units.append(open_unit.close(len(units)))
            open_unit = _OpenUnit(item.start, num_items)
        hash_item(content, item)
        open_unit.add(item)
        num_items, num_empty, num_chars = num_items + 1, num_empty + item.is_empty, num_chars + item.num_chars
    if open_unit.num_items:
        units.append(open_unit.close(len(units)))
    meaning = fingerprint(_meaning(config, template_fingerprint) | {"content_sha256": content.hexdigest()})
    cut = fingerprint([meaning, [(unit.num_items, unit.digest) for unit in units]])
    return Plan(tuple(units), meaning, cut, num_items, num_empty, num_chars)


def make_stream_plan(*, config: InputConfig, template_fingerprint: str, unit_items: int) -> Plan:
    """Plan a streamed dataset without reading it: `config.limit` items, `unit_items` to a unit.

    A stream that ends early leaves the last units short or empty. The fingerprint names the dataset, its revision and the
    limit instead of the content: pin `revision`, or a changed dataset is not noticed.
    """
    assert config.limit is not None
    limit = config.limit
    units = tuple(
        Unit(index, Start(0, first, first), first, min(unit_items, limit - first), num_chars=0, digest="")
        for index, first in enumerate(range(0, limit, unit_items))
    )
    which = {name: getattr(config, name) for name in ("dataset", "dataset_config", "split", "revision", "field", "limit")}
    meaning = fingerprint(_meaning(config, template_fingerprint) | {"stream": which})
    return Plan(units, meaning, fingerprint([meaning, unit_items]), limit, 0, 0, is_stream=True)


def unit_digest(items: Iterable[Item]) -> str:
    """Compute `Unit.digest` for these items."""
    hasher = xxhash.xxh3_128()
    for item in items:
        hash_item(hasher, item)
    return hasher.hexdigest()


class _Hasher(Protocol):
    def update(self, data: bytes, /) -> Any: ...


def hash_item(hasher: _Hasher, item: Item) -> None:
    """Feed one item with its length, so that no two lists of items look alike, and its domain and group with lengths no item
    has."""
    data, domain = item.content_bytes(), item.domain.encode()
    hasher.update(len(data).to_bytes(8, "little"))
    hasher.update(data)
    if domain:
        hasher.update((2**63 + len(domain)).to_bytes(8, "little"))
        hasher.update(domain)
    if item.group:
        hasher.update((2**63 + 2**62 + len(item.preference)).to_bytes(8, "little"))
        hasher.update(item.group + item.preference.encode())


def _meaning(config: InputConfig, template_fingerprint: str) -> dict[str, Any]:
    """The settings that decide which sequences an item becomes."""
    names = ("content", "supervise", "add_special_tokens")
    settings = {name: getattr(config, name) for name in names}
    window = msgspec.to_builtins(config.window)
    named = {"domains": config.domain_field, "groups": config.group_field, "preferences": config.preference_field}
    marks = {name: field for name, field in named.items() if field is not None}
    names = ("one_item_per", "template_arguments", "template_time")
    chats = {name: getattr(config, name) for name in names if getattr(config, name) not in ("chat", {}, None)}
    version = 2 if config.content == "messages" else 1  # of chats: since who wrote what is proven
    return settings | marks | chats | {"window": window, "template": template_fingerprint, "version": version}


class _OpenUnit:
    """A unit that items are still being added to."""

    def __init__(self, start: Start, first_item: int) -> None:
        self.start, self.first_item = start, first_item
        self.num_items = self.num_chars = 0
        self._hasher = xxhash.xxh3_128()

    def is_full(self, item: Item, unit_chars: int, unit_items: int) -> bool:
        too_long = self.num_chars + item.num_chars > unit_chars
        return self.num_items > 0 and (too_long or self.num_items >= unit_items)

    def add(self, item: Item) -> None:
        if self.num_items == 0:
            self.start = item.start
        self.num_items += 1
        self.num_chars += item.num_chars
        hash_item(self._hasher, item)

    def close(self, index: int) -> Unit:
        return Unit(index, self.start, self.first_item, self.num_items, self.num_chars, self._hasher.hexdigest())
