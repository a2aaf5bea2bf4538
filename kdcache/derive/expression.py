"""Conditions on scalars: a small language with a parser of its own; nothing of Python is evaluated.

::

    condition  = conjunction { "or" conjunction }
    conjunction = negation { "and" negation }
    negation   = "not" negation | "(" condition ")" | quantifier "(" condition ")" | comparison
    comparison = value ("<" | "<=" | ">" | ">=" | "==" | "!=") number | text ("==" | "!=" | "~" | "!~") 'string'
    value      = name | ("mean" | "max" | "min") "(" name ")" | "share" "(" condition ")"
    quantifier = "any" | "all"

In a condition on sequences, names of positions stand inside mean, max, min, any, all or share (share: the fraction of
positions at which a condition holds). In a condition on positions, such names stand alone. `~` matches a pattern with `*`, `?`
and `[...]`.

An unknown value (the target where the text ends) is left out by mean, max, min, any, all and share, and every comparison
with it is false.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from kdcache.derive.scalars import POSITION_NAMES, SEQUENCE_NAMES, TEXT_NAMES
from kdcache.errors import ConfigError

MAX_WORDS = 500
MAX_DEPTH = 50
"""How deep parentheses and `not` may be nested."""

_COMPARED: dict[str, Callable[[Any, Any], Any]] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "==": operator.eq, "!=": operator.ne,
}  # fmt: skip
_MATCHED: dict[str, Callable[[str, str], bool]] = {
    "==": operator.eq, "!=": operator.ne, "~": fnmatchcase, "!~": lambda text, pattern: not fnmatchcase(text, pattern),
}  # fmt: skip
_AGGREGATES = {"mean": np.mean, "max": np.max, "min": np.min}
_QUANTIFIERS = {"any": np.any, "all": np.all}
_WORD = re.compile(
    r"\s*(?:(?P<number>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)|(?P<name>[A-Za-z_]\w*)|'(?P<single>[^']*)'|\"(?P<double>[^\"]*)\""
    r"|(?P<sign><=|>=|==|!=|!~|[<>~()]))"
)

Evaluate = Callable[[Mapping[str, Any]], Any]
"""Values of names -> bool, or an array of them for positions."""


@dataclass(frozen=True)
class Condition:
    """A parsed condition.

    Attributes:
        text: as it was written.
        names: the scalars that it needs.
        holds: values of these (`scalars.record_values`) -> bool; (P,) bool for a condition on positions.
    """

    text: str
    names: frozenset[str]
    holds: Evaluate


def sequence_condition(text: str) -> Condition:
    """Read a condition on sequences; raises ConfigError that says where it cannot be understood."""
    return _Parser(text, "where", of_positions=False).condition_alone()


def position_condition(text: str) -> Condition:
    """Read a condition on positions; raises ConfigError that says where it cannot be understood."""
    return _Parser(text, "where_position", of_positions=True).condition_alone()


class _Parser:
    """One reading of one text, word by word."""

    def __init__(self, text: str, what: str, *, of_positions: bool) -> None:
        self._text, self._what, self._of_positions = text, what, of_positions
        self._words = self._split()
        if len(self._words) > MAX_WORDS:
            raise ConfigError(f"{what}: the condition has {len(self._words)} words, at most {MAX_WORDS} are understood")
        self._next, self._depth = 0, 0
        self._names: set[str] = set()

    def condition_alone(self) -> Condition:
        holds = self._condition()
        if self._next < len(self._words):
            self._fail("expected `and`, `or` or the end")
        return Condition(self._text, frozenset(self._names), holds)

    def _split(self) -> list[tuple[str, str, int]]:
        """(kind, word, column) of each word."""
        words, at, end = [], 0, len(self._text.rstrip())
        while at < end:
            match = _WORD.match(self._text, at)
            if match is None:
                raise ConfigError(f"{self._what}: {self._text!r} cannot be read at {self._text[at : at + 20].strip()!r}")
            kind = match.lastgroup or ""
            words.append(("text" if kind in ("single", "double") else kind, match[kind], match.start(kind)))
            at = match.end()
        return words

    def _fail(self, expected: str) -> Any:
        at = self._words[self._next][2] if self._next < len(self._words) else len(self._text)
        found = repr(self._text[at : at + 20]) if self._text[at:].strip() else "the end"
        raise ConfigError(f"{self._what}: {self._text!r} is not understood at {found}: {expected}")

    def _take(self, kind: str, *words: str) -> str | None:
        """The next word, if it is of this kind and one of these."""
        if self._next == len(self._words):
            return None
        found, word, _ = self._words[self._next]
        if found != kind or (words and word not in words):
            return None
        self._next += 1
        return word

    def _expect(self, sign: str) -> None:
        if self._take("sign", sign) is None:
            self._fail(f"expected {sign!r}")

    def _condition(self) -> Evaluate:
        holds = self._conjunction()
        while self._take("name", "or"):
            holds = _both(np.logical_or, holds, self._conjunction())
        return holds

    def _conjunction(self) -> Evaluate:
        holds = self._negation()
        while self._take("name", "and"):
            holds = _both(np.logical_and, holds, self._negation())
        return holds

    def _negation(self) -> Evaluate:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            self._fail(f"more than {MAX_DEPTH} nested parentheses")
        holds = self._one()
        self._depth -= 1
        return holds

    def _one(self) -> Evaluate:
        if self._take("name", "not"):
            inner = self._negation()
            return lambda values: np.logical_not(inner(values))
        if self._take("sign", "("):
            holds = self._condition()
            self._expect(")")
            return holds
        quantifier = self._take("name", *_QUANTIFIERS)
        if quantifier is not None:
            return self._over_positions(_QUANTIFIERS[quantifier], quantifier)
        return self._comparison()

    def _comparison(self) -> Evaluate:
        text = None if self._of_positions else self._take("name", *TEXT_NAMES)
        if text is not None:
            return self._text_comparison(text)
        value = self._value()
        sign = self._take("sign", *_COMPARED) or self._fail(f"expected one of {' '.join(_COMPARED)}")
        bound = float(self._take("number") or self._fail("expected a number"))
        compare = _COMPARED[sign]

        def holds(values: Mapping[str, Any]) -> Any:
            found = np.asarray(value(values), np.float64)
            return compare(found, bound) & ~np.isnan(found)

        return holds

    def _text_comparison(self, name: str) -> Evaluate:
        self._names.add(name)
        sign = self._take("sign", *_MATCHED) or self._fail(f"expected one of {' '.join(_MATCHED)}")
        pattern, match = self._take("text"), _MATCHED[sign]
        if pattern is None:
            return self._fail("expected text in quotes")
        return lambda values: np.bool_(match(values[name], pattern))

    def _value(self) -> Evaluate:
        function = self._take("name", *_AGGREGATES, "share")
        if function == "share":
            return self._over_positions(np.mean, function)
        if function is not None:
            return self._aggregate(function)
        return self._named(POSITION_NAMES if self._of_positions else SEQUENCE_NAMES)

    def _aggregate(self, function: str) -> Evaluate:
        self._refuse_inside_positions(function)
        self._expect("(")
        value, reduce = self._named(POSITION_NAMES), _AGGREGATES[function]
        self._expect(")")

        def aggregate(values: Mapping[str, Any]) -> Any:
            known = value(values)
            known = known[~np.isnan(known)]
            return reduce(known) if len(known) else np.nan

        return aggregate

    def _over_positions(self, reduce: Callable[[Any], Any], function: str) -> Evaluate:
        """A condition on positions, taken together."""
        self._refuse_inside_positions(function)
        self._expect("(")
        outer, self._names, self._of_positions = self._names, set(), True
        inner, names = self._condition(), self._names
        self._names, self._of_positions = outer | names, False
        self._expect(")")
        is_share = function == "share"

        def taken_together(values: Mapping[str, Any]) -> Any:
            known_P = ~np.logical_or.reduce([np.isnan(values[name]) for name in names])
            holds_P = inner(values)[known_P]
            return reduce(holds_P) if len(holds_P) or not is_share else np.nan

        return taken_together

    def _refuse_inside_positions(self, function: str) -> None:
        if self._of_positions:
            self._next -= 1
            self._fail(f"{function} is about a whole sequence; a condition on positions compares {', '.join(POSITION_NAMES)}")

    def _named(self, known: Mapping[str, str]) -> Evaluate:
        name = self._take("name", *known)
        if name is None:
            return self._fail(self._advice(known))
        self._names.add(name)
        return lambda values: values[name]

    def _advice(self, known: Mapping[str, str]) -> str:
        word = self._words[self._next][1] if self._next < len(self._words) else ""
        if known is SEQUENCE_NAMES and word in POSITION_NAMES:
            ways = f"mean({word}), max({word}), min({word}) or any({word} < ...)"
            return f"{word} belongs to a position; for a sequence write {ways}"
        more = ", source, domain, finish, or mean(), max(), min(), any(), all(), share() over positions"
        return f"expected one of {', '.join(known)}{more if known is SEQUENCE_NAMES else ''}"


def _both(join: Callable[[Any, Any], Any], left: Evaluate, right: Evaluate) -> Evaluate:
    return lambda values: join(left(values), right(values))
