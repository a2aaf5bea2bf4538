"""Chats in the shapes of real families: learnt are the assistant's words and the token that ends its turn, or nothing."""

from __future__ import annotations

import os
from itertools import pairwise

import numpy as np
import pytest
from chat_families import ALWAYS_OPEN, CHANNELS, CHATML, FAMILIES, HEADERS_ALWAYS, MACROS, PHI, QWEN, write_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kdcache.errors import InputError
from kdcache.format.record import ROLES
from kdcache.inputs.chat import Chat
from kdcache.teacher import load_tokenizer

pytest.importorskip("transformers")

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "s"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "user"},
    {"role": "assistant", "content": "no and no"},
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """One tokenizer of each kind; templates are set by name."""
    base = tmp_path_factory.mktemp("tokenizers")
    return {kind: write_tokenizer(base / kind, kind) for kind in ("bytes", "pieces", "words")}


_LOADED: dict[tuple[str, str], object] = {}


def load(folder: str, template: str):
    if (folder, template) not in _LOADED:
        tokenizer = load_tokenizer(folder, chat_template=template)
        tokenizer.underlying.eos_token = "<|im_end|>" if "im_start" in template else "</s>"
        _LOADED[folder, template] = tokenizer
    return _LOADED[folder, template]


def runs(keep) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(np.concatenate([[0], keep, [0]])))
    return [(int(a), int(b)) for a, b in list(pairwise(edges))[::2]]


def learnt(tokenizer, chat) -> list[str]:
    tokens = tokenizer.encode_chat(chat)
    return [tokenizer.decode(tokens.input_ids[a:b].tolist()) for a, b in runs(tokens.assistant_mask)]


def said(tokenizer, tokens, role: str) -> list[str]:
    return [tokenizer.decode(tokens.input_ids[a:b].tolist()) for a, b in runs(tokens.roles == ROLES.index(role))]


def squeezed(text: str) -> str:
    return "".join(text.split())


@pytest.mark.parametrize("kind", ["bytes", "pieces", "words"])
def test_every_family_learns_the_answers_and_their_end_and_nothing_else(folders, kind):
    for family, (template, end) in FAMILIES.items():
        tokenizer = load(folders[kind], template)
        last = CHANNELS_LAST if template == CHANNELS else "{}" + end
        before = {QWEN: "<think></think>", CHANNELS: "<|channel|>final<|message|>"}.get(template, "")
        wanted = [before * (template == CHANNELS) + "yes" + end, before + last.format("noandno")]
        if kind == "words":
            wanted = [text.replace("<think></think>", "<unk><unk>").replace(">final<", "><unk><") for text in wanted]
        got = [squeezed(text) for text in learnt(tokenizer, CHAT)]
        assert got == wanted, family


CHANNELS_LAST = "{}<|return|>"


def test_every_family_knows_who_wrote_what(folders):
    for family, (template, _) in FAMILIES.items():
        tokenizer = load(folders["bytes"], template)
        tokens = tokenizer.encode_chat(CHAT)
        got = {role: [text.strip() for text in said(tokenizer, tokens, role)] for role in ("system", "user")}
        assert got == {"system": ["Be brief."], "user": ["s", "user"]}, family
        assert tokens.turn_starts[0] == 0, family
        assert len(tokens.turn_starts) in (4, 5), family


def test_thoughts_are_learnt_where_the_template_keeps_them(folders):
    thinking = [dict(message) for message in CHAT]
    thinking[2]["content"] = "<think>\nhm\n</think>\n\nyes"
    thinking[4]["content"] = "<think>\nso\n</think>\n\nno"
    tokenizer = load(folders["bytes"], QWEN)
    assert learnt(tokenizer, thinking) == ["yes<|im_end|>", "<think>\nso\n</think>\n\nno<|im_end|>"]
    assert learnt(tokenizer, Chat(CHAT, arguments={"enable_thinking": False}))[1] == "no and no<|im_end|>"
    thinking = [*CHAT[:4], {"role": "assistant", "content": "no", "thinking": "so"}]
    tokenizer = load(folders["bytes"], CHANNELS)
    assert learnt(tokenizer, thinking)[1] == (
        "<|channel|>analysis<|message|>so<|end|><|start|>assistant<|channel|>final<|message|>no<|return|>"
    )


