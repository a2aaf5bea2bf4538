"""What a format of input is, and how one is found by the name that `input.format` gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from kdcache import extensions
from kdcache.config.capture import InputConfig
from kdcache.errors import ConfigError
from kdcache.inputs.content import BEGINNING, Fields, Item, Start
from kdcache.inputs.formats.open_file import TextFiles

COMPRESSED = (".gz", ".zst")


@dataclass(frozen=True)
class InputFile:
    """One file of an input, and what to read of it.

    Attributes:
        path: as the user would write it.
        fields: what is read of an item.
        start: the item to begin with; its `file_index` is this file's own.
        opener: opens text files, decompressed; keeps the compressed one that was read last.
    """

    path: str
    fields: Fields
    start: Start = BEGINNING
    opener: TextFiles = field(default_factory=TextFiles)


@dataclass(frozen=True)
class FileFormat:
    """A format whose items lie in files, which `input.paths` names.

    Attributes:
        read: yields the items of one file from its `start` on; raises InputError with file and line for what cannot be read.
        endings: lower case, as `.jsonl`; folders are searched for them. A file that is named itself may end as it likes.
        has_fields: whether an item is a field of an item, which the config names; else it is text.
    """

    read: Callable[[InputFile], Iterator[Item]]
    endings: tuple[str, ...]
    has_fields: bool = True


@dataclass(frozen=True)
class SourceFormat:
    """A format whose items do not lie in files that the config names.

    Attributes:
        read: yields the items from a start on, of what the config names; raises InputError for what cannot be read.
    """

    read: Callable[[InputConfig, Start, Fields], Iterator[Item]]


def find_format(config: InputConfig) -> FileFormat | SourceFormat:
    """Find the format that a config names, and check that it has what the config asks of it.

    Raises:
        ConfigError: the format does not exist, or has no fields although the config names some.
    """
    found = extensions.find("inputs", config.format)
    if not isinstance(found, (FileFormat, SourceFormat)):
        raise ConfigError(
            f"input.format {config.format!r} is a {type(found).__name__}, expected a FileFormat or a SourceFormat; mend "
            "the package that brings it"
        )
    if isinstance(found, FileFormat) and not found.has_fields:
        if config.content != "text":
            raise ConfigError(f"input.format {config.format!r} holds content 'text', not {config.content!r}")
        for name in ("domain_field", "group_field", "preference_field"):
            if getattr(config, name) is not None:
                asked = f"input.{name} {getattr(config, name)!r}"
                raise ConfigError(f"input.format {config.format!r} has no fields, so it cannot have {asked}")
    return found


def also_compressed(*endings: str) -> tuple[str, ...]:
    """The endings, and the same followed by `.gz` and `.zst`."""
    return tuple(f"{ending}{packed}" for ending in endings for packed in ("", *COMPRESSED))
