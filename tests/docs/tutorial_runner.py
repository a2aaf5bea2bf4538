"""Runs the code blocks of a tutorial in order, in one folder, as its reader would.

- A `yaml`, `python` or `sh` block that begins with a comment of nothing but a file name is written to that file.
- Other `python` blocks run in one namespace. Other `sh` blocks run line by line: `kdcache ...` in this process, the rest in
  bash. A comment `# exit status 1` at the end of a line says what is expected.
- `<!-- not run: why -->` in the line before a block leaves it out.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdcache.cli.main import main

_BLOCK = re.compile(r"(?:<!-- (?P<note>(?:(?!-->).)*) -->\n)?^```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE)
_FILE = re.compile(r"# (\S+\.\w+)\n")
_STATUS = re.compile(r"\s+# exit status (\d+)$")
RUN = ("python", "sh", "yaml")


@dataclass(frozen=True)
class Block:
    """One code block: what its fence says, its text, and the comment before it."""

    kind: str
    text: str
    note: str

    @property
    def is_run(self) -> bool:
        return self.kind in RUN and not self.note.startswith("not run: ")


def blocks_of(markdown: str) -> list[Block]:
    """The code blocks of a page, in order."""
    return [Block(found["kind"], found["text"], found["note"] or "") for found in _BLOCK.finditer(markdown)]


class Tutorial:
    """A page being run.

    Args:
        path: the page.
        names: what the Python blocks find defined, beside what they define.
        instead: texts that are replaced before a block runs, such as the name of a large model by the folder of a tiny one.
    """

    def __init__(self, path: Path, names: Mapping[str, Any] = {}, instead: Mapping[str, str] = {}) -> None:
        self.path, self.names, self._instead = path, dict(names), instead

    def run(self) -> dict[str, Any]:
        """Run every block in the working directory; what Python's blocks have defined."""
        for block in blocks_of(self.path.read_text("utf-8")):
            if block.is_run:
                self._run(block, self._replaced(block.text))
        return self.names

    def _replaced(self, text: str) -> str:
        for old, new in self._instead.items():
            text = text.replace(old, new)
        return text

    def _run(self, block: Block, text: str) -> None:
        name = _FILE.match(text)
        if name is not None:
            Path(name[1]).write_text(text)
        elif block.kind == "python":
            exec(compile(text, str(self.path), "exec"), self.names)
        elif block.kind == "sh":
            for line in re.sub(r"\\\n", " ", text).splitlines():
                _run_line(line)
        else:
            raise AssertionError(f"{self.path.name}: a block of YAML that does not begin with '# its-file.yaml'")


def _run_line(line: str) -> None:
    found = _STATUS.search(line)
    expected = int(found[1]) if found else 0
    words = shlex.split(line, comments=True)
    if not words:
        return
    if words[0] == "kdcache" and not {"|", ">", "&&", "||", ";"} & set(words):
        status = main(words[1:])
    else:
        status = subprocess.run(["bash", "-euo", "pipefail", "-c", line], check=False).returncode
    assert status == expected, f"exit status {status} of: {line}"