def test_tool_calls_are_learnt_whole_and_tool_results_are_the_tools(folders):
    call = {"type": "function", "function": {"name": "find", "arguments": {"what": 'a "b"', "deep": {"n": None}}}}
    chat = [
        *CHAT[:2],
        {"role": "assistant", "tool_calls": [call, call]},
        {"role": "tool", "content": "one"},
        {"role": "tool", "content": "two"},
        {"role": "assistant", "content": "yes"},
    ]
    tokenizer = load(folders["bytes"], QWEN)
    tokens = tokenizer.encode_chat(Chat(chat, tools=[{"name": "find"}]))
    one = '\n<tool_call>\n{"name": "find", "arguments": {"what": "a \\"b\\"", "deep": {"n": null}}}\n</tool_call>'
    assert learnt(tokenizer, Chat(chat, tools=[{"name": "find"}])) == [
        f"{one}{one}<|im_end|>",
        "<think>\n\n</think>\n\nyes<|im_end|>",
    ]
    assert said(tokenizer, tokens, "tool") == ["one", "two"]
    assert '{"name": "find"}' in tokenizer.decode(tokens.input_ids.tolist())
    # A template that does not write the calls is named, and so is a row's tools.
    notes = load(folders["bytes"], CHATML).encode_chat(Chat(chat, tools=[{"name": "find"}])).notes
    assert notes[:2] == (
        "'tools' of the item: the chat template does not read it",
        "'tool_calls' of a message of role 'assistant': the chat template does not write it",
    )


CALLS_AS_TEXT = (
    "{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}{% elif m.content is none %}<|Assistant|>"
    "{% for call in m.tool_calls %}{{ '<|start|>' + call.function.name + ' ' + call.function.arguments + '<|end|>' }}"
    "{% endfor %}</s>{% else %}<|Assistant|>{{ m.content }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|>{% endif %}"
)
CALLS_WITHOUT_PROMPT = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]{% elif m.tool_calls %}<|tool|>"
    "[{{ m.tool_calls[0].function | tojson }}]</s>{% else %} {{ m.content | trim }}</s>{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("arguments", [{"q": "x"}, '{"q": "x"}'])
def test_arguments_of_calls_take_the_shape_that_the_template_takes(folders, arguments):
    call = {"type": "function", "function": {"name": "find", "arguments": arguments}}
    chat = [CHAT[1], {"role": "assistant", "tool_calls": [call]}, CHAT[3], CHAT[4]]
    said = {
        CALLS_AS_TEXT: '<|start|>find {"q": "x"}<|end|></s>',
        CALLS_WITHOUT_PROMPT: '<|tool|>[{"name": "find", "arguments": {"q": "x"}}]</s>',
        QWEN: '\n<tool_call>\n{"name": "find", "arguments": {"q": "x"}}\n</tool_call><|im_end|>',
    }
    for template, wanted in said.items():
        assert learnt(load(folders["bytes"], template), chat)[0] == wanted
    # A template without calls would have the end of the turn learnt in their place.
    tokens = load(folders["bytes"], CHATML).encode_chat(chat)
    assert learnt(load(folders["bytes"], CHATML), chat) == ["no and no<|im_end|>"]
    assert any("or calls the template leaves out: it is not learnt" in note for note in tokens.notes)


def test_a_template_that_opens_a_turn_with_nothing_before_it_is_refused(folders):
    with pytest.raises(InputError, match="message 4 ends: the template writes the same with a generation prompt and without"):
        load(folders["bytes"], HEADERS_ALWAYS).encode_chat(CHAT)
    # Its end token is not the tokenizer's.
    with pytest.raises(InputError, match="message 4 ends"):
        load(folders["bytes"], ALWAYS_OPEN.replace("<|im_end|>", "<|end|>")).encode_chat(CHAT)


def test_generation_tags_decide_and_the_end_token_is_added(folders):
    tagged = CHATML.replace(
        "{{ m.content }}<|im_end|>",
        "{% if m.role == 'assistant' and loop.last %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}<|im_end|>",
    )
    assert learnt(load(folders["bytes"], tagged), CHAT) == ["no and no<|im_end|>"]
    # Header and line end inside the tags are still the template's.
    whole_turn = "{% generation %}<|im_start|>assistant\n{{ m.content }}<|im_end|>\n{% endgeneration %}{% continue %}"
    around = CHATML.replace("<|im_start|>{{", "{% if m.role == 'assistant' %}" + whole_turn + "{% endif %}<|im_start|>{{")
    assert learnt(load(folders["bytes"], around), CHAT) == ["yes<|im_end|>", "no and no<|im_end|>"]


