"""The items of an input, in an order that depends on the input alone, from any item on.

Policy for items without content (an empty file, a blank line of `lines`, an empty or null cell, a chat without text): they
are counted, reported and skipped; they give no sequence. Anything that cannot be read is an InputError naming file and line.
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
    """The items behind an InputConfig. Close it when done.

    Attributes:
        files: in the order in which they are read; none for a dataset.
        left_out: what the input names and is not read.
        num_files_opened: up to now; all files before that one are read.
    """

    def __init__(self, config: InputConfig, variables: frozenset[str] = frozenset()) -> None:
        """List the files, in the order in which they will be read.

        Args:
            config: what is read.
            variables: names that the chat template reads; a row's values of these names are not passed over in silence.

        Raises:
            ConfigError: the format does not hold what the config asks for.
            InputError: a path that leads to no file.
        """
        self.config = config
        field = config.field or DEFAULT_FIELDS[config.content]
        self.fields = Fields(field, config.content, config.domain_field, variables, is_named=config.field is not None)
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
        """Let go of the file that is open."""
        self._opener.close()

    @property
    def name(self) -> str:
        """The input, for messages."""
        return f"dataset {self.config.dataset}" if self.config.dataset else ", ".join(self.config.paths)
