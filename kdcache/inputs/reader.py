"""The items of an input, from any item on, in an order that depends only on the input.

Policy for items without content (an empty file, a blank line of `lines`, an empty or null cell, a chat without text): they
are counted, reported and skipped. Anything that cannot be read raises an InputError that names file and line.
"""

from __future__ import annotations

from collections.abc import Iterator

from kdcache.config.capture import InputConfig
from kdcache.inputs.content import BEGINNING, DEFAULT_FIELDS, Fields, Item, Start
from kdcache.inputs.files import find_files
from kdcache.inputs.formats.base import FileFormat, InputFile, find_format
from kdcache.inputs.formats.open_file import TextFiles
from kdcache.inputs.left_out import LeftOut


class ItemReader:
    """Reads the items that an InputConfig names. Close it when done.

    Attributes:
        files: in the order in which they are read; none for a dataset.
        left_out: what the input names but does not read.
        num_files_opened: so far; every file before the last of them has been read.
    """

    def __init__(self, config: InputConfig, variables: frozenset[str] = frozenset()) -> None:
        """List the files, in the order in which they will be read.

        Args:
            config: what is read.
            variables: names that the chat template reads; an item's values with these names are reported if they are not used.

        Raises:
            ConfigError: the format does not hold what the config asks for.
            InputError: a path that leads to no file.
        """
        self.config = config
        field = config.field or DEFAULT_FIELDS[config.content]
        self.fields = Fields(
            field, config.content, config.domain_field, variables, is_named=config.field is not None,
            group=config.group_field, preference=config.preference_field,
        )  # fmt: skip
        self._format = find_format(config)
        self.files, self.left_out = [], LeftOut()
        if isinstance(self._format, FileFormat):
            self.files, self.left_out = find_files(config.paths, config.format, self._format.endings)
        self.num_files_opened = 0
        self._opener = TextFiles()

    def items(self, start: Start = BEGINNING) -> Iterator[Item]:
        """Yield every item from `start` on, whatever the limit."""
        if not isinstance(self._format, FileFormat):
            yield from self._format.read(self.config, start, self.fields)
            return
        for index in range(start.file_index, len(self.files)):
            file_start = start if index == start.file_index else Start(index, 0, 0)
            is_new, is_empty = index >= self.num_files_opened, True
            self.num_files_opened = max(self.num_files_opened, index + 1)
            for item in self._format.read(InputFile(self.files[index], self.fields, file_start, self._opener)):
                is_empty = False
                yield item
            if is_new and is_empty:
                self.left_out.add("files without any item", [self.files[index]])

    def close(self) -> None:
        """Close the file that is open."""
        self._opener.close()

    @property
    def name(self) -> str:
        """The name of the input, for messages."""
        return f"dataset {self.config.dataset}" if self.config.dataset else ", ".join(self.config.paths)
