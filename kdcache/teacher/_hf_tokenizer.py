"""Tokenizers of `transformers`: hub ids and local folders, fingerprints of meaning, chats with roles and assistant masks.

Shape letters: N tokens of a text.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import AutoTokenizer

from kdcache.errors import InputError, TeacherError
from kdcache.format.manifest import TokenizerIdentity, fingerprint
from kdcache.teacher.base import first_line
from kdcache.teacher.chat_turns import ChatSpans, find_spans
from kdcache.teacher.checkpoint import check_model_name, short_name
from kdcache.teacher.tokenizer import ROLE_CODES, ChatTokens, Message, check_messages

GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")

PROBES = ("Hello world", " two  spaces\tand\n\nlines", "naive cafe 12345.678", "x = [1, 2]  # \u00e9\u4e2d\U0001f600")
"""Texts whose ids stand for the rules of a tokenizer that has no serialised form."""


class HfTokenizer:
    """A tokenizer of `transformers`; see `Tokenizer`."""

    def __init__(self, name: str, revision: str | None = None, chat_template: str | None = None) -> None:
        """Load it.

        Raises:
            TeacherError: it does not load.
        """
        check_model_name(name)
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(name, revision=revision)
        except Exception as error:  # whatever a file, remote code or the hub client can raise
            raise TeacherError(f"the tokenizer {name!r} does not load with transformers: {first_line(error)}") from error
        if chat_template is not None:
            self._tokenizer.chat_template = chat_template
        self._template = _template_of(self._tokenizer)
        # Texts longer than the model are cut into windows later; the tokenizer's warning about them would be false alarm.
        self._tokenizer.model_max_length = 2**62
        vocab = self._tokenizer.get_vocab()
        self._identity = TokenizerIdentity(
            name=short_name(name),
            fingerprint=tokenizer_fingerprint(self._tokenizer),
            chat_template_fingerprint=hashlib.sha256(self._template.encode()).hexdigest() if self._template else "",
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

    def encode_chat(self, messages: Sequence[Message]) -> ChatTokens:
        """See `Tokenizer`.

        The template's text holds its own special tokens, so none are added: no second BOS. The assistant mask comes from the
        template's {% generation %} tags where it has them, else from the beginnings of the chat (`chat_turns`).
        """
        checked = check_messages(messages)
        text = self._render_or_raise(checked)
        ids_N, offsets_N2 = self._encode_with_offsets(text)
        if len(ids_N) == 0:
            raise InputError("the chat template gives an empty text for these messages")
        tagged_N = self._tagged_mask(checked, ids_N)
        try:
            spans = find_spans(checked, text, self._render)
        except InputError:
            if tagged_N is None:
                raise
            spans = ChatSpans(turn_starts=[0])
        roles_N, mask_N = self._who_wrote(spans, text, ids_N, offsets_N2)
        if tagged_N is not None:
            mask_N = tagged_N
            roles_N[tagged_N] = ROLE_CODES["assistant"]
        return ChatTokens(ids_N, roles_N, _first_tokens(offsets_N2, spans.turn_starts), mask_N)

    def encode_prompt(self, messages: Sequence[Message]) -> ChatTokens:
        """See `Tokenizer`. Where the template does not show who wrote what, no roles are told, and all is one turn."""
        checked = check_messages(messages)
        text = self._render_or_raise(checked, generation_prompt=True)
        ids_N, offsets_N2 = self._encode_with_offsets(text)
        if len(ids_N) == 0:
            raise InputError("the chat template gives an empty prompt for these messages")
        # Some templates have no generation prompt; some write what stands before it in another way.
        given = self._render(checked, False)
        given = given if given is not None and text.startswith(given) else text
        try:
            spans = find_spans(checked, given, self._render)
        except InputError:
            spans = ChatSpans(turn_starts=[0])
        roles_N, mask_N = self._who_wrote(spans, given, ids_N, offsets_N2)
        header = int(np.argmax(offsets_N2[:, 1] > len(given))) if len(text) > len(given) else len(ids_N)
        starts = np.append(_first_tokens(offsets_N2, spans.turn_starts), header)
        return ChatTokens(ids_N, roles_N, np.unique(starts).astype(np.int32), mask_N)

    @property
    def end_ids(self) -> tuple[int, ...]:
        """See `Tokenizer`."""
        end = self._tokenizer.eos_token_id
        return () if end is None else (int(end),)

    @property
    def underlying(self) -> Any:
        """The tokenizer of `transformers`, for an engine that takes one."""
        return self._tokenizer

    def _who_wrote(
        self, spans: ChatSpans, text: str, ids_N: NDArray[np.int32], offsets_N2: NDArray[np.int64]
    ) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """(N,) roles; (N,) whether a token is the assistant's, its end of turn included."""
        roles_N = np.zeros(len(ids_N), np.uint8)
        mask_N = np.zeros(len(ids_N), np.bool_)
        for role, start, end in spans.contents:
            inside_N = _tokens_in(offsets_N2, start, end)
            if role == "assistant":
                inside_N = self._up_to_end_of_turn(inside_N, ids_N, offsets_N2, text[:end])
                mask_N |= inside_N
            roles_N[inside_N] = ROLE_CODES[role]
        return roles_N, mask_N

    def _render_or_raise(self, messages: Sequence[Message], *, generation_prompt: bool = False) -> str:
        if not self._template:
            raise InputError(
                f"the tokenizer {self._identity.name!r} has no chat template; set input.chat_template to a Jinja file"
            )
        try:
            return self._tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=generation_prompt)
        except Exception as error:  # a template is a program: it may raise anything
            raise InputError(f"the chat template refuses these messages: {first_line(error)}") from error

    def _render(self, messages: Sequence[Message], generation_prompt: bool) -> str | None:
        try:
            return self._tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=generation_prompt)
        except Exception:  # as above; here it is an answer: there is no such beginning
            return None

    def _encode_with_offsets(self, text: str) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        if not self._tokenizer.is_fast:
            raise InputError(
                f"the tokenizer {self._identity.name!r} is not a fast one: it does not say which characters its tokens "
                "cover, so the assistant's part of a chat cannot be told; tokenize the chats yourself and use content: ids"
            )
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        offsets = np.array(encoded["offset_mapping"], np.int64).reshape(-1, 2)
        return np.array(encoded["input_ids"], np.int32), offsets

    def _tagged_mask(self, messages: Sequence[Message], ids_N: NDArray[np.int32]) -> NDArray[np.bool_] | None:
        """The assistant mask of the template's {% generation %} tags; None where it has none."""
        if not GENERATION_TAG.search(self._template):
            return None
        encoded = self._tokenizer.apply_chat_template(
            list(messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        if not np.array_equal(encoded["input_ids"], ids_N):
            raise InputError("the chat template gives other tokens when it is rendered a second time")
        return np.array(encoded["assistant_masks"], np.bool_)

    def _up_to_end_of_turn(
        self, inside_N: NDArray[np.bool_], ids_N: NDArray[np.int32], offsets_N2: NDArray[np.int64], text: str
    ) -> NDArray[np.bool_]:
        """Without what the template writes after the end-of-turn token: white space, in all templates known."""
        special = np.flatnonzero(inside_N & np.isin(ids_N, self._special_ids))
        if len(special) and not text[offsets_N2[special[-1], 1] :].strip():
            return inside_N & (np.arange(len(ids_N)) <= special[-1])
        return inside_N


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 of what the tokenizer means: rules, vocabulary, merges and special ids.

    Truncation and padding are how it was last called, and the padding token is no part of any text: both are left out.
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


def _template_of(tokenizer: Any) -> str:
    """The template that a chat without tools is rendered with; "" where there is none."""
    if not tokenizer.chat_template:
        return ""
    try:
        return tokenizer.get_chat_template()
    except ValueError:  # several named ones, none of them the default
        return ""


def _tokens_in(offsets_N2: NDArray[np.int64], start: int, end: int) -> NDArray[np.bool_]:
    """(N,) whether a token covers any of text[start:end]; one that reaches over the border counts."""
    return (offsets_N2[:, 1] > start) & (offsets_N2[:, 0] < end)


def _first_tokens(offsets_N2: NDArray[np.int64], starts: Sequence[int]) -> NDArray[np.int32]:
    """Index of the first token that covers something at or after each character; turns without a token are left out."""
    first = np.array([int(np.argmax(offsets_N2[:, 1] > start)) for start in starts], np.int32)
    return np.unique(np.append(np.int32(0), first[1:])).astype(np.int32)
