"""A sandbox in which every template ends: its work is counted, and nothing that it makes is larger than any chat.

What counts: blocks that run (of loops, macros, conditions), calls, filters and tests, and the size
of what is compared, written, joined or made. The count is the same on every machine, unlike a time
limit. Before an operation that can make much out of little (`*`, `**`, formats, padding,
replacing), the size of its result is computed.
"""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Callable, Iterable, Mapping, MappingView, Sequence, Set, Sized
from typing import Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import TemplateError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MAX_SOURCE_CHARACTERS = 2**20
MAX_SIZE = 2**24
"""The most characters of a text, or values in a list with all that they hold, that a template may make: millions of tokens."""

MAX_STEPS = 1_000_000
"""Steps of one rendering, which take seconds. Today's templates take some dozens per message."""

STEPS_PER_CHARACTER = 8
"""More steps for longer chats: 512 operations on the whole chat."""

CHARACTERS_PER_STEP = 64
MAX_BITS = 2**14
"""The most bits of a whole factor."""

_PADDING = ("center", "ljust", "rjust", "zfill", "to_bytes", "batch", "slice", "round")
_UNCERTAIN = {"random", "lipsum"}
"""What draws at random: two renderings would differ."""

_SHALLOW = frozenset(
    {"length", "count", "first", "last", "list", "map", "select", "reject", "selectattr", "rejectattr", "batch", "slice",
     "reverse", "items", "default", "d", "attr"}
)  # fmt: skip
"""Filters that look at the items of a list, but not into them."""

_COMPARING = frozenset(
    {"==", "eq", "equalto", "!=", "ne", ">", "gt", "greaterthan", "<", "lt", "lessthan", ">=", "ge", "<=", "le", "in", "lower",
     "upper"}
)  # fmt: skip
"""Tests that look at a whole value."""

_DIGITS, _NESTED = re.compile(r"[0-9]+"), re.compile(r"\{[^{}]*\{|%[^a-zA-Z%]*\*")


