from __future__ import annotations

import numpy as np
import pytest

from kdcache.errors import ConfigError, InputError, TeacherError
from kdcache.teacher import load_tokenizer
from kdcache.teacher.fake import BOS_ID, END_ID

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo!"}, {"role": "user", "content": ""}]


def test_text_goes_to_bytes_and_back():
    tokenizer = load_tokenizer("fake")
    text = "caf\u00e9 \U0001f600\n"
    assert tokenizer.encode(text, False) == list(text.encode())
    assert tokenizer.encode(text, True) == [BOS_ID, *text.encode()]
    assert tokenizer.decode(tokenizer.encode(text, True)) == "<bos>" + text
    with pytest.raises(TeacherError, match="9999 is not an id"):
        tokenizer.decode([9999])


def test_a_chat_knows_its_roles_turns_and_what_the_assistant_produced():
    tokenizer = load_tokenizer("fake")
    chat = tokenizer.encode_chat(CHAT)
    assert tokenizer.decode(chat.input_ids.tolist()) == "<bos><user>hi<end><assistant>yo!<end><user><end>"
    assert chat.roles.tolist() == [0, 0, 2, 2, 0, 0, 3, 3, 3, 3, 0, 0]
    assert chat.turn_starts.tolist() == [0, 5, 10]
    produced = chat.input_ids[chat.assistant_mask]
    assert produced.tolist() == [*b"yo!", END_ID]
    assert max(chat.input_ids) < tokenizer.identity.vocab_size


def test_a_template_for_the_fake_tokenizer_is_refused():
    with pytest.raises(ConfigError, match=r"input\.chat_template: the fake tokenizer"):
        load_tokenizer("fake", chat_template="{{ messages }}")


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ([], "empty list"),
        ("hello", "must be a list .* not str"),
        (["hello"], "message 0 must be a .* not str"),
        ([{"content": "x"}], r"message 0 has no 'role'; its keys are \['content'\]"),
        ([CHAT[0], {"role": "user"}], "message 1 has no 'content'"),
        ([{"role": "bot", "content": "x"}], "role 'bot'; expected one of system, user, assistant, tool"),
        ([{"role": "none", "content": "x"}], "role 'none'"),
        ([{"role": "user", "content": None}], "content must be text, not NoneType"),
        ([{"role": "user", "content": [{"type": "text"}]}], "content must be text, not list"),
    ],
)
def test_malformed_messages_are_refused_in_words(messages: object, sentence: str):
    with pytest.raises(InputError, match=sentence):
        load_tokenizer("fake").encode_chat(messages)  # pyright: ignore[reportArgumentType]


def test_fingerprints_are_the_same_each_time():
    assert load_tokenizer("fake").identity == load_tokenizer("fake").identity
    assert np.array_equal(load_tokenizer("fake").encode_chat(CHAT).roles, load_tokenizer("fake").encode_chat(CHAT).roles)


def test_a_prompt_is_a_chat_and_the_assistants_header():
    tokenizer = load_tokenizer("fake")
    messages = [{"role": "user", "content": "hi"}]
    chat, prompt = tokenizer.encode_chat(messages), tokenizer.encode_prompt(messages)
    assert prompt.input_ids.tolist() == [*chat.input_ids.tolist(), 260]
    assert prompt.turn_starts.tolist() == [0, len(chat.input_ids)]
    answered = tokenizer.encode_chat([*messages, {"role": "assistant", "content": "ho"}])
    assert answered.input_ids.tolist() == [*prompt.input_ids.tolist(), *b"ho", *tokenizer.end_ids]
