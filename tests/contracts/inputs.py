"""What every input format promises (see kdcache/inputs/formats/base.py): one function per promise, run for each format."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from kdcache.config.capture import InputConfig
from kdcache.errors import InputError
from kdcache.inputs.content import Item
from kdcache.inputs.reader import ItemReader

TEXTS = ["one", "two and more", "", "drei \u00fc \U0001f642", "five"]


@dataclass(frozen=True)
class InputCase:
    """A format, and how a test writes it.

    Attributes:
        write: writes texts as one file; of a format with one item per file, the first text alone.
        damaged: bytes that are not of this format; None where any bytes are.
    """

    name: str
    ending: str
    write: Callable[[Path, list[str]], None]
    damaged: bytes | None
    one_item: bool = False

    def expected(self) -> list[str]:
        return TEXTS[:1] if self.one_item else TEXTS

    def reader(self, *paths: Path) -> ItemReader:
        return ItemReader(InputConfig(format=self.name, paths=tuple(map(str, paths))))


def items_of(reader: ItemReader, *start: object) -> list[Item]:
    with closing(reader):
        return list(reader.items(*start))


def items_come_in_the_order_of_the_files_and_in_theirs(case: InputCase, folder: Path) -> None:
    for name in ("b", "a"):
        case.write(folder / f"{name}{case.ending}", TEXTS)
    items = items_of(case.reader(folder))
    assert [item.content for item in items] == case.expected() * 2
    assert [item.start.file_index for item in items] == [0] * len(case.expected()) + [1] * len(case.expected())
    assert all(Path(item.source.split("#")[0].split(":")[0]).name[0] == "ab"[item.start.file_index] for item in items)


def reading_from_any_item_gives_the_rest(case: InputCase, folder: Path) -> None:
    for name in ("a", "b"):
        case.write(folder / f"{name}{case.ending}", TEXTS)
    items = items_of(case.reader(folder))
    for index, item in enumerate(items):
        assert items_of(case.reader(folder), item.start) == items[index:]


def starts_differ_and_sources_name_one_item(case: InputCase, folder: Path) -> None:
    case.write(folder / f"a{case.ending}", TEXTS)
    items = items_of(case.reader(folder))
    assert len({item.start for item in items}) == len({item.source for item in items}) == len(items)


def a_folder_is_searched_for_its_endings_alone(case: InputCase, folder: Path) -> None:
    case.write(folder / f"a{case.ending}", TEXTS)
    (folder / "notes.else").write_text("not of this format")
    reader = case.reader(folder)
    assert [Path(path).name for path in reader.files] == [f"a{case.ending}"]
    assert "notes.else" in str(reader.left_out)


def a_damaged_file_is_named(case: InputCase, folder: Path) -> None:
    if case.damaged is None:
        return
    (folder / f"bad{case.ending}").write_bytes(case.damaged)
    with pytest.raises(InputError, match=r"bad"):
        items_of(case.reader(folder))


PROMISES = (
    items_come_in_the_order_of_the_files_and_in_theirs,
    reading_from_any_item_gives_the_rest,
    starts_differ_and_sources_name_one_item,
    a_folder_is_searched_for_its_endings_alone,
    a_damaged_file_is_named,
)
