from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from kdcache.errors import InputError, TeacherError
from kdcache.format.record import ROLES
from kdcache.teacher import load_tokenizer

pytest.importorskip("transformers")

from tiny_model import CHAT_TEMPLATE

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "caf\u00e9 \U0001f600?"},
    {"role": "assistant", "content": "ok sure"},
    {"role": "user", "content": "more"},
    {"role": "assistant", "content": "no"},
]

TAGGED_TEMPLATE = CHAT_TEMPLATE.replace(
    "{{ message['content'] }}<|end|>\n",
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|end|>{% endif %}{{ '\\n' }}",  # Jinja drops a newline that follows a tag
)


@pytest.fixture(scope="module")
def folder(tiny_model_dir: Path) -> str:
    return str(tiny_model_dir)


def decoded(tokenizer, chat, keep) -> str:
    return tokenizer.decode(chat.input_ids[keep].tolist())


def test_text_goes_to_ids_and_back_without_truncation(folder: str):
    tokenizer = load_tokenizer(folder)
    text = "def f(x):\n    return '\u00e9\U0001f600' # " + "word " * 5000
    ids = tokenizer.encode(text, False)
    assert len(ids) > 5000
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode(text, True) == [0, *ids]


def test_a_chat_has_one_bos_and_the_text_of_its_template(folder: str):
    tokenizer = load_tokenizer(folder)
    chat = tokenizer.encode_chat(CHAT)
    assert tokenizer.decode(chat.input_ids.tolist()).startswith("<s><|system|>\nBe brief.<|end|>\n<|user|>\n")
    assert (chat.input_ids == 0).sum() == 1
    assert len(chat.input_ids) == len(chat.roles) == len(chat.assistant_mask)


def test_the_assistant_mask_covers_its_words_and_its_end_of_turn_and_no_more(folder: str):
    tokenizer = load_tokenizer(folder)
    chat = tokenizer.encode_chat(CHAT)
    assert decoded(tokenizer, chat, chat.assistant_mask) == "ok sure<|end|>no<|end|>"


def test_every_role_is_told(folder: str):
    tokenizer = load_tokenizer(folder)
    chat = tokenizer.encode_chat(CHAT)
    said = {role: decoded(tokenizer, chat, chat.roles == code) for code, role in enumerate(ROLES)}
    assert said["system"] == "Be brief."
    assert said["user"] == "caf\u00e9 \U0001f600?more"
    assert said["assistant"] == "ok sure<|end|>no<|end|>"
    assert "brief" not in said["none"]


def test_turns_start_with_their_headers(folder: str):
    tokenizer = load_tokenizer(folder)
    chat = tokenizer.encode_chat(CHAT)
    headers = [tokenizer.decode([int(chat.input_ids[start])]) for start in chat.turn_starts]
    assert headers == ["<s>", "<|user|>", "<|assistant|>", "<|user|>", "<|assistant|>"]


def test_generation_tags_give_the_same_mask_as_the_beginnings_of_the_chat(folder: str):
    plain, tagged = (
        load_tokenizer(folder).encode_chat(CHAT),
        load_tokenizer(folder, chat_template=TAGGED_TEMPLATE).encode_chat(CHAT),
    )
    for name in ("input_ids", "roles", "turn_starts", "assistant_mask"):
        assert getattr(plain, name).tolist() == getattr(tagged, name).tolist(), name


def test_a_generation_prompt_that_the_final_text_does_not_have_is_no_hindrance(folder: str):
    hiding = "{% if add_generation_prompt %}<|assistant|>\n"
    for template in (CHAT_TEMPLATE, TAGGED_TEMPLATE):
        tokenizer = load_tokenizer(folder, chat_template=template.replace(hiding, hiding + "<think>"))
        chat = tokenizer.encode_chat(CHAT)
        assert decoded(tokenizer, chat, chat.assistant_mask) == "ok sure<|end|>no<|end|>"
        assert len(chat.turn_starts) == 5


def test_a_template_that_refuses_is_quoted(folder: str):
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InputError, match="refuses these messages: roles must alternate"):
        load_tokenizer(folder, chat_template=template).encode_chat(CHAT)
    with pytest.raises(InputError, match="refuses these messages"):
        load_tokenizer(folder, chat_template="{% if %}").encode_chat(CHAT)
    with pytest.raises(InputError, match="empty text"):
        load_tokenizer(folder, chat_template="{# nothing #}").encode_chat(CHAT)


def test_malformed_messages_are_refused(folder: str):
    with pytest.raises(InputError, match="message 0 has the role 'bot'"):
        load_tokenizer(folder).encode_chat([{"role": "bot", "content": "x"}])


