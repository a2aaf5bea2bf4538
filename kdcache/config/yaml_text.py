"""Parse YAML into plain values, within bounds: short text cannot expand into a huge value, and no value contains itself.

This is PyYAML's safe loader with three changes. A key given twice in one mapping is refused, because the first value would be
lost silently. `3e-4` is a number; YAML 1.1 reads it as text, because it lacks the dot. An alias counts as often as it is used.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from kdcache.errors import ConfigError

MAX_YAML_BYTES = 2**22
"""A config with 50,000 paths is smaller."""

MAX_YAML_NODES = 100_000
"""Values and keys; those under an alias count wherever it is used."""

MAX_YAML_DEPTH = 50
MAX_NUMBER_CHARACTERS = 400
"""The longest decimal float64 has fewer. YAML 1.1 has base-60 numbers, which Python parses in quadratic time."""

_FLOAT = re.compile(r"[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$")
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


def parse_yaml(text: str | bytes, *, where: str) -> Any:
    """Parse a YAML document into Python's own types; None for an empty one.

    Args:
        text: bytes are UTF-8, or UTF-16 with a byte order mark.
        where: for messages: a file or a field.

    Raises:
        ConfigError: not YAML, a key given twice, or beyond the bounds of this module.
    """
    check_yaml_size(text, where=where)
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = f"{where}:{mark.line + 1}" if mark is not None else where
        problem = str(getattr(error, "problem", None) or error).splitlines()[0]
        raise ConfigError(f"{at}: not YAML: {problem}") from error
    except _TooMuchError as error:
        raise ConfigError(f"{where}:{error}") from error
    except Exception as error:  # a value that does not fit its explicit tag can raise anything in PyYAML
        why = f" ({error})" if isinstance(error, ValueError) else ""
        raise ConfigError(f"{where}: not YAML: a value does not fit its tag{why}"[:300]) from error


def check_yaml_size(text: str | bytes, *, where: str) -> None:
    """Raise ConfigError for text longer than any config."""
    if len(text) > MAX_YAML_BYTES:
        raise ConfigError(f"{where}: longer than {MAX_YAML_BYTES:,} bytes, which no config needs")


class _TooMuchError(Exception):
    def __init__(self, event: Any, sentence: str) -> None:
        super().__init__(f"{event.start_mark.line + 1}: {sentence}")


class _Loader(yaml.SafeLoader):
    def __init__(self, text: str | bytes) -> None:
        super().__init__(text)
        self._depth = self._num_nodes = 0
        self._nodes_of: dict[str, int] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        event, before = self.peek_event(), self._num_nodes
        if isinstance(event, yaml.AliasEvent):
            self._count_alias(event)
            return super().compose_node(parent, index)
        self._num_nodes += 1
        self._depth += 1
        if self._depth > MAX_YAML_DEPTH:
            raise _TooMuchError(event, f"nested more than {MAX_YAML_DEPTH} levels deep, which no config needs")
        self._check_count(event)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if event.anchor is not None:
            self._nodes_of[event.anchor] = self._num_nodes - before
        if isinstance(node, yaml.ScalarNode) and node.tag in _NUMBERS and len(node.value) > MAX_NUMBER_CHARACTERS:
            raise _TooMuchError(event, f"a number has {len(node.value):,} characters, at most {MAX_NUMBER_CHARACTERS} are read")
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            name = (key.tag, key.value)
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r:.80} is given twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)

    def _count_alias(self, event: Any) -> None:
        if event.anchor in self.anchors and event.anchor not in self._nodes_of:
            raise _TooMuchError(event, f"*{event.anchor:.40} refers to a value that contains it, which would never end")
        self._num_nodes += self._nodes_of.get(event.anchor, 0)
        self._check_count(event)

    def _check_count(self, event: Any) -> None:
        if self._num_nodes > MAX_YAML_NODES:
            raise _TooMuchError(
                event,
                f"more than {MAX_YAML_NODES:,} values, counting aliases (*name) each time; use glob patterns instead of paths",
            )


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))
