"""A chat template, run so that its output says where each character comes from. Jinja is imported here alone.

The environment is that of transformers: the same options, filters and functions. Whoever uses it compares the text with the one
that transformers gives; what differs is not used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jinja2 import meta, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from kdcache.teacher.marked_text import MarkedText, concatenate, dump_json, interleave, mark_generated

OWN_VARIABLES = frozenset({"messages", "add_generation_prompt", "raise_exception", "strftime_now", "namespace", "range"})
"""What every template is given, beside the tokenizer's special tokens."""


class ChatTemplate:
    """A compiled template.

    Attributes:
        source: its text.
        variables: the names that it reads of what it is given.
        has_generation_tags: whether it marks what the assistant generates.
    """

    def __init__(self, source: str) -> None:
        """Compile it.

        Raises:
            jinja2.exceptions.TemplateError: it is no template.
        """
        self.source = source
        environment = _Environment()
        tree = environment.parse(source)
        self.variables = frozenset(meta.find_undeclared_variables(tree))
        self.has_generation_tags = any(tag.name == "_generation_support" for tag in tree.find_all(nodes.ExtensionAttribute))
        self._template = environment.from_string(source)

    @property
    def reads_clock(self) -> bool:
        """Whether its text may hang on when it is rendered."""
        return "strftime_now" in self.variables

    def render(self, variables: Mapping[str, Any]) -> MarkedText:
        """Its text; raises whatever a program can raise."""
        return concatenate([self._template.render(**variables)])


class _GenerationTags(Extension):
    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_generation_support"), [], [], body).set_lineno(line)

    def _generation_support(self, caller: Callable[[], str]) -> MarkedText:
        return mark_generated(caller())


class _MarkingCode(CodeGenerator):
    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.join_texts((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class _Environment(ImmutableSandboxedEnvironment):
    code_generator_class = _MarkingCode
    concat = staticmethod(concatenate)

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTags, "jinja2.ext.loopcontrols"])
        self.filters |= {"tojson": _to_json, "join": _join}
        self.globals["raise_exception"] = _raise

    @staticmethod
    def join_texts(parts: tuple[Any, ...]) -> MarkedText:
        """What `~` gives."""
        return concatenate(map(str, parts))


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return dump_json(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _join(value: Any, d: str = "", attribute: str | None = None) -> str:
    if attribute is not None:
        value = (item[attribute] if isinstance(item, Mapping) else getattr(item, attribute) for item in value)
    return interleave(str(d), map(str, value))


def _raise(message: str) -> None:
    raise TemplateError(message)