class CountingCode(CodeGenerator):
    def blockvisit(self, nodes: Iterable[nodes.Node], frame: Frame) -> None:
        self.writeline("environment.step()")
        super().blockvisit(nodes, frame)

    def visit_For(self, node: nodes.For, frame: Frame) -> None:
        if node.test is not None:  # `for ... if ...` skips items outside of any block
            step = nodes.Call(nodes.EnvironmentAttribute("step"), [], [], None, None)
            node.test = nodes.And(step, node.test)
        super().visit_For(node, frame)

    def visit_Compare(self, node: nodes.Compare, frame: Frame) -> None:
        self.write("(")
        self._weighed(node.expr, frame)
        for operand in node.ops:
            self.visit(operand, frame)
        self.write(")")

    def visit_Operand(self, node: nodes.Operand, frame: Frame) -> None:
        self.write(f" {_OPERATORS[node.op]} ")
        self._weighed(node.expr, frame)

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        if isinstance(node.arg, nodes.Slice):
            self._made(super().visit_Getitem, node, frame)
        else:
            super().visit_Getitem(node, frame)

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self._made(super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self._made(super().visit_Dict, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        if node.ctx == "load":
            self._made(super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)

    def _weighed(self, node: nodes.Node, frame: Frame) -> None:
        self.write("environment.weighed(")
        self.visit(node, frame)
        self.write(")")

    def _made(self, visit: Callable[[Any, Frame], None], node: nodes.Node, frame: Frame) -> None:
        self.write("environment.made(")
        visit(node, frame)
        self.write(")")


_OPERATORS = {"eq": "==", "ne": "!=", "gt": ">", "gteq": ">=", "lt": "<", "lteq": "<=", "in": "in", "notin": "not in"}


def _refuse_draws(*_: Any, **__: Any) -> None:
    raise TemplateError("it draws at random, and would give another text each time")


def _parts_of(value: Any) -> Any:
    """What a value holds; None if it holds nothing visible."""
    if isinstance(value, Namespace):
        return value._Namespace__attrs.values()
    if isinstance(value, Mapping):
        return (*value.keys(), *value.values())
    return value if isinstance(value, (Sequence, Set, MappingView)) and not isinstance(value, range) else None


class _Count(threading.local):
    """The remaining steps of a rendering, and the sizes of containers, which are kept since an id may be reused."""

    steps = MAX_STEPS

    def __init__(self) -> None:
        self.sizes: dict[int, tuple[Any, int]] = {}


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, with a count."""

    code_generator_class = CountingCode
    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self, **options: Any) -> None:
        super().__init__(finalize=self.weighed, **options)
        self._count = _Count()

    def bound_functions(self) -> None:
        """Count filters and tests, too; call it after the last one is added."""
        for names in (self.filters, self.globals):
            names.update(dict.fromkeys(_UNCERTAIN & names.keys(), _refuse_draws))
        self.filters = {name: self._counted(name, function) for name, function in self.filters.items()}
        self.tests = {
            name: self._counted(name, function) if name in _COMPARING else function for name, function in self.tests.items()
        }

    def start(self, num_characters: int) -> None:
        """Begin a rendering of messages of this length."""
        self._count.steps = MAX_STEPS + STEPS_PER_CHARACTER * num_characters
        self._count.sizes.clear()

    def step(self, size: int = 0) -> bool:
        """Take a step, or more for something large; gives True. Raises TemplateError when no steps are left."""
        self._count.steps -= 1 + size // CHARACTERS_PER_STEP
        if self._count.steps < 0:
            raise TemplateError("it does not end within the steps that a rendering may take")
        return True

    def weighed(self, value: Any) -> Any:
        """Count a value that is written or compared, which takes time in proportion to its size; gives the value."""
        if isinstance(value, (str, bytes)):
            self.step(len(value))
        elif not isinstance(value, (bool, int, float, type(None))):
            self.step(self.size_of(value))
        return value

    def made(self, value: Any) -> Any:
        """Count a value that the template made; gives it. Raises TemplateError if it is larger than any chat."""
        if isinstance(value, (str, bytes)):
            self._allow(len(value))
            self.step(len(value))
        elif isinstance(value, (list, tuple, dict)):
            self._allow(self.size_of(value))
        return value

    def size_of(self, value: Any) -> int:
        """The characters of a text, or the values in anything else, with all that they hold, as often as they are held."""
        if isinstance(value, (str, bytes)):
            return len(value)
        parts = _parts_of(value)
        if parts is None:
            return len(value) if isinstance(value, range) else 1
        # A template cannot change a container, except for a namespace.
        if id(value) in self._count.sizes:
            return self._count.sizes[id(value)][1]
        size = 1
        for part in parts:
            self.step()
            size += self.size_of(part)
        if not isinstance(value, Namespace):
            self._count.sizes[id(value)] = (value, size)
        return size

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Jinja's hook for calls."""
        self.step()
        method = getattr(obj, "__wrapped__", obj)  # the sandbox has its own `str.format`
        owner = getattr(method, "__self__", None)
        if isinstance(owner, (str, bytes, int)):
            self.step(0 if isinstance(owner, int) else len(owner))
            self._allow(self._growth(method.__name__, owner, args, kwargs))
        return self.made(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Jinja's hook for operators."""
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * max(right, 1) if operator == "**" else left.bit_length() + right.bit_length()
            if bits > MAX_BITS:
                raise TemplateError(f"it makes a factor of more than {MAX_BITS:,} bits")
            return super().call_binop(context, operator, left, right)
        size = 0
        if operator == "*":
            factor, other = (left, right) if isinstance(left, int) else (right, left)
            size = self.size_of(other) * max(factor, 1) if isinstance(factor, int) else 0
        elif operator == "+":
            size = self.size_of(left) + self.size_of(right)
        elif operator == "%":
            size = self._format_size(left, right if isinstance(right, tuple) else (right,))
        self._allow(size)
        self.step(size)
        value = super().call_binop(context, operator, left, right)
        if isinstance(value, (list, tuple)):
            self._count.sizes[id(value)] = (value, size)
        return value

    def joined(self, parts: Iterable[str]) -> list[str]:
        """The pieces of a text that is written, unless it gets too long."""
        pieces, length = [], 0
        for piece in parts:
            length += len(piece)
            self._allow(length)
            pieces.append(piece)
        self.step(length)
        return pieces

    def _counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        passes_something = hasattr(function, "jinja_pass_arg")

        @functools.wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            value, *rest = args[1:] if passes_something else args
            if name in _SHALLOW:
                self.step(CHARACTERS_PER_STEP * len(value) if isinstance(value, Sized) and not isinstance(value, str) else 0)
            else:
                self.weighed(value)
            self._allow(self._growth(name, value, rest, kwargs))
            return self.made(function(*args, **kwargs))

        return counted

    def _growth(self, name: str, value: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
        """An upper bound for what a method or filter would make, if it can be much more than what it is given."""
        given = [*args, *kwargs.values()]
        sizes = [int(factor) for factor in given if isinstance(factor, (int, float)) and abs(factor) < 1e300]
        largest = max(map(abs, sizes), default=0)
        texts = max((len(text) for text in given if isinstance(text, (str, bytes))), default=0)
        if name in _PADDING:
            return largest
        if name == "tojson":
            return self.size_of(value) * max(largest, texts, 1)
        if name in ("indent", "wordwrap", "expandtabs"):
            breaks = {"indent": "\n", "expandtabs": "\t"}.get(name, "")
            return self.size_of(value) + self._num_matches(value, breaks) * max(largest if breaks else 0, texts)
        if name == "replace":
            return self.size_of(value) + self._num_matches(value, given[0] if given else "") * texts
        if name == "join":
            return self._joined_size(value, given)
        if name == "translate":
            return len(value) * max(map(self.size_of, given), default=1)
        return self._format_size(value, given) if name in ("format", "format_map") else 0

    @staticmethod
    def _num_matches(value: Any, part: Any) -> int:
        """How often a text may be replaced or broken, and once more."""
        if isinstance(value, bytes):
            return len(value) + 1
        return str(value).count(str(part)) + 1

    def _joined_size(self, value: Any, given: Sequence[Any]) -> int:
        """The size of `separator.join(parts)`, or of `parts | join(separator)`."""
        is_method = isinstance(value, (str, bytes)) and bool(given) and not isinstance(given[0], (str, bytes))
        separator, parts = (value, given[0]) if is_method else (given[0] if given else "", value)
        length = self.size_of(separator)
        if not isinstance(parts, Sized):
            return length * MAX_SIZE  # unknown before it is joined; real separators are short
        return self.size_of(parts) + length * len(parts)

    def _format_size(self, text: Any, values: Sequence[Any]) -> int:
        """The size of a formatted text: the widths that it names, and every field as long as the longest value."""
        if not isinstance(text, (str, bytes)):
            return 0
        text = text if isinstance(text, str) else text.decode("latin-1")
        widths = sum(int(digits[:9]) for digits in _DIGITS.findall(text))
        if _NESTED.search(text):
            widths += sum(map(self._as_width, values)) * len(text)
        return len(text) + widths + (text.count("{") + text.count("%")) * max(map(self.size_of, values), default=0)

    @staticmethod
    def _as_width(value: Any) -> int:
        return abs(value) if isinstance(value, int) else int(value) if isinstance(value, str) and value[:20].isdecimal() else 0

    def _allow(self, size: int) -> None:
        if size > MAX_SIZE:
            raise TemplateError(f"it makes a text or list of more than {MAX_SIZE:,} characters or values")
