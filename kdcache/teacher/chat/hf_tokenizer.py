"""Tokenizers of `transformers`: hub ids and local folders, fingerprints of meaning, chats with roles and assistant masks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from kdcache.errors import InputError, TeacherError
from kdcache.format.manifest import TokenizerIdentity, fingerprint
from kdcache.inputs.chat import Chat, Message, says_nothing
from kdcache.shown import first_line
from kdcache.teacher.chat.jinja_template import ChatTemplate
from kdcache.teacher.chat.rendered import ChatSpans, Rendered
from kdcache.teacher.chat.shapes import MarkedChat, notes_of, shapes
from kdcache.teacher.chat.tokens import ChatEncoding, words_of
from kdcache.teacher.chat.turns import find_spans
from kdcache.teacher.checkpoint import check_model_name, short_name, why_not_loaded
from kdcache.teacher.tokenizer import ChatTokens, check_chat

PROBES = ("Hello world", " two  spaces\tand\n\nlines", "naive cafe 12345.678", "x = [1, 2]  # \u00e9\u4e2d\U0001f600")
"""Texts whose ids represent the rules of a tokenizer that has no serialised form."""


class HfTokenizer:
    """A tokenizer of `transformers`; see `Tokenizer`."""

    def __init__(
        self, name: str, revision: str | None = None, chat_template: str | None = None, *, trust_remote_code: bool = False
    ) -> None:
        """Load it; trust_remote_code: run the Python code that comes with it.

        Raises:
            TeacherError: it does not load.
        """
        check_model_name(name, is_tokenizer=True)
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
        except Exception as error:  # whatever a file, remote code or the hub client can raise
            reason = why_not_loaded(name, first_line(error))
            raise TeacherError(f"the tokenizer {name!r} does not load with transformers: {reason}") from error
        if chat_template is not None:
            self._tokenizer.chat_template = chat_template
        self._template = _template_of(self._tokenizer)
        self._templates: dict[str, ChatTemplate] = {}
        self._moment = datetime.now()
        # Texts longer than the model are cut into windows later; the tokenizer's warning would be a false alarm.
        self._tokenizer.model_max_length = 2**62
        vocab = self._tokenizer.get_vocab()
        self._identity = TokenizerIdentity(
            name=short_name(name),
            fingerprint=tokenizer_fingerprint(self._tokenizer),
            chat_template_fingerprint=_template_fingerprint(self._tokenizer),
            vocab_size=max(vocab.values()) + 1,
        )
        self._special_ids = np.array([i for i, t in self._tokenizer.added_tokens_decoder.items() if t.special], np.int64)

    @property
    def identity(self) -> TokenizerIdentity:
        """See `Tokenizer`."""
        return self._identity

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """See `Tokenizer`."""
        return self._tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]

    def decode(self, ids: Sequence[int]) -> str:
        """See `Tokenizer`."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    @property
    def template_variables(self) -> frozenset[str]:
        """See `Tokenizer`."""
        return self._compiled(self._template).variables if self._template else frozenset()

    @property
    def reads_clock(self) -> bool:
        """See `Tokenizer`."""
        return "strftime_now" in self._template

    def set_clock(self, moment: datetime) -> None:
        """See `Tokenizer`."""
        self._moment = moment

    def encode_chat(self, chat: Chat | Sequence[Message]) -> ChatTokens:
        """See `Tokenizer`.

        The template's text holds its own special tokens, so none are added, not even a
        second BOS. Who wrote what is proven from the text (`turns`), and carried over to the tokens by the
        characters that they cover (`tokens`).
        """
        chat = check_chat(chat)
        marked, rendered, notes = self._choose_shape(chat, generation_prompt=False)
        tokens = self._tokens_of(rendered)
        lost_calls = [index for index, name in marked.lost_keys(rendered) if name == "tool_calls"]
        whole = tokens.whole(has_tags=self._template_of(chat).has_generation_tags)
        spans = find_spans(marked.messages, replace(whole, lost_calls=lost_calls), marked.render)
        if spans.endless:
            notes.append("an assistant's turn has no token that ends it: where it stops is not learnt")
        if spans.lost:
            notes.append("an assistant's message whose words or calls the template leaves out: it is not learnt")
        if spans.empty:
            notes.append("an assistant's turn is empty, and it cannot be proven which token ends it: it is not learnt")
        if any(says_nothing(message) for index, message in enumerate(chat.messages) if index not in spans.empty):
            notes.append("an assistant's message says nothing: that its turn ends at once is learnt")
        return tokens.chat(chat, spans, notes)

    def encode_prompt(self, chat: Chat | Sequence[Message]) -> ChatTokens:
        """See `Tokenizer`. If the template does not show whose turn is where, all is one turn."""
        chat = check_chat(chat)
        marked, rendered, notes = self._choose_shape(chat, generation_prompt=True)
        tokens = self._tokens_of(rendered)
        # Some templates have no generation prompt; some change what precedes it.
        closed = marked.render(marked.messages, False)
        given = closed if closed is not None and rendered.text.startswith(closed.text) else rendered
        try:
            spans = find_spans(marked.messages, replace(tokens.whole(), rendered=given), marked.render)
        except InputError:
            spans = ChatSpans(contents=words_of(rendered))
        return tokens.prompt(chat, spans, len(given.text), notes)

    @property
    def end_ids(self) -> tuple[int, ...]:
        """See `Tokenizer`."""
        end = self._tokenizer.eos_token_id
        return () if end is None else (int(end),)

    @property
    def underlying(self) -> Any:
        """See `Tokenizer`."""
        return self._tokenizer

    def _template_of(self, chat: Chat) -> ChatTemplate:
        """The template for a chat: some tokenizers have another one for chats with tools."""
        source = _template_of(self._tokenizer, chat.tools)
        if not source:
            raise InputError(
                f"the tokenizer {self._identity.name!r} has no chat template; set input.chat_template to a Jinja file"
            )
        return self._compiled(source)

    def _compiled(self, source: str) -> ChatTemplate:
        if source not in self._templates:
            try:
                self._templates[source] = ChatTemplate(source)
            except Exception as error:  # Jinja's, or what its parser runs into
                raise InputError(f"the chat template refuses these messages: {first_line(error)}") from error
        return self._templates[source]

    def _choose_shape(self, chat: Chat, *, generation_prompt: bool) -> tuple[MarkedChat, Rendered, list[str]]:
        """The chat in the first shape of which the template loses nothing, or the least; and what it loses.

        Raises:
            InputError: the template refuses every shape, its text is empty, or transformers writes another one.
        """
        template = self._template_of(chat)
        variables = self._variables(chat)
        tried = [MarkedChat(shape, variables, template.render) for shape in shapes(chat, template.source)]
        best: tuple[MarkedChat, Rendered, list[tuple[int, str]]] | None = None
        for marked in tried:
            rendered = marked.render(marked.messages, generation_prompt)
            lost = [] if rendered is None else marked.lost_keys(rendered)
            if rendered is not None and (best is None or len(lost) < len(best[2])):
                best = marked, rendered, lost
            if best is not None and not best[2]:
                break
        if best is None:
            raise InputError(f"the chat template refuses these messages: {first_line(tried[0].failure or InputError(''))}")
        marked, rendered, lost = best
        if not rendered.text:
            what = "prompt" if generation_prompt else "text"
            raise InputError(f"the chat template gives an empty {what} for these messages")
        self._compare(chat, marked, rendered, generation_prompt=generation_prompt)
        return marked, rendered, notes_of(chat, template, lost, marked.lost_parts(rendered))

    def _variables(self, chat: Chat) -> dict[str, Any]:
        return {
            **self._tokenizer.special_tokens_map, "tools": chat.tools, "documents": chat.documents,
            "strftime_now": self._moment.strftime, **chat.arguments,
        }  # fmt: skip

    def _compare(self, chat: Chat, marked: MarkedChat, rendered: Rendered, *, generation_prompt: bool) -> None:
        variables = self._variables(chat)
        for name in self._tokenizer.special_tokens_map:
            variables.pop(name, None)
        try:
            text = self._tokenizer.apply_chat_template(
                marked.plain, tokenize=False, add_generation_prompt=generation_prompt, **variables | dict(chat.arguments)
            )
        except Exception as error:  # as above
            raise InputError(f"the chat template refuses these messages: {first_line(error)}") from error
        if text != rendered.text:
            raise InputError("the chat template gives another text when transformers renders it again")

    def _tokens_of(self, rendered: Rendered) -> ChatEncoding:
        if not self._tokenizer.is_fast:
            raise InputError(
                f"the tokenizer {self._identity.name!r} is not a fast one: it does not say which characters its tokens "
                "cover, so the assistant's part of a chat is unknown; tokenize the chats yourself and use content: ids"
            )
        encoded = self._tokenizer(rendered.text, add_special_tokens=False, return_offsets_mapping=True)
        offsets_N2 = np.array(encoded["offset_mapping"], np.int64).reshape(-1, 2)
        input_ids_N = np.array(encoded["input_ids"], np.int32)
        return ChatEncoding(rendered, input_ids_N, offsets_N2, self._special_ids, self.end_ids, self.decode)


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 of what a tokenizer means: rules, vocabulary, merges and special ids.

    Truncation, padding and the padding token are left out: they say how it was last called, and are part of no text.
    """
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "unk_token_id")}
    if not tokenizer.is_fast:
        probes = [tokenizer(text, add_special_tokens=True)["input_ids"] for text in PROBES]
        return fingerprint({"vocab": tokenizer.get_vocab(), "probes": probes, "special": special})
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    for state in ("truncation", "padding", "version"):
        rules.pop(state, None)
    if "merges" in rules["model"]:  # written as "a b" by old versions of tokenizers, as ["a", "b"] by new ones
        rules["model"]["merges"] = [m.split(" ") if isinstance(m, str) else m for m in rules["model"]["merges"]]
    return fingerprint({"rules": rules, "special": special})


def _template_of(tokenizer: Any, tools: Sequence[Any] | None = None) -> str:
    """The template that a chat is rendered with; "" if there is none."""
    if not tokenizer.chat_template:
        return ""
    try:
        return tokenizer.get_chat_template(tools=tools)
    except ValueError:  # several named ones, none of them the default
        return ""


def _template_fingerprint(tokenizer: Any) -> str:
    """The fingerprint of both templates, if there is another one for chats with tools."""
    plain, with_tools = _template_of(tokenizer), _template_of(tokenizer, [{}])
    both = plain if plain == with_tools else f"{plain}\0{with_tools}"
    return hashlib.sha256(both.encode()).hexdigest() if both else ""
