"""What people's rows hold becomes chats, the same from JSON lines and from tables; what is not used is named."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kdcache.config.capture import InputConfig
from kdcache.errors import ConfigError, InputError
from kdcache.inputs.chat import Chat
from kdcache.inputs.chat_items import chat_of
from kdcache.inputs.reader import ItemReader

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}
TOOL = {"name": "find", "parameters": {"type": "object", "properties": {"what": {"type": "string"}}}}
CALL = {"type": "function", "function": {"name": "find", "arguments": {"what": "x"}}}


def chat(row, field=None, *, is_table=False, variables=frozenset()) -> Chat:
    return chat_of(row, field, "x:1: field", is_table=is_table, variables=variables)


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"messages": [USER, ANSWER]}, [USER, ANSWER]),
        ({"messages": json.dumps([USER, ANSWER])}, [USER, ANSWER]),
        ({"messages": {"role": ["user", "assistant"], "content": ["hi", "yo"]}}, [USER, ANSWER]),
        ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]}, [USER, ANSWER]),
        ({"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "hi", "weight": 0}]},
         [{"role": "system", "content": "s"}, {"role": "user", "content": "hi", "weight": 0}]),
        ({"conversations": [{"from": "function_call", "value": '{"name": "find", "arguments": {"what": "x"}}'},
                            {"from": "observation", "value": "1"}]},
         [{"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "1"}]),
        ({"prompt": "hi", "completion": "yo"}, [USER, ANSWER]),
        ({"prompt": [USER, ANSWER, USER], "completion": [ANSWER]}, [USER, ANSWER | {"weight": 0}, USER, ANSWER]),
        ({"prompt": [USER]}, [USER]),
        ({"prompt": "hi", "completion": '[{"name": "find", "arguments": {}}]'},
         [USER, {"role": "assistant", "content": '[{"name": "find", "arguments": {}}]'}]),
        ({"messages": [USER, ANSWER | {"tool_calls": []}]}, [USER, ANSWER]),
        ({"messages": None, "conversations": [{"from": "human", "value": "hi"}]}, [USER]),
        ({"messages": None, "prompt": "hi", "completion": "yo"}, [USER, ANSWER]),
        ({"messages": [USER, {"role": "assistant", "content": None, "function_call": CALL["function"]}]},
         [USER, {"role": "assistant", "tool_calls": [CALL]}]),
        ({"messages": [USER, {"role": "assistant", "content": None, "tool_calls": json.dumps([CALL])}]},
         [USER, {"role": "assistant", "tool_calls": [CALL]}]),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}]}, [USER]),
        ({"messages": [USER], "system": "s"}, [{"role": "system", "content": "s"}, USER]),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [CALL]}]},
         [{"role": "assistant", "tool_calls": [CALL]}]),
        ({"messages": [{"role": "developer", "content": "s"}]}, [{"role": "developer", "content": "s"}]),
        ({"messages": [{"role": "assistant", "content": "yo", "reasoning_content": "hm"}]},
         [ANSWER | {"reasoning_content": "hm"}]),
        ({"messages": None}, []),
        ({"messages": []}, []),
    ],
)  # fmt: skip
def test_chats_in_every_shape_are_read(row, messages):
    assert chat(row).messages == messages


def test_what_stands_beside_the_messages_goes_to_the_template():
    row = {
        "messages": [USER],
        "tools": [TOOL],
        "documents": [{"title": "t"}],
        "chat_template_kwargs": {"enable_thinking": False},
    }
    for given in (row, {name: json.dumps(value) for name, value in row.items()}):
        made = chat(given)
        assert (made.tools, made.documents, made.arguments) == ([TOOL], [{"title": "t"}], {"enable_thinking": False})
        assert made.unused == ()
    assert chat({"messages": [USER], "functions": [TOOL]}).tools == [{"type": "function", "function": TOOL}]
    assert chat({"messages": [USER], "tools": "[]"}).tools is None
    packed = chat({"chat": json.dumps({"messages": [USER], "tools": [TOOL], "label": 1})})
    assert (packed.messages, packed.tools, packed.unused) == ([USER], [TOOL], ("'label' of the item is not used",))


def test_tools_as_json_text_within_a_list_or_as_null():
    assert chat({"messages": [USER], "tools": [json.dumps(TOOL)]}).tools == [TOOL]
    assert chat({"messages": [USER], "tools": "null"}).tools is None


def test_what_bears_on_prompt_or_mask_and_is_not_used_is_named():
    row = {"messages": [USER], "id": 3, "label": False, "weight": 0.5, "images": [b"x"], "rejected": [], "style": "dry"}
    assert chat(row).unused == tuple(f"{name!r} of the item is not used" for name in ("label", "weight", "images"))
    assert "'style' of the item is not used" in chat(row, variables=frozenset({"style"})).unused
    dpo = {"prompt": [USER], "chosen": [ANSWER], "rejected": [ANSWER]}
    assert chat(dpo).unused == ("'chosen' of the item is not used", "'rejected' of the item is not used")
    assert chat(dpo, "chosen").unused == ("'prompt' of the item is not used", "'rejected' of the item is not used")
    assert "system message of its own" in chat({"messages": [{"role": "system", "content": "a"}], "system": "b"}).unused[0]


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"messages": "hi"}, "'messages' is 'hi' (str), and that is not JSON"),
        ({"messages": [{"role": "oracle", "content": ""}]}, "'messages'[0].role is 'oracle' (str), but must be one of system"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "[0] has the type 'image_url', but only text is read",
        ),
        ({"messages": [ANSWER | {"weight": 0.5}]}, "'messages'[0].weight is 0.5, but must be 0 or 1"),
        ({"messages": [ANSWER | {"weight": 1, "train": False}]}, "weight and train disagree"),
        ({"messages": [USER | {"train": True}]}, "asks to learn a message of the user"),
        ({"messages": [USER], "tools": ["find"]}, "'tools' is ['find'] (list), but must be a list of objects"),
        ({"messages": [USER], "tools": "find"}, "'tools' is 'find' (str), and that is not JSON"),
        ({"messages": [USER], "chat_template_kwargs": {"tokenize": True}}, "sets 'tokenize', which items may not set"),
        ({"prompt": "hi", "completion": [ANSWER]}, "'prompt' and 'completion' are str and list"),
        ({"conversations": [{"from": "function_call", "value": "find it"}]}, "and that is not JSON"),
        ({"prompt": "hi", "chosen": [ANSWER]}, "without a 'completion', it must be a list of messages"),
        (
            {"messages": {"role": ["user", "assistant"], "content": ["hi"]}},
            "their lengths differ: 'role' has 2, 'content' has 1",
        ),
    ],
)
def test_what_cannot_be_read_is_one_sentence(row, sentence):
    with pytest.raises(InputError) as caught:
        chat(row)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_same_chats_come_from_json_lines_and_from_a_table_that_fills_in_nulls(tmp_path):
    rows = [
        {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [{"name": "a", "arguments": {"city": "Rome"}}]}],
         "tools": [{"name": "a", "parameters": {"city": {"type": "string"}}}], "domain": "x"},
        {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [{"name": "b", "arguments": {"zone": "UTC"}}]},
                      ANSWER | {"weight": 0}],
         "tools": [{"name": "b", "parameters": {"zone": {"type": "string", "enum": ["UTC"]}}}], "domain": "y"},
    ]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    read = {
        form: list(ItemReader(InputConfig(
            format=form, paths=(str(tmp_path / f"a.{form}"),), content="messages", domain_field="domain")).items())
        for form in ("jsonl", "parquet")
    }  # fmt: skip
    for ours, theirs, row in zip(read["jsonl"], read["parquet"], rows, strict=True):
        assert ours.content_bytes() == theirs.content_bytes()
        assert isinstance(theirs.content, Chat)
        assert (theirs.content.messages, theirs.content.tools, theirs.domain) == (row["messages"], row["tools"], row["domain"])
    # JSON means the null that it says.
    kept = {"messages": [{"role": "assistant", "tool_calls": [{"name": "a", "arguments": {"zone": None}}]}]}
    assert chat(kept).messages == kept["messages"]
    assert chat(kept, is_table=True).messages[0]["tool_calls"] == [{"name": "a", "arguments": {}}]


def test_pairs_of_texts_and_chats_as_text_are_read_from_tables(tmp_path):
    path = tmp_path / "a.parquet"
    fields = {"format": "parquet", "paths": (str(path),), "content": "messages"}
    for row in ({"prompt": "hi", "completion": "yo"}, {"conversations": json.dumps([USER, ANSWER]), "id": 1}):
        pq.write_table(pa.Table.from_pylist([row]), path)
        (item,) = ItemReader(InputConfig(**fields)).items()
        assert isinstance(item.content, Chat)
        assert item.content.messages == [USER, ANSWER]
    pq.write_table(pa.table({"id": [1]}), path)
    with pytest.raises(InputError, match=r"no column 'messages'.* a chat is one of messages, .*, or prompt and completion\)"):
        list(ItemReader(InputConfig(**fields)).items())


def test_a_row_of_another_shape_is_told_how_it_becomes_a_chat(tmp_path):
    rows = {
        "make 'instruction' followed by 'input' the prompt and 'output' the completion": ("instruction", "input", "output"),
        "make 'question' the prompt and 'answer' the completion": ("id", "question", "answer"),
    }
    for advice, names in rows.items():
        for format in ("jsonl", "parquet"):
            path = tmp_path / f"a.{format}"
            row = dict.fromkeys(names, "x")
            path.write_text(json.dumps(row)) if format == "jsonl" else pq.write_table(pa.Table.from_pylist([row]), path)
            with pytest.raises(InputError, match=advice):
                list(ItemReader(InputConfig(format=format, paths=(str(path),), content="messages")).items())
            with pytest.raises(InputError, match=r"'chat'.* \(see input\.field\)$"):
                list(ItemReader(InputConfig(format=format, paths=(str(path),), content="messages", field="chat")).items())


def test_arguments_of_the_template_are_checked():
    from kdcache.config.capture import CaptureConfig
    from kdcache.config.load import convert_config

    for wrong, sentence in (
        ({"template_arguments": {"tools": []}}, "template_arguments holds 'tools'"),
        ({"template_time": "today"}, "template_time is 'today', expected a date or time as in 2026-01-31"),
        ({"content": "text", "one_item_per": "answer"}, "for content 'messages' only"),
    ):
        given = {"format": "jsonl", "paths": ["x"], "content": "messages"} | wrong
        with pytest.raises(ConfigError, match=sentence):
            convert_config({"input": given, "teacher": {"model": "x"}, "out": "y"}, CaptureConfig)
