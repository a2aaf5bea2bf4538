"""Every format gives its items in a fixed order, and what cannot be read is named by file and line."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kdcache.capture.inputs import InputReader
from kdcache.config.capture import InputConfig
from kdcache.errors import ConfigError, InputError
from kdcache.inputs.chat import Chat
from kdcache.inputs.content import BEGINNING

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]


def reader(path, input_format, **fields):
    return InputReader(InputConfig(format=input_format, paths=(str(path),), **fields))


def plain(content):
    """Messages and ids as lists."""
    return content if isinstance(content, str) else content.messages if isinstance(content, Chat) else content.tolist()


def contents(path, input_format, **fields):
    return [item.content for item in reader(path, input_format, **fields).items()]


def refusal(path, input_format, **fields):
    with pytest.raises(InputError) as caught:
        list(reader(path, input_format, **fields).items())
    return str(caught.value).removeprefix(str(Path(path).parent) + "/")


def write_arrow(path, table, *, stream=False):
    new = pa.ipc.new_stream if stream else pa.ipc.new_file
    with new(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


def test_txt_files_are_one_item_each_in_sorted_order(tmp_path):
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbffirst\r\n")
    (tmp_path / "c.md").write_text("not asked for")
    (tmp_path / ".hidden.txt").write_text("hidden")
    assert contents(tmp_path, "txt") == ["first\r\n", "second"]
    assert contents(tmp_path / "*.md", "txt") == ["not asked for"]


def test_folders_are_searched_whole_and_a_file_found_twice_is_read_once(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "x.txt").write_text("x")
    config = InputConfig(format="txt", paths=(str(tmp_path), str(tmp_path / "**" / "*.txt"), str(tmp_path / "deep/er/x.txt")))
    assert [item.content for item in InputReader(config).items()] == ["x"]


def test_lines_have_the_numbers_that_an_editor_shows(tmp_path):
    (tmp_path / "a.txt").write_bytes("one\r\n\ntw\u2028o\nlast".encode())
    items = list(reader(tmp_path / "a.txt", "lines").items())
    assert [item.content for item in items] == ["one", "", "tw\u2028o", "last"]
    assert [item.source.rsplit(":", 1)[1] for item in items] == ["1", "2", "3", "4"]


@pytest.mark.parametrize("input_format", ["jsonl", "parquet", "arrow", "arrow stream"])
@pytest.mark.parametrize(
    ("content", "field", "values"),
    [
        ("text", "text", ["one", "", "three", "four", "five"]),
        ("text", "body", ["one", None, "three", "four", "five"]),
        ("messages", "messages", [CHAT, CHAT[:1], [], CHAT, None]),
        ("ids", "input_ids", [[1, 2], [3], [], [4], None]),
    ],
)
def test_the_same_values_come_out_of_every_format_from_any_place_on(tmp_path, input_format, content, field, values):
    name = input_format.split()[0]
    path = tmp_path / f"x.{name}"
    table = pa.table({"other": list(range(5)), field: values})
    if name == "jsonl":
        path.write_text("".join(json.dumps({field: value}) + "\n" for value in values))
    elif name == "parquet":
        pq.write_table(table, path, row_group_size=2)
    else:
        write_arrow(path, table, stream=input_format != name)
    source = reader(path, name, content=content, field=None if field != "body" else field)
    items = list(source.items(BEGINNING))
    empty = {"text": "", "messages": [], "ids": []}[content]
    assert [plain(item.content) for item in items] == [v or empty for v in values]
    assert [item.is_empty for item in items] == [not value for value in values]
    for number, item in enumerate(items):
        rest = list(source.items(item.start))
        assert [other.source for other in rest] == [other.source for other in items[number:]]
        assert [other.content_bytes() for other in rest] == [other.content_bytes() for other in items[number:]]
    assert items[2].source == (f"{path}:3" if name == "jsonl" else f"{path}#2")


def test_a_chat_means_the_same_from_json_and_from_a_table(tmp_path):
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho", "name": "x"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": chat}))
    pq.write_table(pa.table({"messages": [chat]}), tmp_path / "a.parquet")
    (from_json,) = reader(tmp_path / "a.jsonl", "jsonl", content="messages").items()
    (from_table,) = reader(tmp_path / "a.parquet", "parquet", content="messages").items()
    assert from_json.content_bytes() == from_table.content_bytes()


def test_large_and_dictionary_columns_are_read(tmp_path):
    text = pa.array(["a", "b", "a"])
    pq.write_table(pa.table({"text": text.cast(pa.large_string())}), tmp_path / "a.parquet")
    assert contents(tmp_path / "a.parquet", "parquet") == ["a", "b", "a"]
    write_arrow(tmp_path / "a.arrow", pa.table({"text": text.dictionary_encode()}))
    assert contents(tmp_path / "a.arrow", "arrow") == ["a", "b", "a"]
    ids = pa.array([[1, 2], [3, 4]], pa.list_(pa.uint16(), 2))
    write_arrow(tmp_path / "b.arrow", pa.table({"input_ids": ids}))
    assert [np.asarray(c).tolist() for c in contents(tmp_path / "b.arrow", "arrow", content="ids")] == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    ("line", "content", "sentence"),
    [
        ('{"text": "a"', "text", "x.jsonl:3: not JSON"),
        ("[1]", "text", "x.jsonl:3: holds a list, but a JSON object was expected"),
        ('{"txt": "a"}', "text", "x.jsonl:3: no field 'text'; the line has 'txt'"),
        ('{"text": 3}', "text", "x.jsonl:3: field 'text' is 3 (int), but content 'text' needs text"),
        ('{"messages": "a"}', "messages", "x.jsonl:3: field 'messages' is 'a' (str)"),
        ('{"messages": ["a"]}', "messages", "x.jsonl:3: field 'messages'[0] is 'a' (str), but a message is an object"),
        ('{"messages": [{"role": "oracle", "content": ""}]}', "messages", "'messages'[0].role is 'oracle' (str), but must be"),
        ('{"messages": [{"content": "a"}]}', "messages", "'messages'[0].role is null"),
        ('{"messages": [{"role": "user", "content": [1]}]}', "messages", "'messages'[0].content is [1] (list)"),
        ('{"input_ids": [1, "a"]}', "ids", "x.jsonl:3: field 'input_ids'[1] is 'a' (str), but a token id is a whole number"),
        ('{"input_ids": [1, -1]}', "ids", "'input_ids'[1] is -1"),
        ('{"input_ids": [true]}', "ids", "'input_ids'[0] is True"),
        ('{"input_ids": [99999999999999999999999]}', "ids", "'input_ids'[0] is 99999999999999999999999"),
        ('{"input_ids": 7}', "ids", "'input_ids' is 7 (int), but content 'ids' needs a list"),
    ],
)
def test_a_bad_json_line_is_named_by_file_and_line(tmp_path, line, content, sentence):
    good = {"text": '{"text": "a"}', "messages": '{"messages": []}', "ids": '{"input_ids": []}'}[content]
    path = tmp_path / "x.jsonl"
    path.write_text(f"{good}\n\n{line}\n")
    assert sentence in refusal(path, "jsonl", content=content)


def test_bytes_that_are_not_utf8_are_named_by_line(tmp_path):
    path = tmp_path / "x.txt"
    path.write_bytes(b"one\ntwo\nth\xffree\n")
    assert refusal(path, "txt") == "x.txt:3: not UTF-8 text (byte 0xff); convert the file to UTF-8"
    assert refusal(path, "lines") == "x.txt:3: not UTF-8 text (byte 0xff); convert the file to UTF-8"
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    assert refusal(tmp_path / "x.jsonl", "jsonl") == "x.jsonl:2: not UTF-8 text (byte 0xff); convert the file to UTF-8"


@pytest.mark.parametrize("name", ["parquet", "arrow"])
def test_a_damaged_table_and_a_wrong_column_are_named(tmp_path, name):
    path = tmp_path / f"x.{name}"
    table = pa.table({"text": ["a" * 100] * 50, "n": range(50)})
    pq.write_table(table, path) if name == "parquet" else write_arrow(path, table)
    assert f"x.{name}: no column 'body'; the columns are 'text', 'n'" in refusal(path, name, field="body")
    assert f"x.{name}: column 'n' has the type int64, but content 'text' needs text" in refusal(path, name, field="n")
    assert f"x.{name}: column 'text' has the type string, but content 'ids' needs a list" in refusal(
        path, name, field="text", content="ids"
    )
    path.write_bytes(path.read_bytes()[:-20])
    assert f"x.{name}: not a readable" in refusal(path, name)
    path.write_bytes(b"nonsense")
    assert f"x.{name}: not a readable" in refusal(path, name)


def test_a_null_among_ids_is_named_by_row(tmp_path):
    pq.write_table(pa.table({"input_ids": [[1], [2, None]]}), tmp_path / "x.parquet")
    assert "x.parquet#1: column 'input_ids'[1] is null" in refusal(tmp_path / "x.parquet", "parquet", content="ids")


def test_paths_that_lead_to_nothing_are_named(tmp_path):
    with pytest.raises(InputError, match="no such file or folder"):
        reader(tmp_path / "nowhere", "txt")
    with pytest.raises(InputError, match="no file matches this pattern"):
        reader(tmp_path / "*.txt", "txt")
    with pytest.raises(InputError, match=r"no file in this folder ends in \.jsonl or \.ndjson or \.json, as"):
        reader(tmp_path, "jsonl")


def test_a_file_with_pattern_characters_in_its_name_is_a_file(tmp_path):
    (tmp_path / "a[1].txt").write_text("x")
    assert contents(tmp_path / "a[1].txt", "txt") == ["x"]


def domains(path, input_format, **fields):
    return [(item.content, item.domain) for item in reader(path, input_format, domain_field="kind", **fields).items()]


def test_an_items_domain_is_read_beside_it_and_null_is_none(tmp_path):
    expected = [("a", "wiki"), ("b", ""), ("c", "code")]
    rows = [{"text": text, "kind": kind or None, "n": 1} for text, kind in expected]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    write_arrow(tmp_path / "a.arrow", pa.Table.from_pylist(rows))
    for ending in ("jsonl", "parquet", "arrow"):
        assert domains(tmp_path / f"a.{ending}", ending) == expected
    later = reader(tmp_path / "a.arrow", "arrow", domain_field="kind")
    assert [item.domain for item in later.items(list(later.items())[1].start)] == ["", "code"]


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"text": "a"}, "a.jsonl:1: no field 'kind'; the line has 'text' (see input.domain_field)"),
        ({"text": "a", "kind": 3}, "a.jsonl:1: field 'kind' is 3 (int), but a domain is text (see input.domain_field)"),
    ],
)
def test_a_domain_that_is_missing_or_no_text_is_said(tmp_path, row, sentence):
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    assert refusal(tmp_path / "a.jsonl", "jsonl", domain_field="kind") == sentence
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    assert "input.domain_field" in refusal(tmp_path / "a.parquet", "parquet", domain_field="kind")


def test_a_format_without_fields_has_no_domains():
    with pytest.raises(ConfigError, match=r"input\.format 'lines' has no fields, so it cannot have input\.domain_field 'kind'"):
        InputReader(InputConfig(format="lines", paths=("x",), domain_field="kind"))
    with pytest.raises(ConfigError, match=r"input\.format 'txt' holds content 'text', not 'ids'"):
        InputReader(InputConfig(format="txt", paths=("x",), content="ids"))


def test_a_format_that_nobody_brings_is_refused_with_those_that_are_there():
    with pytest.raises(ValueError, match="format is 'csv', but must be one of txt, lines, jsonl, parquet, arrow, dataset"):
        InputConfig(format="csv", paths=("x",))
