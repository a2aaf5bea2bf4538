"""YAML text -> plain values, within bounds: no little text becomes much, and nothing holds itself.

PyYAML's safe loader with three changes: a key given twice in one mapping is refused (the first value would be lost without a
word), `3e-4` is a number (YAML 1.1 reads it as text, because it lacks the dot), and what an alias stands for counts each time.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from kdcache.errors import ConfigError

MAX_YAML_BYTES = 2**22
"""A config that names 50,000 paths is smaller."""

MAX_YAML_NODES = 100_000
"""Values and keys, those that an alias stands for counted wherever it stands."""

MAX_YAML_DEPTH = 50
MAX_NUMBER_CHARACTERS = 400
"""The longest decimal float64 has fewer. Python reads numbers of base 60, which YAML 1.1 has, in the square of their length."""

_FLOAT = re.compile(r"[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$")
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


def parse_yaml(text: str | bytes, *, where: str) -> Any:
    """What a YAML document holds, in Python's own types; None for an empty one.

    Args:
        text: bytes are UTF-8, or UTF-16 with a byte order mark.
        where: for messages: a file or a field.

    Raises:
        ConfigError: not YAML, a key given twice, or more than the bounds of this module allow.
    """
    check_yaml_size(text, where=where)
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{where}:{mark.line + 1}" if mark is not None else where
        problem = str(getattr(error, "problem", None) or error).splitlines()[0]
        raise ConfigError(f"{place}: not YAML: {problem}") from error
    except _TooMuchError as error:
        raise ConfigError(f"{where}:{error}") from error
    except Exception as error:  # an explicit tag with a value that is none of it ends in whatever PyYAML runs into
        why = f" ({error})" if isinstance(error, ValueError) else ""
        raise ConfigError(f"{where}: not YAML: a value that its tag does not allow{why}"[:300]) from error


def check_yaml_size(text: str | bytes, *, where: str) -> None:
    """Raise ConfigError for more text than any config has."""
    if len(text) > MAX_YAML_BYTES:
        raise ConfigError(f"{where}: longer than {MAX_YAML_BYTES:,} bytes, as no config is")


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
            raise _TooMuchError(event, f"nested more than {MAX_YAML_DEPTH} deep, as no config is")
        self._check_count(event)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if event.anchor is not None:
            self._nodes_of[event.anchor] = self._num_nodes - before
        if isinstance(node, yaml.ScalarNode) and node.tag in _NUMBERS and len(node.value) > MAX_NUMBER_CHARACTERS:
            raise _TooMuchError(event, f"a number of {len(node.value):,} characters")
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
            raise _TooMuchError(event, f"*{event.anchor:.40} stands inside of what it names, which would have no end")
        self._num_nodes += self._nodes_of.get(event.anchor, 0)
        self._check_count(event)

    def _check_count(self, event: Any) -> None:
        if self._num_nodes > MAX_YAML_NODES:
            raise _TooMuchError(
                event, f"more than {MAX_YAML_NODES:,} values, aliases (*name) written out; write fewer, or a file of paths"
            )


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))
