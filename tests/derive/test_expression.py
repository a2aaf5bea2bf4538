"""The language of conditions against the same conditions written in Python, and what it refuses."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kdcache.derive.expression import position_condition, sequence_condition
from kdcache.errors import ConfigError

VALUES = {
    "target_logprob": np.array([-1.0, -3.0, -0.5, np.nan]),
    "tail_mass": np.array([0.1, 0.2, 0.0, 0.3]),
    "position": np.arange(4.0),
    "num_tokens": 5.0,
    "num_positions": 4.0,
    "source": "corpus/wiki/a.txt#3",
    "finish": "stop",
}


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("num_tokens > 4", True),
        ("num_tokens >= 5 and num_positions != 4", False),
        ("num_tokens < 5 or num_positions == 4", True),
        ("not num_tokens < 5", True),
        ("num_tokens < 5 and num_tokens > 4 or num_positions <= 4", True),
        ("num_tokens < 5 and (num_tokens > 4 or num_positions <= 4)", False),
        ("mean(target_logprob) == -1.5", True),
        ("max(target_logprob) >= -.5 and min(tail_mass) < 1e-9", True),
        ("any(target_logprob < -2)", True),
        ("all(target_logprob < -0.4)", True),  # where the text ends there is no target to be told of
        ("all(target_logprob < -2 or tail_mass < 0.15)", True),
        ("share(target_logprob < -0.75) > 0.6", True),
        ("share(target_logprob < -0.75) > 0.7", False),
        ("any(tail_mass > 0.15 and position < 1)", False),
        ("source ~ 'corpus/wiki/*'", True),
        ('source !~ "corpus/wiki/*"', False),
        ("source ~ 'corpus/[x-z]*'", False),
        ("finish == 'stop' and source != 'x'", True),
        ("min(tail_mass)<0.01and num_tokens>1", True),
    ],
)
def test_a_condition_on_a_sequence_holds_where_python_says_so(text, holds):
    assert bool(sequence_condition(text).holds(VALUES)) is holds


def test_a_condition_on_positions_is_asked_of_each():
    condition = position_condition("target_logprob < -0.75 and not (tail_mass >= 0.2)")
    assert condition.holds(VALUES).tolist() == [True, False, False, False]
    assert condition.names == {"target_logprob", "tail_mass"}


def test_what_is_not_known_compares_false_and_is_in_no_mean():
    nothing = {"target_logprob": np.full(3, np.nan), "tail_mass": np.zeros(0), "num_tokens": math.nan}
    for text in ("mean(target_logprob) < 0", "mean(target_logprob) != 0", "any(target_logprob < 0)", "num_tokens != 1",
                 "max(tail_mass) < 9", "share(tail_mass < 9) >= 0"):  # fmt: skip
        assert not sequence_condition(text).holds(nothing), text


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "not understood at the end"),
        ("num_tokens", r"at the end: expected one of < <= > >= == !="),
        ("num_tokens > ", "at the end: expected a number"),
        ("num_tokens > 3 4", "at '4': expected `and`, `or` or the end"),
        ("num_tokens > mean", "at 'mean': expected a number"),
        ("(num_tokens > 3", r"expected '\)'"),
        ("tail_mass > 0.5", r"tail_mass belongs to a position; for a sequence write mean\(tail_mass\)"),
        ("mean(num_tokens) > 3", "expected one of target_logprob"),
        ("any(mean(tail_mass) > 1)", "mean is about a whole sequence"),
        ("any(source ~ 'a')", "expected one of target_logprob"),
        ("source ~ wiki", "expected text in quotes"),
        ("source < 'wiki'", "expected one of == != ~ !~"),
        ("__import__('os').system('true')", r"cannot be read at \"\.system"),
        ("__import__('os')", 'not understood at "__import__'),
        (" and ".join(["num_tokens > 3"] * 500), "has 1999 words, at most 500"),
        ("num_tokens > 3; drop", "cannot be read at '; drop'"),
        ("(" * 60 + "num_tokens > 3" + ")" * 60, "more than 50 nested parentheses"),
        ("not " * 60 + "num_tokens > 3", "more than 50 nested parentheses"),
    ],
)
def test_what_is_no_condition_is_refused_with_its_place(text, sentence):
    with pytest.raises(ConfigError, match=sentence):
        sequence_condition(text)


def test_positions_have_no_means_and_no_source():
    for text in ("mean(tail_mass) > 1", "any(tail_mass > 1)", "source == 'a'", "num_tokens > 1"):
        with pytest.raises(ConfigError, match="where_position"):
            position_condition(text)
