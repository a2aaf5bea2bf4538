"""The same inputs give the same plan, and a plan gives every item exactly once, in order."""

import itertools

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcache.capture.inputs import InputReader
from kdcache.capture.plan import make_plan, make_stream_plan
from kdcache.config.capture import InputConfig, ShardConfig, WindowConfig
from kdcache.errors import InputError
from kdcache.inputs.content import Item, Start

CONFIG = InputConfig(format="lines", paths=("x",))


def items_of(texts):
    return [Item(text, f"x:{n}", Start(0, n, n)) for n, text in enumerate(texts)]


def plan_of(texts, *, config=CONFIG, template="", unit_chars=10, unit_items=3):
    return make_plan(
        items_of(texts), config=config, template_fingerprint=template, unit_chars=unit_chars, unit_items=unit_items
    )


@given(texts=st.lists(st.text(max_size=12), max_size=30), unit_chars=st.integers(1, 30), unit_items=st.integers(1, 6))
def test_units_follow_each_other_and_keep_their_limits(texts, unit_chars, unit_items):
    plan = plan_of(texts, unit_chars=unit_chars, unit_items=unit_items)
    assert [unit.index for unit in plan.units] == list(range(len(plan.units)))
    assert [unit.first_item for unit in plan.units] == list(
        itertools.accumulate([unit.num_items for unit in plan.units], initial=0)
    )[: len(plan.units)]
    assert sum(unit.num_items for unit in plan.units) == plan.num_items == len(texts)
    assert sum(unit.num_chars for unit in plan.units) == plan.num_chars
    assert all(1 <= unit.num_items <= unit_items for unit in plan.units)
    assert all(unit.num_chars <= unit_chars or unit.num_items == 1 for unit in plan.units)
    for unit, following in itertools.pairwise(plan.units):
        one_more = unit.num_chars + len(texts[following.first_item])
        assert unit.num_items == unit_items or one_more > unit_chars


@settings(max_examples=30, deadline=None)
@given(
    files=st.lists(
        st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\n\r"), max_size=8), min_size=1, max_size=8),
        min_size=1,
        max_size=3,
    ),
    unit_chars=st.integers(1, 30),
    unit_items=st.integers(1, 5),
    backwards=st.booleans(),
)
def test_reading_the_units_of_files_gives_each_item_once_in_order(tmp_path_factory, files, unit_chars, unit_items, backwards):
    folder = tmp_path_factory.mktemp("lines")
    for number, lines in enumerate(files):
        (folder / f"{number}.txt").write_bytes("".join(line + "\n" for line in lines).encode())
    reader = InputReader(InputConfig(format="lines", paths=(str(folder),)))
    expected = list(reader.items())
    if not any(item.content for item in expected):
        return
    plan = reader.plan(ShardConfig(unit_chars=unit_chars, unit_items=unit_items), template_fingerprint="")
    units = plan.units[::-1] if backwards else plan.units
    read = [reader.read(unit) for unit in units]
    assert list(itertools.chain.from_iterable(read[::-1] if backwards else read)) == expected
    assert [item.content for item in expected] == [line.removeprefix("\ufeff") if n == 0 else line
                                                   for lines in files for n, line in enumerate(lines)]  # fmt: skip


def test_equal_inputs_give_equal_plans():
    assert plan_of(["a", "bb"]) == plan_of(["a", "bb"])


@pytest.mark.parametrize("other", [["a", "bc"], ["ab", "b"], ["a", "b", "b"], ["bb", "a"], ["a", "bb", ""]])
def test_another_content_gives_another_fingerprint(other):
    assert plan_of(["a", "bb"]).input_fingerprint != plan_of(other).input_fingerprint


def test_the_cut_is_in_the_plans_fingerprint_and_not_in_the_inputs():
    one, other = plan_of(["a", "bb"], unit_items=1), plan_of(["a", "bb"], unit_items=2)
    assert one.input_fingerprint == other.input_fingerprint
    assert one.fingerprint != other.fingerprint


def test_settings_that_change_the_sequences_change_the_fingerprint_and_names_do_not():
    base = plan_of(["a"]).input_fingerprint
    replace = msgspec.structs.replace
    for config in (
        replace(CONFIG, add_special_tokens=False),
        replace(CONFIG, window=WindowConfig(size=5)),
        replace(CONFIG, window=WindowConfig(policy="truncate")),
    ):
        assert plan_of(["a"], config=config).input_fingerprint != base
    assert plan_of(["a"], template="another").input_fingerprint != base
    assert plan_of(["a"], config=replace(CONFIG, paths=("elsewhere",))).input_fingerprint == base


def test_a_stream_is_planned_without_reading():
    config = InputConfig(format="dataset", dataset="d", streaming=True, limit=7)
    plan = make_stream_plan(config=config, template_fingerprint="", unit_items=3)
    assert [(unit.first_item, unit.num_items) for unit in plan.units] == [(0, 3), (3, 3), (6, 1)]
    assert plan.is_stream
    other = msgspec.structs.replace(config, revision="abc")
    assert make_stream_plan(config=other, template_fingerprint="", unit_items=3).fingerprint != plan.fingerprint


def test_an_input_that_changes_after_the_plan_is_noticed(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo\n")
    reader = InputReader(InputConfig(format="lines", paths=(str(path),)))
    plan = reader.plan(ShardConfig(), template_fingerprint="")
    path.write_text("one\ntoo\n")
    with pytest.raises(InputError, match="has changed since the capture began"):
        reader.read(plan.units[0])


def test_empty_items_are_counted_and_an_input_of_nothing_else_is_refused(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\n\n\ntwo\n")
    reader = InputReader(InputConfig(format="lines", paths=(str(path),)))
    plan = reader.plan(ShardConfig(), template_fingerprint="")
    assert (plan.num_items, plan.num_empty_items) == (4, 2)
    path.write_text("\n\n")
    with pytest.raises(InputError, match="nothing to read: all 2 items are empty"):
        reader.plan(ShardConfig(), template_fingerprint="")
    path.write_text("")
    with pytest.raises(InputError, match="nothing to read: no items"):
        reader.plan(ShardConfig(), template_fingerprint="")


def test_the_limit_counts_items_over_all_files(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("1\n2\n3\n")
    reader = InputReader(InputConfig(format="lines", paths=(str(tmp_path),), limit=4))
    plan = reader.plan(ShardConfig(), template_fingerprint="")
    sources = [item.source.removeprefix(f"{tmp_path}/") for item in reader.read(plan.units[0])]
    assert sources == ["a.txt:1", "a.txt:2", "a.txt:3", "b.txt:1"]


def test_another_domain_is_another_input_and_none_is_what_it_was():
    def fingerprint(*pairs, domain_field=None):
        config = InputConfig(format="jsonl", paths=("x",), domain_field=domain_field)
        items = [Item(text, f"x:{n}", Start(0, n, n), domain) for n, (text, domain) in enumerate(pairs)]
        return make_plan(items, config=config, template_fingerprint="", unit_chars=10, unit_items=3).input_fingerprint

    plain = fingerprint(("a", ""), ("b", ""))
    assert fingerprint(("a", "wiki"), ("b", "")) != fingerprint(("a", ""), ("wiki", ""), ("b", ""))
    assert len({plain, fingerprint(("a", "wiki"), ("b", "")), fingerprint(("a", "code"), ("b", ""))}) == 3
    assert fingerprint(("a", ""), ("b", ""), domain_field="kind") != plain
