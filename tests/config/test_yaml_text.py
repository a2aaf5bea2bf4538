"""Aliases and merge keys are read as YAML means them; what would grow without bound or hold itself is refused."""

from itertools import pairwise

import pytest

from kdcache.config.capture import CaptureConfig
from kdcache.config.load import apply_override
from kdcache.config.yaml_text import MAX_YAML_BYTES, MAX_YAML_DEPTH, MAX_YAML_NODES, parse_yaml
from kdcache.errors import ConfigError


def laughs(start: str, level: str) -> str:
    """Lines of which each names the one before nine times."""
    names = "abcdefghijk"
    lines = (f"{name}: &{name} {level % ', '.join(9 * ['*' + last])}" for last, name in pairwise(names))
    return "\n".join([f"a: &a {start}", *lines])


def test_aliases_and_merge_keys_that_people_write_are_read():
    text = "base: &base {k: 1, lr: 3e-4}\nrun: {<<: *base, k: 2}\nagain: *base\nmany: [*base, *base]"
    base = {"k": 1, "lr": 3e-4}
    assert parse_yaml(text, where="f") == {"base": base, "run": base | {"k": 2}, "again": base, "many": [base, base]}


def test_an_override_changes_one_section_where_an_alias_stands_for_two():
    fields = parse_yaml("input: {window: &w {size: 4}}\noutput: {window: *w}", where="f")
    apply_override(fields, CaptureConfig, "input.window.size=8")
    assert (fields["input"]["window"]["size"], fields["output"]["window"]["size"]) == (8, 4)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (laughs("[x]", "[%s]"), f"more than {MAX_YAML_NODES:,} values"),
        (laughs("{x: 1}", "{<<: [%s]}"), f"more than {MAX_YAML_NODES:,} values"),
        ("a: &a [*a]", "*a refers to a value that contains it"),
        ("a: &a\n  <<: *a", "*a refers to a value that contains it"),
        ("- " * 100_000, f"nested more than {MAX_YAML_DEPTH} levels deep"),
        ("[" * 100_000, f"nested more than {MAX_YAML_DEPTH} levels deep"),
        ("{a: " * 100_000, f"nested more than {MAX_YAML_DEPTH} levels deep"),
        ("a: 1" + ":1" * 500, "a number has 1,001 characters"),
        ("a: 0x" + "f" * 5000, "a number has 5,002 characters"),
        ("a: !!int ''", "a value does not fit its tag"),
        ("a: !!timestamp x", "a value does not fit its tag"),
        ("a: 2024-13-45", "month must be in 1..12"),
        ("#" * (MAX_YAML_BYTES + 1), "longer than"),
    ],
)
def test_what_little_text_would_become_is_bounded(text, sentence):
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, where="f")
    assert sentence in str(caught.value)
    assert len(str(caught.value)) < 200
