"""Every word of `kdcache/GLOSSARY.md` keeps its one meaning, and the English keeps to the rules of the house.

`python tests/test_words.py kdcache/loss` lists what it finds there.
"""

import argparse
import ast
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import pytest

from kdcache.cli.main import COMMANDS
from kdcache.config.capture import CaptureConfig
from kdcache.config.describe import describe_fields
from kdcache.config.train import TrainConfig

ROOT = Path(__file__).parent.parent
PACKAGES = sorted(path.name for path in (ROOT / "kdcache").iterdir() if (path / "__init__.py").is_file())
MODULES = sorted(path.name for path in (ROOT / "kdcache").glob("*.py") if not path.name.startswith("__"))
PROSE = [
    ROOT / "README.md", *sorted((ROOT / ".github").rglob("*.md")), *sorted((ROOT / "configs").iterdir()),
    *sorted((ROOT / "kdcache").glob("*.md")), *sorted((ROOT / "kdcache/docs").glob("*.md")),
]  # fmt: skip

PENDING = ""
"""What has not been brought to the glossary's words yet; its test may fail. Take a name out when it does not."""

LETTERS = "BTPCKEVWHNSGLFD"
"""Of the glossary's legend; digits are literal sizes."""

FORBIDDEN = {
    "row": "a packed row of a batch, in loader and train; a shard has sequences, a loss positions, a file items, a table lines",
    "place": "gone: offset, address, slot or rank; put, copy",
    "number": "a count, as num_*; what points is an index",
    "label": "target id; labels only at the Hugging Face border",
    "dataset": "only of Hugging Face's library; a cache is a cache",
    "job": "one capture; a derivation, a task",
    "tally": "counts of a capture; elsewhere counts",
    "plan": "of a capture; the loader has a layout",
    "window": "a stretch of tokens of one text; the loader has a packing buffer, local shards",
    "checksum": "digest (bytes) or fingerprint (meaning)",
}
"""Word of an identifier, file, key or flag (plurals too) -> what it is for."""

ONLY_IN = {"plan": ("kdcache/loader",), "window": ("kdcache/loader",)}
"""Words that are forbidden in these packages alone."""

ALLOWED = {
    ("kdcache/loader", "row"): "a packed row of a batch",
    ("kdcache/public_api", "row"): "a packed row of a batch",
    ("kdcache/train", "row"): "a packed row of a batch",
    ("kdcache/train/adapters", "label"): "transformers' own argument",
    ("kdcache/train/adapters", "dataset"): "of Hugging Face's library",
    ("kdcache/inputs", "dataset"): "of Hugging Face's library",
    ("kdcache/config/capture.py", "dataset"): "input.dataset, of Hugging Face's library",
    ("kdcache/config/loader.py", "row"): "a packed row of a batch",
    ("configs/train-", "row"): "a packed row of a batch",
    ("kdcache/docs", "row"): "a packed row of a batch, in the trainers' tutorials",
    ("kdcache/config/yaml_text.py", "number"): "a number in YAML",
    ("kdcache/capture", "job"): "one capture",
    ("kdcache/capture", "tally"): "counts of a capture",
    ("kdcache/format", "number"): "a manifest's number, part of the format",
    ("kdcache/store", "number"): "a manifest's number, part of the format",
}
"""(path, word) -> why it may stand there."""

OLD_NAMES = {
    "batch_tokens", "chunk_size", "positions_per_chunk", "pack_window", "window_shards", "window_bytes", "rows_P", "labels_P",
    "labels_BT", "NO_LABEL", "TargetTensors", "Targets", "accept_incomplete", "skip_poison", "config_from",
}  # fmt: skip

PHRASES = {
    r"\b(is|are|was|were|there's) no (?!longer|more|less|fewer|better|worse|later|earlier|larger|smaller)": "is not, has no",
    r"\bbehind\b": "after",
    r"\bbeside\b": "next to, alongside, besides",
    r"\banew\b": "again",
    r"\bso (many|much|few)\b(?! (as|that))": "this many",
    r"\b(go|goes|went|gone|going) on with\b": "resume, continue",
    r"\bsaid so\b": "reported",
    r"\bsecond best\b": "fall back",
    r"\bof which (this|it) holds\b": "for which it is true",
    r"\bgradient by\b": "gradient with respect to",
    "\u2014": "a colon, a comma or two sentences",
}

