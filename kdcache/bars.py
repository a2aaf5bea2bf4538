"""Progress bars for terminals and files: one line that is overwritten, or a new line from time to time."""

from __future__ import annotations

import sys
from typing import Any, TextIO

from kdcache.shown import shown

SECONDS_BETWEEN_LINES = 60.0
"""Between two states of a bar that goes to a file or a pipe."""


def bar_options(**options: Any) -> dict[str, Any]:
    """Arguments for a `tqdm` on stderr that suit a terminal or a file; `options` are tqdm's own."""
    if "desc" in options:
        options["desc"] = shown(options["desc"], 100)
    if sys.stderr.isatty():
        return {"file": sys.stderr, **options}
    lines = {"file": _Lines(sys.stderr), "mininterval": SECONDS_BETWEEN_LINES, "maxinterval": SECONDS_BETWEEN_LINES}
    return {**lines, **options, "dynamic_ncols": False, "ncols": 100}


class _Lines:
    """A file for tqdm that gets one line per state of the bar, without the characters that erase a line."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, text: str) -> None:
        line = text.replace("\r", "").strip()
        if line:
            self._file.write(line + "\n")

    def flush(self) -> None:
        self._file.flush()
