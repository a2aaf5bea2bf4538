"""Docstrings as Markdown: Google's sections become lists, what looks like HTML is shown as it stands."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping

_SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises|Example|Examples):\n((?:    .*\n|\n)*)", re.MULTILINE)
_TITLES = {"Args": "Parameters", "Attributes": "Attributes", "Returns": "Returns", "Yields": "Yields", "Raises": "Raises"}
_ITEM = re.compile(r"^((?:\*\*|\*)?[\w., ]+?(?: \([^)]*\))?): ", re.MULTILINE)
_CODE = re.compile(r"(`+[^`]*`+)")


def docstring(thing: object, known: Mapping[str, str] = {}, *, skip: tuple[str, ...] = ()) -> str:
    """The docstring of a thing as Markdown.

    Args:
        thing: a class, function or property.
        known: public name -> where it is described; a name in code is made a link.
        skip: titles of sections that are left out, such as "Attributes".
    """
    text = inspect.cleandoc(inspect.getdoc(thing) or "") + "\n"
    return _linked(_SECTION.sub(lambda match: _section(match[1], match[2], skip), _escaped(text)), known).strip() + "\n"


def first_sentence(thing: object) -> str:
    """The first paragraph of the docstring, in one line."""
    paragraph = (inspect.getdoc(thing) or "").partition("\n\n")[0]
    return _escaped(" ".join(paragraph.split()))


def cell(text: str) -> str:
    """Text that may stand in a cell of a table."""
    return _escaped(" ".join(text.split())).replace("|", "\\|")


def _section(name: str, body: str, skip: tuple[str, ...]) -> str:
    if name in skip:
        return ""
    body = inspect.cleandoc(body)
    if name.startswith("Example"):
        return f"```python\n{body}\n```\n"
    items = re.split(r"\n(?=\S)", body) if name in ("Args", "Attributes", "Raises") else [body]
    lines = [_ITEM.sub(lambda match: f"`{match[1]}`: ", " ".join(item.split()), count=1) for item in items if item.strip()]
    return f"\n**{_TITLES[name]}**\n\n" + "\n".join(f"- {line}" for line in lines) + "\n\n"


def _escaped(text: str) -> str:
    """What is no code keeps its `<` and `*` as characters."""
    parts = _CODE.split(text)
    parts[::2] = [part.replace("<", "&lt;").replace("*", "\\*") for part in parts[::2]]
    return "".join(parts)


def _linked(text: str, known: Mapping[str, str]) -> str:
    return re.sub(r"`(\w+)`", lambda match: f"[`{match[1]}`]({known[match[1]]})" if match[1] in known else match[0], text)