def test_messages_of_weight_0_are_not_learnt(folders):
    chat = [dict(message) for message in CHAT]
    chat[2]["weight"], chat[4]["train"] = 0, True
    tokenizer = load(folders["bytes"], CHATML)
    assert learnt(tokenizer, chat) == ["no and no<|im_end|>"]
    tokens = tokenizer.encode_chat(chat)
    assert tokenizer.decode(tokens.input_ids[tokens.excluded].tolist()) == "yes<|im_end|>"
    for wrong in ({"weight": 0.5}, {"train": "yes"}, {"weight": 1, "training": False}):
        with pytest.raises(InputError, match=r"message 2.*(must be 0 or 1|disagree)"):
            tokenizer.encode_chat([*CHAT[:2], CHAT[2] | wrong])


def test_a_developers_words_are_the_systems(folders):
    chat = [{"role": "developer", "content": "Be brief."}, *CHAT[1:]]
    for template, header in ((CHATML, "<|im_start|>system"), (CHANNELS, "You are a model.")):
        tokenizer = load(folders["bytes"], template)
        tokens = tokenizer.encode_chat(chat)
        assert said(tokenizer, tokens, "system") == ["Be brief."]
        assert header in tokenizer.decode(tokens.input_ids.tolist())


ODD = (
    "s", "user", "assistant", "<|im_end|>", "<|im_start|>assistant\n", "<|end|>", "</s>", "[/INST]", "Be brief.",
    "{{ m.content }}", "<start_of_turn>model\n", "{% generation %}", "\ufeffx", "caf\u00e9 \U0001f600", "\n\nyes",
    "yes\n\n", " ", "", "x", "user: no\n", "<|assistant|>", "<|channel|>final<|message|>", "@0@", "Today", "\u2028", "a\u0300",
)  # fmt: skip
CONTENTS = st.one_of(
    st.sampled_from(ODD), st.lists(st.sampled_from(ODD), min_size=2, max_size=3).map("".join), st.text(max_size=6)
)


NUM_EXAMPLES, KIND = int(os.environ.get("CHAT_EXAMPLES", "12")), os.environ.get("CHAT_TOKENIZER", "bytes")


@st.composite
def chats(draw):
    system = draw(st.booleans())
    turns = draw(st.integers(1, 3))
    messages = [{"role": "system", "content": draw(CONTENTS)}] if system else []
    for _ in range(turns):
        messages += [{"role": role, "content": draw(CONTENTS)} for role in ("user", "assistant")]
    return messages


@settings(max_examples=NUM_EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(chats())
def test_what_is_learnt_is_what_the_assistant_says_and_its_end_or_the_chat_is_refused(folders, chat):
    for family, (template, end) in FAMILIES.items():
        tokenizer = load(folders[KIND], template)
        answers = [message["content"] for message in chat if message["role"] == "assistant"]
        try:
            tokens = tokenizer.encode_chat(chat)
        except InputError:
            continue
        if any("turn is empty" in note for note in tokens.notes):
            continue
        got = tokenizer.decode(tokens.input_ids[tokens.assistant_mask].tolist())
        ends = [end] * len(answers)
        before = [""] * len(answers)
        if template == QWEN:
            before[-1] = "<think>\n\n</think>\n\n"
        if template == CHANNELS:
            before, ends[-1] = ["<|channel|>final<|message|>"] * len(answers), "<|return|>"
        if template == MACROS:  # nothing between its tags
            ends = [end if answer else "" for answer in answers]
        wanted = "".join(b + answer + e for b, answer, e in zip(before, answers, ends, strict=True))
        assert squeezed(got) == squeezed(wanted), (family, chat)


def test_odd_words_are_hardly_ever_a_reason_to_refuse(folders):
    refused = []
    for family, (template, _) in FAMILIES.items():
        tokenizer = load(folders["bytes"], template)
        for word in ODD:
            chat = [{"role": "user", "content": f"x{word}"}, {"role": "assistant", "content": word}] * 2
            try:
                tokenizer.encode_chat(chat)
            except InputError as error:
                refused.append((family, word, str(error)))
    assert refused == []


def test_the_clock_is_the_one_that_was_set(folders):
    from datetime import datetime

    tokenizer = load_tokenizer(folders["bytes"], chat_template=FAMILIES["llama"][0])
    assert tokenizer.reads_clock
    tokenizer.set_clock(datetime(2031, 5, 7))
    assert "07 May 2031" in tokenizer.decode(tokenizer.encode_chat(CHAT).input_ids.tolist())


def test_a_template_that_draws_is_refused(folders):
    with pytest.raises(InputError, match="it draws at random, and would give another text each time"):
        load(folders["bytes"], "{{ range(9999) | random }}" * 3 + PHI).encode_chat(CHAT)
