"""Pages of the documentation site from the repository's Markdown files: where each goes, and its links led to where it went.

A link to a file that is a page leads to the page. A link to any other file of the repository (code, results) cannot be
followed on the site; its path is shown instead. A link to a file that does not exist is an error.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Mapping
from pathlib import Path

FIXED = {
    "README.md": "index",
    "kdcache/format/README.md": "reference/format",
    "kdcache/GLOSSARY.md": "reference/glossary",
    "kdcache/CHANGELOG.md": "project/changelog",
    ".github/SECURITY.md": "project/security",
    ".github/CONTRIBUTING.md": "project/contributing",
    "benchmarks/README.md": "project/benchmarks",
    "kdcache/docs/README.md": "tutorials/index",
    "kdcache/train/adapters/README.md": "guide/adapters",
}
"""Repository file -> page. Other READMEs under kdcache/ go to guide/, files of kdcache/docs/ to tutorials/."""

ORDER = {
    "guide": [
        "config",
        "capture",
        "inputs",
        "teacher",
        "store",
        "codec",
        "loader",
        "loss",
        "kernels",
        "train",
        "adapters",
        "derive",
        "foreign",
    ],
    "tutorials": [
        *("your_text", "capture-one-node", "capture-slurm", "object-stores", "selection", "temperature", "your-own-trainer"),
        *("huggingface-trainer", "trl", "unsloth", "ms-swift", "axolotl", "llamafactory", "repair", "format", "extending"),
    ],
    "reference": ["api", "cli", "config", "format", "glossary"],
    "project": ["changelog", "contributing", "security", "benchmarks"],
}
"""Section -> its pages in the order of reading; pages that are not named here follow in the alphabet's order."""

INTRODUCTIONS = {
    "guide": "# Guide\n\nHow each part works, what it promises, and why it was built that way.\n",
    "reference": "# Reference\n\nEvery public name, every command, every key of a config, and the format on disk.\n",
    "project": "# Project\n\nWhat changed, how to contribute, what is promised of a stranger's files, and what was measured.\n",
}

_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")
_FENCE = re.compile(r"^( *)(```+|~~~+).*?^\1\2 *$", re.DOTALL | re.MULTILINE)


class LinkError(Exception):
    """A link of a Markdown file leads to nothing in the repository."""


def repository_pages(root: Path) -> dict[str, str]:
    """Repository path of each Markdown file that is on the site -> its page, without suffix."""
    found = {name: page for name, page in FIXED.items() if (root / name).exists()}
    kinds = (".md", ".ipynb")
    for path in sorted(path for path in (root / "kdcache").rglob("*.*") if path.suffix in kinds):
        name = path.relative_to(root).as_posix()
        folder, file = posixpath.split(name)
        if folder == "kdcache/docs":
            found.setdefault(name, f"tutorials/{path.stem}")
        elif file == "README.md":
            found.setdefault(name, "guide/" + folder.removeprefix("kdcache/").replace("/", "-"))
    return found


def write(root: Path, folder: Path, generated: Mapping[str, str]) -> None:
    """Write the pages of the repository and the generated ones (page -> Markdown), and a table of contents for each section.

    Raises:
        LinkError: names every link that leads nowhere.
    """
    pages = repository_pages(root)
    texts = dict(generated)
    wrong: list[str] = []
    for name, page in pages.items():
        texts[page], lost = _with_links(root, name, pages)
        wrong += lost
    if wrong:
        raise LinkError("\n".join(wrong))
    for section in ORDER:
        _add_contents(section, texts)
    texts["index"] += "\n" + _toctree(
        [f"{section}/index" for section in ("tutorials", "guide", "reference", "project")], hidden=True
    )
    for page, text in texts.items():
        path = folder / f"{page}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for image in _images(root, pages):
        target = folder / "files" / image
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((root / image).read_bytes())


def _add_contents(section: str, texts: dict[str, str]) -> None:
    """The section's first page lists the others; a first page of its own is kept, with its list in the sidebar alone."""
    index = f"{section}/index"
    names = [page.partition("/")[2] for page in texts if page.startswith(f"{section}/") and page != index]
    first = [name for name in ORDER[section] if name in names]
    listed = first + sorted(name for name in set(names) - set(first) if not name.startswith("api-"))
    own = texts.get(index)
    texts[index] = (own or INTRODUCTIONS[section]) + "\n" + _toctree(listed, hidden=own is not None)


def _toctree(entries: list[str], *, hidden: bool) -> str:
    options = ":hidden:\n" if hidden else ""
    return "```{toctree}\n:maxdepth: 1\n" + options + "\n" + "\n".join(entries) + "\n```\n"


def markdown_of(path: Path) -> str:
    """The text of a Markdown file, or a notebook's cells one after the other."""
    if path.suffix != ".ipynb":
        return path.read_text("utf-8")
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(path.read_text("utf-8"))["cells"]]
    return "\n\n".join(text if kind == "markdown" else f"```python\n{text}\n```" for kind, text in cells) + "\n"


def links(text: str) -> list[str]:
    """Targets of the links and images outside of code, in order."""
    return [match[3] for part, is_code in _parts(text) if not is_code for match in _LINK.finditer(part)]


def _parts(text: str) -> list[tuple[str, bool]]:
    """The text in pieces: (piece, whether it is a block of code)."""
    pieces, end = [], 0
    for fence in _FENCE.finditer(text):
        pieces += [(text[end : fence.start()], False), (fence[0], True)]
        end = fence.end()
    return [*pieces, (text[end:], False)]


def _with_links(root: Path, name: str, pages: Mapping[str, str]) -> tuple[str, list[str]]:
    """A file's text as its page has it, and one line for each link that leads nowhere."""
    wrong: list[str] = []

    def led(match: re.Match[str]) -> str:
        image, words, target = match.groups()
        if re.match(r"[a-z]+:|#", target):
            return match[0]
        path, hash_, anchor = target.partition("#")
        file = posixpath.normpath(posixpath.join(posixpath.dirname(name), path))
        up = "../" * pages[name].count("/")
        if file in pages:
            return f"{image}[{words}]({up}{pages[file]}.md{hash_}{anchor})"
        if not (root / file).exists():
            wrong.append(f"{name}: [{words}]({target}): there is no {file}")
        if image:
            return f"![{words}]({up}files/{file})"
        return words if f"`{file}`" == words or words.strip("`") == posixpath.basename(file) else f"{words} (`{file}`)"

    parts = _parts(markdown_of(root / name))
    return "".join(part if is_code else _LINK.sub(led, part) for part, is_code in parts), wrong


def _images(root: Path, pages: Mapping[str, str]) -> set[str]:
    found = set()
    for name in pages:
        for part, is_code in _parts(markdown_of(root / name)):
            found |= {
                posixpath.normpath(posixpath.join(posixpath.dirname(name), match[3]))
                for match in _LINK.finditer(part)
                if match[1] and not is_code and ":" not in match[3]
            }
    return found
