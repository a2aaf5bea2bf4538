"""Borders of turns from renderings that say who wrote each character: no tokenizer and no template engine."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from kdcache.errors import InputError
from kdcache.inputs.chat import Message
from kdcache.teacher.chat.marked_text import concatenate
from kdcache.teacher.chat.rendered import Rendered, Whole
from kdcache.teacher.chat.shapes import MarkedChat
from kdcache.teacher.chat.turns import find_spans


def render(variables) -> str:
    turns = [part for m in variables["messages"] for part in (f"[{m['role']}] ", m["content"].strip(), "\n")]
    return concatenate([*turns, "[assistant] " * variables["add_generation_prompt"]])


def render_folding(variables) -> str:
    """As templates that have no system role: it goes into the user's turn, and a chat without a user is refused."""
    messages = variables["messages"]
    if not any(m["role"] == "user" for m in messages):
        raise ValueError
    system = messages[0]["content"] + "\n" if messages[0]["role"] == "system" else ""
    rest = [m for m in messages if m["role"] != "system"]
    return render(variables | {"messages": [{**rest[0], "content": system + rest[0]["content"]}, *rest[1:]]})


def chat(*turns: str) -> list[Message]:
    return [dict(zip(("role", "content"), turn.split(":", 1), strict=True)) for turn in turns]


CHAT = chat("system:short", "user: hi ", "assistant:yo", "user:and?", "assistant:so")


def spans_of(messages: Sequence[Message], template=render):
    marked = MarkedChat(messages, {}, template)
    rendered = marked.render(marked.messages, False)
    assert isinstance(rendered, Rendered)
    return rendered.text, find_spans(marked.messages, Whole(rendered, [], []), marked.render)


def cut(text: str, contents: Sequence[tuple[int, int, int]]) -> list[tuple[int, str]]:
    return [(index, text[start:end]) for index, start, end in contents]


def test_every_message_is_found_and_the_assistants_reaches_to_the_end_of_its_turn():
    text, spans = spans_of(CHAT)
    assert cut(text, spans.contents) == [(0, "short"), (1, "hi"), (2, "yo\n"), (3, "and?"), (4, "so\n")]
    assert cut(text, spans.learnt) == [(2, "yo\n"), (4, "so\n")]
    headers = ["[system", "[user", "[assistant", "[user", "[assistant"]
    assert [text[start:].split("]")[0] for start in spans.turn_starts] == headers


def test_a_system_prompt_folded_into_the_users_turn_shares_it_and_keeps_its_role():
    text, spans = spans_of(CHAT, render_folding)
    assert cut(text, spans.contents)[:3] == [(0, "short"), (1, " hi"), (2, "yo\n")]
    assert len(spans.turn_starts) == 4
    assert spans.turn_starts[0] == 0


@pytest.mark.parametrize("word", ["yo", "user", "[", "assistant"])
def test_the_same_words_in_two_messages_and_in_the_template_are_told_apart(word: str):
    text, spans = spans_of(chat(f"user:{word}", f"assistant:{word}", f"user:{word}"))
    starts = [7, 7 + len(word) + 13, 7 + 2 * len(word) + 13 + 8]
    assert [start for _, start, _ in spans.contents] == starts
    assert cut(text, spans.learnt) == [(1, word + "\n")]


def test_thoughts_that_earlier_turns_lose_are_no_hindrance():
    def dropping(variables):
        *before, last = variables["messages"]
        return render(variables | {"messages": [{**m, "content": m["content"].split("/")[-1]} for m in before] + [last]})

    text, spans = spans_of(chat("user:hi", "assistant:hm/yo", "user:and?", "assistant:so/no"), dropping)
    assert cut(text, spans.learnt) == [(1, "yo\n"), (3, "so/no\n")]


@pytest.mark.parametrize(
    ("broken", "what"),
    [
        # The assistant's words are others'.
        (lambda v: str.__str__(render(v)).replace("yo", "YO"), "message 2 is: the template writes something else"),
        # Another text before the answer when it is there.
        (lambda v: render(v | {"messages": [m | {"role": "bot"} if m["content"] == "so" else m for m in v["messages"]]}),
         "message 4 starts"),
        (lambda v: render(v) + "." * (len(v["messages"]) == 3), "message 2 ends"),
    ],
)  # fmt: skip
def test_a_template_that_hides_the_assistants_part_is_refused_in_words(broken, what: str):
    with pytest.raises(InputError, match=what):
        spans_of(CHAT, broken)
