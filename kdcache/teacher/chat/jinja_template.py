"""A chat template, run so that its output says where each character comes from.

The environment is that of transformers: the same options, filters and functions. Its user compares the text with the one that
transformers gives, and does not use a text that differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jinja2 import meta, nodes
from jinja2.compiler import Frame
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension
from jinja2.parser import Parser

from kdcache.inputs.chat import texts_of
from kdcache.teacher.chat.jinja_bounds import MAX_SOURCE_CHARACTERS, BoundedEnvironment, CountingCode
from kdcache.teacher.chat.marked_text import MarkedText, concatenate, dump_json, interleave, mark_generated

OWN_VARIABLES = frozenset({"messages", "add_generation_prompt", "raise_exception", "strftime_now", "namespace", "range"})
"""The names that every template is given, besides the tokenizer's special tokens."""


class ChatTemplate:
    """A compiled template.

    Attributes:
        source: its text.
        variables: the names that it reads.
        has_generation_tags: whether it marks what the assistant generates.
    """

    def __init__(self, source: str) -> None:
        """Compile it.

        Raises:
            jinja2.exceptions.TemplateError: it is not a template.
        """
        if len(source) > MAX_SOURCE_CHARACTERS:
            raise TemplateError(f"it is longer than {MAX_SOURCE_CHARACTERS:,} characters, which no real template is")
        self.source = source
        environment = self._environment = _Environment()
        tree = environment.parse(source)
        self.variables = frozenset(meta.find_undeclared_variables(tree))
        self.has_generation_tags = any(tag.name == "_generation_support" for tag in tree.find_all(nodes.ExtensionAttribute))
        self._template = environment.from_string(source)

    @property
    def reads_clock(self) -> bool:
        """Whether its text may depend on the time."""
        return "strftime_now" in self.variables

    def render(self, variables: Mapping[str, Any]) -> MarkedText:
        """Render it; raises whatever a program can raise, and TemplateError if it would not end."""
        self._environment.start(sum(map(len, texts_of(variables))))
        return concatenate([self._template.render(**variables)])


class _GenerationTags(Extension):
    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_generation_support"), [], [], body).set_lineno(line)

    def _generation_support(self, caller: Callable[[], str]) -> MarkedText:
        return mark_generated(caller())


class _MarkingCode(CountingCode):
    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.join_texts((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class _Environment(BoundedEnvironment):
    code_generator_class = _MarkingCode

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTags, "jinja2.ext.loopcontrols"])
        self.filters |= {"tojson": _to_json, "join": _join}
        self.globals["raise_exception"] = _raise
        self.bound_functions()

    def concat(self, parts: Iterable[str]) -> MarkedText:
        """Join what a template, a macro or a block writes."""
        return concatenate(self.joined(parts))

    def join_texts(self, parts: tuple[Any, ...]) -> MarkedText:
        """Implements `~`."""
        return self.concat(str(self.weighed(part)) for part in parts)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Allow the attributes of a plain text only: a template cannot tell that its texts are marked."""
        return super().is_safe_attribute(obj, attr, value) and (not isinstance(obj, MarkedText) or hasattr(str, attr))


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
