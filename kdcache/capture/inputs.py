"""The items of an input, in an order that depends on the input alone, from any place on.

Policy for items without content (an empty file, a blank line of `lines`, an empty or null cell, a chat without text): they
are counted, reported and skipped; they give no sequence. Anything that cannot be read is an InputError naming file and line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice

from kdcache.capture.content import DEFAULT_FIELDS, Fields, Item, Place
from kdcache.capture.files import find_files
from kdcache.capture.plan import START, Plan, Unit, make_plan, make_stream_plan, unit_digest
from kdcache.config.capture import InputConfig, OutputConfig
from kdcache.errors import InputError

_ReadFile = Callable[[str, int, Place], Iterator[Item]]


class InputReader:
    """The items behind an InputConfig. Units read one after another are read in one pass; close it when done."""

    def __init__(self, config: InputConfig) -> None:
        """List the files, in the order in which they will be read; raises InputError where a path leads to none."""
        self.config = config
        self.fields = Fields(config.field or DEFAULT_FIELDS[config.content], config.content, config.domain_field)
        self.files = [] if config.format == "dataset" else find_files(config.paths, config.format)
        self._open: Iterator[Item] = iter(())
        self._next_item = -1
        self._stream_end: int | None = None

    def items(self, start: Place = START) -> Iterator[Item]:
        """Every item from a place on, whatever the limit."""
        if self.config.format == "dataset":
            from kdcache.capture._datasets import read_dataset

            yield from read_dataset(self.config, start, self.fields)
            return
        read = _file_reader(self.config, self.fields)
        for file in range(start.file, len(self.files)):
            yield from read(self.files[file], file, start if file == start.file else Place(file, 0, 0))

    def plan(
        self, output: OutputConfig, *, template_fingerprint: str, observe: Callable[[Iterable[Item]], Iterable[Item]] = iter
    ) -> Plan:
        """The plan of this input: one scan over all items, or none for a stream.

        Args:
            output: how the work is cut.
            template_fingerprint: of the chat template, from the tokenizer's identity.
            observe: wraps the items as they are scanned, as a progress bar does.

        Raises:
            InputError: an item that cannot be read, or nothing to read at all.
        """
        if self.config.streaming:
            return make_stream_plan(config=self.config, template_fingerprint=template_fingerprint, unit_items=output.unit_items)
        plan = make_plan(
            observe(islice(self.items(), self.config.limit)),
            config=self.config,
            template_fingerprint=template_fingerprint,
            unit_chars=output.unit_chars,
            unit_items=output.unit_items,
        )
        if plan.num_items == plan.num_empty_items:
            raise InputError(f"{self.name}: nothing to read: {_count_empty(plan)}")
        return plan

    def read(self, unit: Unit) -> list[Item]:
        """The items of one unit.

        Raises:
            InputError: the items are not the ones that were planned: the input has changed since. A stream without any item.
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
            raise InputError(f"{self.name}: the input has changed since the capture began (unit {unit.number}); run it again")
        return items

    @property
    def name(self) -> str:
        """The input, for messages."""
        return f"dataset {self.config.dataset}" if self.config.dataset else ", ".join(self.config.paths)

    def close(self) -> None:
        """Let go of the file that is open."""
        self._open, self._next_item = iter(()), -1


def _file_reader(config: InputConfig, fields: Fields) -> _ReadFile:
    """The function that reads one file of this format."""
    if config.format in ("parquet", "arrow"):
        from kdcache.capture import table_files

        read = table_files.read_parquet if config.format == "parquet" else table_files.read_arrow
        return partial(read, fields=fields)
    from kdcache.capture import text_files

    if config.format == "jsonl":
        return partial(text_files.read_jsonl, fields=fields)
    return text_files.read_txt if config.format == "txt" else text_files.read_lines


def _count_empty(plan: Plan) -> str:
    return "no items" if plan.num_items == 0 else f"all {plan.num_items} items are empty"