IDIOMS = re.compile(
    r"\bin[- ]place\b|\b(takes?|taking|took) place\b|\bin the first place\b|\bin places\b|`row`|\brow groups?\b"
)
"""Also `row` as code, a column of a cache's index, and Parquet's row groups."""


class Finding(NamedTuple):
    """One forbidden use."""

    path: str
    line: int
    what: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.what}"


def words_of(identifier: str) -> list[str]:
    """`numRows_BT`, `num_rows_BT` or `NUM_ROWS` -> num, row; without the shape and the plural's s."""
    name = re.sub(r"_[A-Z0-9]+$", "", identifier) if not identifier.isupper() else identifier
    parts = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)
    return [part.lower().removesuffix("s") for part in parts]


def letters_of(identifier: str) -> str:
    """The letters of an identifier's shape suffix that the legend does not have."""
    suffix = re.search(r"[a-z0-9]_([A-Z0-9]+)$", identifier)
    return "" if suffix is None else re.sub(rf"[{LETTERS}0-9]", "", suffix[1])


def identifiers(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, name) of what the module itself names: definitions, arguments, assigned names and attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr


def sentences(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, text) of docstrings and messages: strings of more than one word."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value.strip():
            yield node.lineno, node.value


def wrong_words(path: str, line: int, name: str) -> Iterator[Finding]:
    """What is wrong with one identifier."""
    if name in OLD_NAMES:
        yield Finding(path, line, f"{name} has another name now")
    for word in words_of(name):
        if word in FORBIDDEN and is_forbidden(path, word):
            yield Finding(path, line, f"{name}: {word} is {FORBIDDEN[word]}")
    if letters_of(name):
        yield Finding(path, line, f"{name}: {letters_of(name)} is not in the legend of kdcache/GLOSSARY.md")
    if name.endswith("Options") and name != "Options":
        yield Finding(path, line, f"{name}: what a user asks for is a Config")


def is_forbidden(path: str, word: str) -> bool:
    """Whether a word may not be used in this file."""
    if word in ONLY_IN:
        return any(path.startswith(package) for package in ONLY_IN[word])
    return not any(path.startswith(prefix) and word == allowed for prefix, allowed in ALLOWED)


def wrong_phrases(path: str, line: int, text: str) -> Iterator[Finding]:
    """Forbidden English, and the words that prose bends most: row and place."""
    for pattern, better in PHRASES.items():
        for found in re.finditer(pattern, text):
            yield Finding(path, line + text.count("\n", 0, found.start()), f"{found[0].strip()!r}: {better}")
    for found in re.finditer(r"\b(row|place)s?\b", IDIOMS.sub(lambda idiom: " " * len(idiom[0]), text)):
        if is_forbidden(path, found[1]):
            yield Finding(path, line + text.count("\n", 0, found.start()), f"{found[0]!r}: {FORBIDDEN[found[1]]}")


def wrong_in_module(file: Path) -> Iterator[Finding]:
    """What is wrong in one Python file: its name, its identifiers, its docstrings and messages."""
    path, tree = str(file.relative_to(ROOT)), ast.parse(file.read_text())
    yield from wrong_words(path, 0, file.stem)
    for line, name in identifiers(tree):
        yield from wrong_words(path, line, name)
    for line, text in sentences(tree):
        yield from wrong_phrases(path, line, text)


def wrong_in(folder: Path) -> list[Finding]:
    """What is wrong under a folder or in a file."""
    files = [folder] if folder.is_file() else sorted(folder.rglob("*"))
    found: set[Finding] = set()
    for file in files:
        if file.suffix == ".py":
            found.update(wrong_in_module(file))
        elif file.suffix in (".md", ".yaml", ".sh"):
            found.update(wrong_phrases(str(file.relative_to(ROOT)), 1, file.read_text()))
    return sorted(found)