def test_a_tokenizer_without_a_template_refuses_chats_only(folder: str, tmp_path: Path):
    bare = Path(shutil.copytree(folder, tmp_path / "bare"))
    (bare / "chat_template.jinja").unlink()
    tokenizer = load_tokenizer(str(bare))
    assert tokenizer.identity.chat_template_fingerprint == ""
    assert tokenizer.encode("x", False)
    with pytest.raises(InputError, match=r"'bare' has no chat template; set input\.chat_template"):
        tokenizer.encode_chat(CHAT)


def test_the_fingerprint_is_of_meaning(folder: str, tmp_path: Path):
    ours = load_tokenizer(folder).identity
    assert ours.vocab_size == 512
    # Stored truncation, padding and layout of the file say nothing about what a text means.
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    rules = json.loads((other / "tokenizer.json").read_text("utf-8"))
    truncated = rules | {"truncation": {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}}
    (other / "tokenizer.json").write_text(json.dumps(truncated, indent=3), "utf-8")
    same = load_tokenizer(str(other))
    assert same.identity.fingerprint == ours.fingerprint
    assert len(same.encode("a b c d e f g h i j k l m n o p", False)) > 8
    # One merge less does.
    rules["model"]["merges"].pop()
    (other / "tokenizer.json").write_text(json.dumps(rules), "utf-8")
    assert load_tokenizer(str(other)).identity.fingerprint != ours.fingerprint


def test_another_template_is_another_template_fingerprint_and_the_same_tokenizer(folder: str):
    ours, other = load_tokenizer(folder).identity, load_tokenizer(folder, chat_template=TAGGED_TEMPLATE).identity
    assert other.fingerprint == ours.fingerprint
    assert other.chat_template_fingerprint != ours.chat_template_fingerprint


@pytest.mark.parametrize("names", [["tokenizer.json"], ["tokenizer.json", "tokenizer_config.json"]])
def test_a_folder_with_a_tokenizer_alone_is_enough(folder: str, tmp_path: Path, names: list[str]):
    for name in names:
        shutil.copy(Path(folder) / name, tmp_path)
    alone, whole = load_tokenizer(str(tmp_path)), load_tokenizer(folder)
    assert (alone.identity.vocab_size, alone.encode("a = 1", False)) == (512, whole.encode("a = 1", False))
    with pytest.raises(TeacherError, match=r"no tokenizer\.json in this folder; expected a tokenizer"):
        load_tokenizer(str(tmp_path.parent))


def test_a_tokenizer_that_does_not_load_is_one_sentence(tiny_model_dir: Path, tmp_path: Path):
    with pytest.raises(TeacherError, match="no such folder"):
        load_tokenizer(str(tmp_path / "none"))
    broken = Path(shutil.copytree(tiny_model_dir, tmp_path / "broken"))
    (broken / "tokenizer.json").write_text("{")
    with pytest.raises(TeacherError, match=r"the tokenizer .* does not load with transformers") as caught:
        load_tokenizer(str(broken))
    assert "\n" not in str(caught.value)


def test_a_prompt_ends_with_the_assistants_header_which_starts_its_turn(folder: str):
    tokenizer = load_tokenizer(folder)
    prompt = tokenizer.encode_prompt(CHAT[:4])
    text = tokenizer.decode(prompt.input_ids.tolist())
    assert text.endswith("<|user|>\nmore<|end|>\n<|assistant|>\n")
    headers = [tokenizer.decode([int(prompt.input_ids[start])]) for start in prompt.turn_starts]
    assert headers == ["<s>", "<|user|>", "<|assistant|>", "<|user|>", "<|assistant|>"]
    said = {role: decoded(tokenizer, prompt, prompt.roles == code) for code, role in enumerate(ROLES)}
    assert (said["user"], said["assistant"]) == ("caf\u00e9 \U0001f600?more", "ok sure<|end|>")
    # What a whole chat would be begins with it.
    whole = tokenizer.encode_chat(CHAT)
    assert whole.input_ids[: len(prompt.input_ids)].tolist() == prompt.input_ids.tolist()


def test_a_template_without_a_generation_prompt_has_the_answer_start_at_the_end(folder: str):
    template = CHAT_TEMPLATE.partition("{% if add_generation_prompt")[0]
    prompt = load_tokenizer(folder, chat_template=template).encode_prompt(CHAT[:2])
    assert prompt.turn_starts[-1] == len(prompt.input_ids)


def test_end_ids_are_the_tokenizers_own(folder: str):
    tokenizer = load_tokenizer(folder)
    assert [tokenizer.decode([i]) for i in tokenizer.end_ids] == ["</s>"]
