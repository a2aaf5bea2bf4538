"""Shapes of templates around calls of tools, thoughts and ends of turns: what is learnt, and what is said of the rest."""

from __future__ import annotations

import pytest
from chat_families import CHATML, write_tokenizer
from test_chat_families import CHAT, learnt, load

from kdcache.errors import InputError
from kdcache.inputs.chat import Chat

pytest.importorskip("transformers")

CALL = {"type": "function", "function": {"name": "find", "arguments": {"q": "Rome", "n": 3}}}
WITH_CALL = [
    CHAT[1],
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "sunny"},
    {"role": "assistant", "content": "yes"},
]
USER = "{% if m.role == 'user' %}<|User|>{{ m.content }}<|eot|>"
CALL_NAMED_AGAIN = (
    "{% for m in messages %}" + USER + "{% elif m.role == 'tool' %}<|start|>"
    "{{ messages[loop.index0 - 1].tool_calls[0].function.name }} to=assistant<|message|>{{ m.content | tojson }}<|end|>"
    "{% elif m.tool_calls %}<|start|>assistant to={{ m.tool_calls[0].function.name }}<|message|>"
    "{{ m.tool_calls[0].function.arguments | tojson }}<|return|>"
    "{% else %}<|start|>assistant<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
THOUGHT_OPENED = (
    "{% for m in messages %}<|im_start|>{{ 'user' if m.role == 'tool' else m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
CALLS_BESIDE_NULL = (
    "{% for m in messages %}" + USER + "{% elif m.role == 'tool' %}<|tool|>{{ m.content }}<|eot|>"
    "{% elif m.content is none %}<|Assistant|>{% for call in m.tool_calls %}{{ call.function.name }}{% endfor %}</s>"
    "{% else %}<|Assistant|>{{ m.content }}</s>{% endif %}{% endfor %}{% if add_generation_prompt %}<|Assistant|>{% endif %}"
)
FIELD_OF_A_TEXT = CHATML.replace(
    "{{ m.content }}",
    "{{ m.content.content if m.content.content is defined else m.content }}{{ (m.tool_calls or '') | string }}",
)
CALL_TAGS = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% for call in m.tool_calls or [] %}<|head|>"
    "{{ call.function.name }}<|tail|>\n<|end|>{% endfor %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TWO_ENDS = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% else %}</s>{% endif %}"
)
OWN_SYSTEM = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nYou are it.<|im_end|>\n{% endif %}"
    + CHATML.removeprefix("{% for m in messages %}")
)
LOSES_THOUGHTS = CHATML.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizers") / "bytes", "bytes")


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        (CALL_NAMED_AGAIN, [' to=find<|message|>{"q": "Rome", "n": 3}<|return|>', "<|message|>yes<|end|>"]),
        (
            THOUGHT_OPENED,
            [
                '<tool_call>\n{"name": "find", "arguments": {"q": "Rome", "n": 3}}\n</tool_call><|im_end|>',
                "\n</think>\n\nyes<|im_end|>",
            ],
        ),
        (CALLS_BESIDE_NULL, ["find</s>", "yes</s>"]),
        (CALL_TAGS, ["\n<|head|>find<|tail|>\n<|end|>", "\nyes"]),
    ],
)
def test_calls_are_learnt_whole(folder, template: str, wanted: list[str]):
    assert learnt(load(folder, template), WITH_CALL) == wanted


def test_a_template_may_ask_a_text_for_a_field(folder):
    assert learnt(load(folder, FIELD_OF_A_TEXT), CHAT) == ["yes<|im_end|>", "no and no<|im_end|>"]


def test_what_follows_the_token_that_ends_a_turn_is_the_templates(folder):
    assert learnt(load(folder, TWO_ENDS), CHAT) == ["yes<|end|>", "no and no<|end|>"]


def test_a_header_that_others_have_too_is_not_the_assistants(folder):
    with pytest.raises(InputError, match="assistant's message 0 starts"):
        load(folder, OWN_SYSTEM).encode_chat(CHAT[2:])
    assert learnt(load(folder, OWN_SYSTEM), CHAT) == ["yes<|im_end|>", "no and no<|im_end|>"]


def test_thoughts_that_the_template_leaves_out_are_named(folder):
    thinking = [*CHAT[:2], {"role": "assistant", "content": "<think>\nwhy\n</think>\n\nyes"}]
    tokens = load(folder, LOSES_THOUGHTS).encode_chat(Chat(thinking))
    what = "a part of 'content' of a message of role 'assistant', such as its thoughts: the chat template leaves it out"
    assert tokens.notes == (what,)
    # What is only trimmed is not lost.
    trims = CHATML.replace("m.content", "m.content | trim")
    assert load(folder, trims).encode_chat([CHAT[1], {"role": "assistant", "content": "  yes \n"}]).notes == ()


def test_an_answer_that_says_nothing_is_named(folder):
    said = "an assistant's message says nothing: that its turn ends at once is learnt"
    tokenizer = load(folder, CHATML)
    assert tokenizer.encode_chat([CHAT[1], {"role": "assistant", "content": " "}]).notes == (said,)
    assert tokenizer.encode_chat([CHAT[1], {"role": "assistant", "content": "", "weight": 0}]).notes == ()
