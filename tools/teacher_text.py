"""Real text that every machine has, and its division into what the teacher reads, what it is asked about, and what judges.

The division is by a hash of a document's name: the same on every run, and a document added moves no other.
"""

from __future__ import annotations

import hashlib
import json
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Split = Literal["train", "heldback", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "heldback", "heldout")
HELDBACK_PERCENT, HELDOUT_PERCENT = 15, 5

# Test suites are half of some Pythons' library and missing from others. The files of encodings are nearly one table a hundred
# times: held out, they would be known by heart.
SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "__pycache__"})


class TextError(Exception):
    """The text cannot be used; the message is for the user."""


@dataclass(frozen=True)
class Document:
    """One text and the name it is known by, which decides its split."""

    source: str
    text: str


def split_of(source: str) -> Split:
    """Which split a document belongs to."""
    percent = int.from_bytes(hashlib.sha256(source.encode()).digest()[:8], "big") % 100
    if percent < HELDOUT_PERCENT:
        return "heldout"
    return "heldback" if percent < HELDOUT_PERCENT + HELDBACK_PERCENT else "train"


def standard_library() -> list[Document]:
    """The running Python's own sources: about 10 MB with its docstrings."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = (path for path in root.rglob("*.py") if SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts))
    return unique(document for path in sorted(files) for document in read_file(path, root))


def user_text(paths: Iterable[Path]) -> list[Document]:
    """Documents of the files named, and of every file in the folders named that is UTF-8 text.

    Raises:
        TextError: a path that does not exist.
    """
    documents: list[Document] = []
    for path in paths:
        if not path.exists():
            raise TextError(f"--text: {path} does not exist")
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        root = path if path.is_dir() else path.parent
        documents.extend(document for file in files for document in read_file(file, root))
    return unique(documents)


def read_file(path: Path, root: Path) -> Iterator[Document]:
    """The documents of a file: one, or one per line of a .jsonl with a `text`; none where it is not UTF-8 text.

    Raises:
        TextError: a line of a .jsonl that holds no text.
    """
    source = path.relative_to(root).as_posix()
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return
    if "\0" in text:
        return
    if path.suffix != ".jsonl":
        yield Document(source, text)
        return
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            yield Document(f"{source}:{number}", str(json.loads(line)["text"]))
        except (ValueError, KeyError, TypeError) as error:
            raise TextError(f"{path}: line {number} is not a JSON object with a `text`") from error


def unique(documents: Iterable[Document]) -> list[Document]:
    """The documents that are not blank, each text once."""
    by_digest = {hashlib.sha256(document.text.encode()).digest(): document for document in documents if document.text.strip()}
    return list(by_digest.values())


def split_documents(documents: Iterable[Document]) -> dict[Split, list[Document]]:
    """The documents by split, in their order.

    Raises:
        TextError: a split is empty.
    """
    splits: dict[Split, list[Document]] = {name: [] for name in SPLITS}
    for document in documents:
        splits[split_of(document.source)].append(document)
    empty = [name for name in SPLITS if not splits[name]]
    if empty:
        num_documents = sum(map(len, splits.values()))
        raise TextError(
            f"the text has {num_documents} documents, and none of them falls into {' or '.join(empty)}; documents are divided "
            "by their names, so give more of them (a .jsonl holds one per line)"
        )
    return splits


def write_jsonl(documents: Iterable[Document], path: Path) -> None:
    """One JSON object per line: {"text": ..., "source": ...}."""
    with path.open("w", encoding="utf-8") as file:
        for document in documents:
            file.write(json.dumps({"text": document.text, "source": document.source}, ensure_ascii=False) + "\n")
