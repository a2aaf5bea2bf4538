from __future__ import annotations

from collections.abc import Sequence

import pytest

from kdcache.errors import InputError
from kdcache.teacher.chat_turns import find_spans
from kdcache.teacher.tokenizer import Message


def render(messages: Sequence[Message], generation_prompt: bool) -> str:
    text = "".join(f"[{m['role']}] {m['content'].strip()}\n" for m in messages)
    return text + "[assistant] " * generation_prompt


def render_folding(messages: Sequence[Message], generation_prompt: bool) -> str | None:
    """As templates that have no system role: it goes into the user's turn, and a chat without a user is refused."""
    if not any(m["role"] == "user" for m in messages):
        return None
    system = messages[0]["content"] + "\n" if messages[0]["role"] == "system" else ""
    rest = [m for m in messages if m["role"] != "system"]
    return render([{**rest[0], "content": system + rest[0]["content"]}, *rest[1:]], generation_prompt)


def chat(*turns: str) -> list[Message]:
    return [dict(zip(("role", "content"), turn.split(":", 1), strict=True)) for turn in turns]


CHAT = chat("system:short", "user: hi ", "assistant:yo", "user:and?", "assistant:so")


def cut(text: str, contents: Sequence[tuple[str, int, int]]) -> list[tuple[str, str]]:
    return [(role, text[start:end]) for role, start, end in contents]


def test_every_message_is_found_and_the_assistants_reaches_to_the_end_of_its_turn():
    text = render(CHAT, False)
    spans = find_spans(CHAT, text, render)
    assert cut(text, spans.contents) == [
        ("system", "short"),
        ("user", "hi"),
        ("assistant", "yo\n"),
        ("user", "and?"),
        ("assistant", "so\n"),
    ]
    assert [text[start:].split("]")[0] for start in spans.turn_starts] == [
        "[system",
        "[user",
        "[assistant",
        "[user",
        "[assistant",
    ]


def test_a_system_prompt_folded_into_the_users_turn_shares_it_and_keeps_its_role():
    text = render_folding(CHAT, False)
    assert text is not None
    spans = find_spans(CHAT, text, render_folding)
    assert cut(text, spans.contents)[:3] == [("system", "short"), ("user", "hi"), ("assistant", "yo\n")]
    assert len(spans.turn_starts) == 4
    assert spans.turn_starts[0] == 0


def test_the_same_words_in_two_messages_are_told_apart():
    same = chat("user:yo", "assistant:yo", "user:yo")
    text = render(same, False)
    spans = find_spans(same, text, render)
    assert [start for _, start, _ in spans.contents] == [7, 22, 32]


@pytest.mark.parametrize(
    ("broken", "what"),
    [
        # Thoughts that the template drops from all turns but the last: the beginning of the chat reads otherwise.
        (lambda m, g: render(m, g).replace("yo", "<think>") if len(m) == 3 else render(m, g), "message 2 ends"),
        # A generation prompt that opens a thought which the final text does not have.
        (lambda m, g: render(m, g) + "<think>" * g, "message 2 starts"),
        (lambda m, g: None if g else render(m, g), "message 2 starts"),
    ],
)
def test_a_template_that_hides_the_assistants_part_is_refused_in_words(broken: object, what: str):
    with pytest.raises(InputError, match=what):
        find_spans(CHAT, render(CHAT, False), broken)  # pyright: ignore[reportArgumentType]
