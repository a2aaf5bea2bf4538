"""The reference pages of the documentation site: the public names, the commands, the keys of the configs."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from types import FunctionType
from typing import Any

import msgspec
from docs_markdown import cell, docstring, first_sentence

import kdcache
from kdcache.cli.main import COMMANDS, main
from kdcache.config.capture import CaptureConfig
from kdcache.config.describe import FieldDescription, describe_fields
from kdcache.config.train import TrainConfig

GROUPS = {
    "caches": ("Caches", ("store", "format")),
    "loading": ("Loading", ("loader",)),
    "losses": ("Losses", ("loss", "kernels")),
    "capturing": ("Capturing, training, checking", ("teacher", "capture", "train", "derive", "foreign")),
    "configs": ("Configs", ("config",)),
    "errors": ("Errors", ("errors",)),
}
"""Page -> its title, and the packages whose public names it describes."""

_SHOWN_SPECIAL = ("__len__", "__getitem__", "__iter__", "__call__")


def pages() -> dict[str, str]:
    """Page -> Markdown."""
    names = {name: getattr(kdcache, name) for name in sorted(kdcache.__all__) if name != "__version__"}
    grouped = {group: [name for name in names if _group(names[name]) == group] for group in GROUPS}
    known = {name: f"api-{group}.md#{_anchor(name)}" for group, listed in grouped.items() for name in listed}
    made = {f"reference/api-{group}": _api_page(group, listed, known) for group, listed in grouped.items() if listed}
    made["reference/api"] = _api_index(grouped)
    made["reference/cli"] = _cli_page()
    made["reference/config"] = _config_page()
    return made


def _group(value: Any) -> str:
    room = value.__module__.split(".")[1]
    return next((group for group, (_, rooms) in GROUPS.items() if room in rooms), "caches")


def _anchor(name: str) -> str:
    return f"kdcache-{name}".lower().replace("_", "-")


def _api_index(grouped: Mapping[str, list[str]]) -> str:
    parts = [
        "# Python\n",
        "Everything below is imported from `kdcache`. `import kdcache` loads nothing heavy: what a name needs is loaded when "
        "the name is first used.\n",
    ]
    for group, listed in grouped.items():
        if listed:
            lines = [f"| [`{n}`](api-{group}.md#{_anchor(n)}) | {cell(first_sentence(getattr(kdcache, n)))} |" for n in listed]
            parts.append(f"## {GROUPS[group][0]}\n\n| name | |\n|---|---|\n" + "\n".join(lines) + "\n")
    shown = [f"api-{group}" for group, listed in grouped.items() if listed]
    parts.append("```{toctree}\n:hidden:\n\n" + "\n".join(shown) + "\n```\n")
    return "\n".join(parts)


def _api_page(group: str, listed: list[str], known: Mapping[str, str]) -> str:
    return f"# {GROUPS[group][0]}\n\n" + "\n".join(_described(name, getattr(kdcache, name), known) for name in listed)


def _described(name: str, value: Any, known: Mapping[str, str]) -> str:
    head = f"({_anchor(name)})=\n\n## {name}\n\n"
    if not inspect.isclass(value):
        return head + _directive("function", f"kdcache.{name}{_signature(value)}", docstring(value, known))
    if issubclass(value, BaseException):
        return head + _directive("exception", f"kdcache.{name}", docstring(value, known) + _ancestors(value, known))
    if issubclass(value, msgspec.Struct):
        body = docstring(value, known, skip=("Attributes",)) + "\n" + _keys(value)
        return head + _directive("class", f"kdcache.{name}", body + _members(value, known))
    shown = "" if _made_elsewhere(value) else _signature(value)
    return head + _directive("class", f"kdcache.{name}{shown}", docstring(value, known) + "\n" + _members(value, known))


def _made_elsewhere(kind: type) -> bool:
    """Whether a class is not made by calling it: a protocol."""
    return bool(getattr(kind, "_is_protocol", False))


def _ancestors(kind: type, known: Mapping[str, str]) -> str:
    parent = kind.__mro__[1].__name__
    return f"\nA kind of {f'[`{parent}`]({known[parent]})' if parent in known else f'`{parent}`'}.\n"


def _members(kind: type, known: Mapping[str, str]) -> str:
    return "\n".join(_member(name, member, known) for name, member in _own(kind))


def _own(kind: type) -> Iterator[tuple[str, Any]]:
    for name, member in vars(kind).items():
        is_shown = not name.startswith("_") or name in _SHOWN_SPECIAL
        kinds = (property, cached_property, classmethod, staticmethod, FunctionType)
        if is_shown and isinstance(member, kinds) and inspect.getdoc(member):
            yield name, member


def _member(name: str, member: Any, known: Mapping[str, str]) -> str:
    if isinstance(member, property | cached_property):
        getter: Any = member.fget if isinstance(member, property) else member.func
        kind = _plain(str(inspect.signature(getter).return_annotation))
        return _directive("property", name, docstring(member, known), options={"type": kind}, depth=4)
    role = {classmethod: "classmethod", staticmethod: "staticmethod"}.get(type(member), "method")
    function = member.__func__ if isinstance(member, classmethod | staticmethod) else member
    shown = _signature(function, bound=not isinstance(member, staticmethod))
    return _directive(role, f"{name}{shown}", docstring(function, known), depth=4)


def _directive(kind: str, head: str, body: str, *, options: Mapping[str, str] = {}, depth: int = 6) -> str:
    fence = ":" * depth
    lines = [f":{name}: {value}" for name, value in options.items()]
    return "\n".join([f"{fence}{{py:{kind}}} {head}", *lines, "", body.rstrip(), fence, ""])


def _signature(value: Any, *, bound: bool = False) -> str:
    """As a reader writes the call: no `self`, defaults short, types without their modules."""
    signature = inspect.signature(value)
    given = list(signature.parameters.values())[1 if bound else 0 :]
    shown = [one.replace(default=_Default(one.default)) if one.default is not one.empty else one for one in given]
    returns = signature.return_annotation if signature.return_annotation not in (None, "None") else inspect.Signature.empty
    return _plain(str(inspect.Signature(shown, return_annotation=returns)))


class _Default:
    """A default as source text: a config with its own defaults is shown as `Name()`."""

    def __init__(self, value: Any) -> None:
        is_config = isinstance(value, msgspec.Struct) or dataclasses.is_dataclass(value)
        self._text = f"{type(value).__name__}()" if is_config else repr(value)

    def __repr__(self) -> str:
        return "..." if "<" in self._text else self._text


def _plain(text: str) -> str:
    text = re.sub(
        r"\b(?:kdcache|numpy|typing|torch|collections|os|np|pathlib)\.(?:[a-z_]+\.)*(?=[A-Za-z])", "", text.replace("'", "")
    )
    return re.sub(r"NDArray\[(\w+)\]", r"NDArray[\1]", text)


def _keys(config_type: type[msgspec.Struct]) -> str:
    """A table of the keys of a config, those of its sections included."""
    return _table(describe_fields(config_type))


def _table(fields: Iterable[FieldDescription]) -> str:
    lines = [f"| `{one.path}` | {_default(one.default)} | {cell(one.text)}<br>*{cell(one.type)}* |" for one in fields]
    return "| key | default | |\n|---|---|---|\n" + "\n".join(lines) + "\n\n"


def _default(default: str | None) -> str:
    return "required" if default is None else f"`{default}`" if default else "none"


def _config_page() -> str:
    parts = [
        "# Configs\n",
        "The keys of the YAML files. `--set section.key=value` sets one on the command line. Unknown keys are refused.\n",
    ]
    for title, config_type in (("capture", CaptureConfig), ("train", TrainConfig)):
        parts.append(f"## kdcache {title}\n\n{docstring(config_type, skip=('Attributes',))}")
        sections: dict[str, list[FieldDescription]] = {}
        for field in describe_fields(config_type):
            sections.setdefault(field.path.rpartition(".")[0].partition(".")[0], []).append(field)
        parts += [f"### {title}: {section or 'top level'}\n\n{_table(fields)}" for section, fields in sections.items()]
    return "\n".join(parts)


def _cli_page() -> str:
    parts = [
        "# Commands\n",
        "What `kdcache COMMAND --help` prints. The keys of configs are in [Configs](config.md).\n",
        f"```text\n{_help()}```\n",
    ]
    for command, (_, line) in COMMANDS.items():
        parts += [f"## {command}\n", f"{line[0].upper()}{line[1:]}.\n", f"```text\n{_help(command)}```\n"]
    return "\n".join(parts)


def _help(*command: str) -> str:
    """What `--help` prints, 100 characters wide."""
    shown, before = io.StringIO(), os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "100"
    try:
        with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
            main([*command, "--help"])
    finally:
        os.environ.pop("COLUMNS") if before is None else os.environ.update(COLUMNS=before)
    return shown.getvalue()