def wrong_in_prose() -> list[Finding]:
    """What is wrong in README, glossary, changelog and the example configs."""
    files = [path for path in PROSE if path.name != "GLOSSARY.md"]
    return [finding for path in files for finding in wrong_in(path)]


def wrong_in_interface() -> list[Finding]:
    """What is wrong in config keys, flags and their help."""
    found: list[Finding] = []
    for root, file in ((CaptureConfig, "capture"), (TrainConfig, "train")):
        for field in describe_fields(root):
            path = "kdcache/config/loader.py" if field.path.startswith("loader.") else f"kdcache/config/{file}.py"
            found += [f for name in field.path.split(".") for f in wrong_words(path, 0, name)]
            found += wrong_phrases(path, 0, field.text)
    for command, (module, text) in COMMANDS.items():
        parser = argparse.ArgumentParser(description=text)
        import_module(f"kdcache.cli.commands.{module}").add_arguments(parser)
        for action in parser._actions:
            names = [flag.lstrip("-").replace("-", "_") for flag in action.option_strings] or [action.dest]
            found += [f for name in names for f in wrong_words(f"kdcache {command}", 0, name)]
            found += wrong_phrases(f"kdcache {command}", 0, action.help or "")
    return found


def wrong_in_public_names() -> list[Finding]:
    """What is wrong in the names of the public API: functions, classes, methods and their parameters."""
    found: list[Finding] = []
    for line, text in enumerate((ROOT / "tests/public_api.txt").read_text().splitlines(), 1):
        if re.match(r"class (Manifest|\w+Info|\w+Config)\(", text):
            continue  # keys of the format on disk; keys of configs have a test of their own
        names = re.findall(r"\b[A-Za-z_]\w*(?=[:(]| -> |$)", text)
        found += [f for name in names for f in wrong_words("kdcache/public_api", line, name)]
    return found


def pending(name: str) -> object:
    """The parameter of a test, which may fail as long as its package is pending."""
    return pytest.param(name, marks=pytest.mark.xfail(reason="pending") if name in PENDING.split() else ())


def report(found: list[Finding]) -> str:
    """The first findings, one to a line."""
    return "\n".join([f"{len(found)} findings:", *map(str, found[:40])])


@pytest.mark.parametrize("name", [pending(name) for name in PACKAGES] + MODULES)
def test_a_package_uses_each_word_in_its_one_meaning(name):
    found = wrong_in(ROOT / "kdcache" / name)
    assert not found, report(found)


@pytest.mark.parametrize("name", [pending("prose")])
def test_readme_and_configs_use_each_word_in_its_one_meaning(name):
    found = wrong_in_prose()
    assert not found, report(found)


@pytest.mark.parametrize("name", [pending("public")])
def test_public_names_use_each_word_in_its_one_meaning(name):
    found = wrong_in_public_names()
    assert not found, report(found)


@pytest.mark.parametrize("name", [pending("interface")])
def test_keys_and_flags_use_each_word_in_its_one_meaning(name):
    found = wrong_in_interface()
    assert not found, report(found)


def test_a_forbidden_use_is_found():
    source = '"""The rows anew."""\ndef labels_of(place_PQ, batch_tokens): ...\nclass ReadOptions: ...\n'
    tree = ast.parse(source)
    found = [str(f) for line, name in identifiers(tree) for f in wrong_words("kdcache/codec/x.py", line, name)]
    found += [str(f) for line, text in sentences(tree) for f in wrong_phrases("kdcache/codec/x.py", line, text)]
    for part in ("labels_of: label", "place_PQ: place", "Q is not in the legend", "batch_tokens has another", "ReadOptions"):
        assert any(part in finding for finding in found), part
    assert sum("anew" in finding or "'rows'" in finding for finding in found) == 2


if __name__ == "__main__":
    wrong = [finding for folder in sys.argv[1:] or ["kdcache"] for finding in wrong_in(ROOT / folder)]
    print("\n".join(map(str, wrong)))
    raise SystemExit(bool(wrong))
