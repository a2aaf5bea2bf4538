"""A capture's input: its plan, from one scan over all items, and the items of each unit of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice

from kdcache.capture.plan import Plan, Unit, make_plan, make_stream_plan, unit_digest
from kdcache.config.capture import InputConfig, ShardConfig
from kdcache.errors import InputError
from kdcache.inputs.content import Item
from kdcache.inputs.reader import ItemReader


class InputReader(ItemReader):
    """Reads the items of an InputConfig unit by unit; consecutive units are read in one pass. Close it when done."""

    def __init__(self, config: InputConfig, variables: frozenset[str] = frozenset()) -> None:
        """List the files, as `ItemReader` does."""
        super().__init__(config, variables)
        self._open: Iterator[Item] = iter(())
        self._next_item = -1
        self._stream_end: int | None = None

    def plan(
        self, shards: ShardConfig, *, template_fingerprint: str, observe: Callable[[Iterable[Item]], Iterable[Item]] = iter
    ) -> Plan:
        """Make the plan of this input in one scan over all items; a stream is not scanned.

        Args:
            shards: how the work is cut into units.
            template_fingerprint: of the chat template, from the tokenizer's identity.
            observe: wraps the items as they are scanned, as a progress bar does.

        Raises:
            InputError: an item cannot be read, or there is nothing to read.
        """
        if self.config.streaming:
            return make_stream_plan(config=self.config, template_fingerprint=template_fingerprint, unit_items=shards.unit_items)
        plan = make_plan(
            observe(islice(self.items(), self.config.limit)),
            config=self.config,
            template_fingerprint=template_fingerprint,
            unit_chars=shards.unit_chars,
            unit_items=shards.unit_items,
        )
        if plan.num_items == plan.num_empty_items:
            raise InputError(f"{self.name}: nothing to read: {_count_empty(plan)}")
        if self.config.limit == plan.num_items:
            self.left_out.add("files after input.limit was reached", self.files[self.num_files_opened :])
        return plan

    def read(self, unit: Unit) -> list[Item]:
        """Read the items of one unit.

        Raises:
            InputError: the input has changed since it was planned, or a stream holds no items.
        """
        if self._stream_end is not None and unit.first_item >= self._stream_end:
            return []
        if unit.first_item != self._next_item:
            self._open = self.items(unit.start)
        items = list(islice(self._open, unit.num_items))
        self._next_item = unit.first_item + len(items)
        if self.config.streaming:
            if len(items) < unit.num_items:
                self._stream_end = self._next_item
            if self._next_item == 0:
                raise InputError(f"{self.name}: the stream holds no items")
        elif len(items) != unit.num_items or unit_digest(items) != unit.digest:
            raise InputError(f"{self.name}: the input has changed since the capture began (unit {unit.index}); run it again")
        return items

    def close(self) -> None:
        """Close the file that is open."""
        self._open, self._next_item = iter(()), -1
        super().close()


def _count_empty(plan: Plan) -> str:
    return "no items" if plan.num_items == 0 else f"all {plan.num_items} items are empty"
