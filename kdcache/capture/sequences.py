"""Items -> tokens -> the sequences that a teacher reads, with counts of everything left out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace

import numpy as np
from numpy.typing import NDArray

from kdcache.capture.windows import TokenizedItem, cut_windows, num_truncated_tokens, supervise_assistant
from kdcache.config.capture import InputConfig
from kdcache.errors import InputError, MismatchError
from kdcache.format.record import TokenSequence
from kdcache.inputs.chat import Chat
from kdcache.inputs.content import Item
from kdcache.teacher.tokenizer import Tokenizer


@dataclass(slots=True)
class CutCounts:
    """What became of the items of some units.

    Attributes:
        num_sequences: given to the teacher.
        num_empty_items: skipped, as they have no content or no token.
        num_unsupervised: sequences skipped because none of their positions is supervised: chats, or windows of chats, in which
            the assistant says nothing.
        num_truncated_items, num_truncated_tokens: under policy `truncate`.
        num_skipped: items and sequences left out because they make their unit fail, under `run.skip_failing`.
        num_long_prompts: prompts skipped because they leave no room for an answer, under `generate.long_prompts`.
        num_dropped_answers: chats whose last words, the assistant's, were left out, under `generate.last_answer`.
        notes: what else the items hold but is not used, and the like: sentence -> items.
    """

    num_sequences: int = 0
    num_empty_items: int = 0
    num_unsupervised: int = 0
    num_truncated_items: int = 0
    num_truncated_tokens: int = 0
    num_skipped: int = 0
    num_long_prompts: int = 0
    num_dropped_answers: int = 0
    notes: dict[str, int] = field(default_factory=dict)

    def add(self, other: CutCounts) -> None:
        """Add other counts to these."""
        for each in fields(self):
            if each.name != "notes":
                setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))
        self.note(other.notes)

    def note(self, notes: Mapping[str, int]) -> None:
        """Add to `notes`."""
        for sentence, count in notes.items():
            self.notes[sentence] = self.notes.get(sentence, 0) + count


def make_sequences(
    items: Iterable[Item], *, tokenizer: Tokenizer, config: InputConfig, vocab_size: int
) -> tuple[list[TokenSequence], CutCounts]:
    """Make the sequences of some items, in order.

    Args:
        items: as an InputReader gives them.
        tokenizer: not used for content `ids`.
        config: content, supervision, special tokens and windows.
        vocab_size: the teacher's; every id must be below it.

    Raises:
        InputError: an id outside the vocabulary, a chat that its template refuses, an item too long under policy `error`.
        MismatchError: the tokenizer gives ids that the teacher does not know.
    """
    counts = CutCounts()
    template = tokenizer.identity.chat_template_fingerprint
    made: list[TokenSequence] = []
    for item in items:
        given = [] if item.is_empty else _tokenize(item, tokenizer, config, counts)
        if not any(len(tokens.input_ids_N) for tokens in given):
            counts.num_empty_items += 1
            continue
        for tokens in given:
            check_ids(tokens.input_ids_N, tokens.source, config, tokenizer, vocab_size)
            sequences = cut_windows(tokens, config.window, template)
            supervised = [sequence for sequence in sequences if sequence.supervised_N.any()]
            made += supervised
            truncated = num_truncated_tokens(len(tokens.input_ids_N), config.window)
            counts.add(CutCounts(len(supervised), 0, len(sequences) - len(supervised), int(truncated > 0), truncated))
    return made, counts


def _tokenize(item: Item, tokenizer: Tokenizer, config: InputConfig, counts: CutCounts) -> list[TokenizedItem]:
    if isinstance(item.content, Chat):
        chat = with_arguments(item.content, config)
        if config.one_item_per == "chat":
            return [_tokenize_chat(item, chat, tokenizer, config, counts)]
        answers = [(replace(item, source=f"{item.source}@{index}"), each) for index, each in chat.answers()]
        counts.num_unsupervised += not answers
        return [_tokenize_chat(part, each, tokenizer, config, counts) for part, each in answers]
    ids_N = tokenize_plain(item.content, tokenizer, config)
    num_tokens = len(ids_N)
    all_N, none_N = np.ones(num_tokens, np.bool_), np.zeros(num_tokens, np.uint8)
    return [TokenizedItem(ids_N, all_N, none_N, np.zeros(1, np.int32), item.source, *_marks(item))]


def with_arguments(chat: Chat, config: InputConfig) -> Chat:
    """Add the config's template arguments to the chat; its own come first."""
    return replace(chat, arguments={**config.template_arguments, **chat.arguments})


def tokenize_plain(content: str | NDArray[np.int64], tokenizer: Tokenizer, config: InputConfig) -> NDArray[np.int64]:
    """Return (N,) the ids of a text, or the ids themselves; unchecked."""
    if isinstance(content, str):
        return np.asarray(tokenizer.encode(content, config.add_special_tokens), np.int64)
    return content


def _tokenize_chat(item: Item, given: Chat, tokenizer: Tokenizer, config: InputConfig, counts: CutCounts) -> TokenizedItem:
    try:
        chat = tokenizer.encode_chat(given)
    except InputError as error:
        raise InputError(f"{item.source}: {error}") from error
    counts.note(dict.fromkeys(chat.notes, 1))
    if config.supervise == "assistant":
        supervised_N = supervise_assistant(np.asarray(chat.assistant_mask, np.bool_))
    else:
        # The last position has no target yet that could be left out.
        supervised_N = np.append(~np.asarray(chat.excluded, np.bool_)[1:], True)
    starts, roles_N = np.asarray(chat.turn_starts, np.int32), np.asarray(chat.roles, np.uint8)
    return TokenizedItem(np.asarray(chat.input_ids, np.int64), supervised_N, roles_N, starts, item.source, *_marks(item))


def _marks(item: Item) -> tuple[str, bytes, str]:
    return item.domain, item.group, item.preference


def check_ids(input_ids_N: NDArray[np.int64], source: str, config: InputConfig, tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise InputError (user's ids) or MismatchError (tokenizer's) for an id outside the teacher's vocabulary."""
    outside_N = (input_ids_N < 0) | (input_ids_N >= vocab_size)
    if not outside_N.any():
        return
    index = int(np.argmax(outside_N))
    token_id = int(input_ids_N[index])
    if config.content == "ids":
        raise InputError(f"{source}: id {index} is {token_id}, outside the teacher's vocabulary of {vocab_size}")
    raise MismatchError(
        f"{source}: tokenizer {tokenizer.identity.name!r} gives the id {token_id}, outside the teacher's vocabulary of "
        f"{vocab_size}; set teacher.tokenizer to the tokenizer of the model"
    )
