"""Progress bars that suit where they are shown: one line that is overwritten on a terminal, a line now and then in a file."""

from __future__ import annotations

import sys
from typing import Any, TextIO

from kdcache.shown import shown

SECONDS_BETWEEN_LINES = 60.0
"""Between two states of a bar that goes to a file or a pipe, where none is overwritten."""


def bar_options(**options: Any) -> dict[str, Any]:
    """The arguments of a `tqdm` on stderr, with what the place needs; `options` are tqdm's own."""
    if "desc" in options:
        options["desc"] = shown(options["desc"], 100)
    if sys.stderr.isatty():
        return {"file": sys.stderr, **options}
    lines = {"file": _Lines(sys.stderr), "mininterval": SECONDS_BETWEEN_LINES, "maxinterval": SECONDS_BETWEEN_LINES}
    return {**lines, **options, "dynamic_ncols": False, "ncols": 100}


class _Lines:
    """A file for tqdm, in which each state of a bar is a line of its own, and what would wipe one out is left out."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, text: str) -> None:
        line = text.replace("\r", "").strip()
        if line:
            self._file.write(line + "\n")

    def flush(self) -> None:
        self._file.flush()
