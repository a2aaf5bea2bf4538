"""Prompts in, sequences with the teacher's answers out; these are then captured like any other.

An answered sequence is a prompt and its answer. Supervised are the positions that predict the answer's tokens, from the
prompt's last token to the last but one of all; so every position has a target, including the token that ended the answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from kdcache.capture.sequences import CutCounts, check_ids, tokenize_plain, with_arguments
from kdcache.config.capture import CaptureConfig, GenerateConfig, InputConfig
from kdcache.errors import ConfigError, InputError, TeacherError
from kdcache.format.manifest import GenerationInfo
from kdcache.format.record import TokenSequence, sequence_key
from kdcache.inputs.chat import Chat
from kdcache.inputs.content import Item
from kdcache.teacher.base import Teacher
from kdcache.teacher.generation import Generated, GeneratingTeacher, Observe, Prompt, answer_seed
from kdcache.teacher.tokenizer import ROLE_CODES, Tokenizer

NEUTRAL_FILTERS = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


def generation_info(config: CaptureConfig) -> GenerationInfo | None:
    """Describe for the manifest how answers are made; None if the teacher only reads."""
    asked = config.generate
    return None if asked is None else GenerationInfo(**{n: getattr(asked, n) for n in GenerationInfo.__struct_fields__})


def generation_seeds(config: CaptureConfig) -> dict[str, int]:
    """Give the seeds for the identity."""
    return {} if config.generate is None else {"generate": config.generate.seed}


def captured_filters(config: CaptureConfig) -> dict[str, float]:
    """List the filters applied to a distribution before the selection; empty unless the config asks for them."""
    asked = config.generate
    if asked is None or not asked.capture_filtered:
        return {}
    return {name: getattr(asked, name) for name, neutral in NEUTRAL_FILTERS.items() if getattr(asked, name) != neutral}


def writer_of(teacher: Teacher) -> GeneratingTeacher:
    """Return the teacher as one that writes.

    Raises:
        ConfigError: it only reads.
    """
    if not isinstance(teacher, GeneratingTeacher):
        raise ConfigError(
            f"generate: the {teacher.identity.engine} teacher only reads; use teacher.backend vllm or transformers to have the "
            "prompts answered, or answer them with the server's own client and capture the texts without `generate`"
        )
    return teacher


def make_prompts(
    items: Iterable[Item], *, tokenizer: Tokenizer, config: CaptureConfig, vocab_size: int
) -> tuple[list[Prompt], CutCounts]:
    """Make the prompts in order, `generate.n` of each item.

    Args:
        items: as an InputReader gives them.
        tokenizer: not used for content `ids`.
        config: with a section `generate`.
        vocab_size: the teacher's; every id must be below it.

    Raises:
        InputError: a prompt that leaves no room for its answer, a chat that ends with the assistant's words (both unless they
            are to be left out), an id outside the vocabulary, a chat that its template refuses.
        MismatchError: the tokenizer gives ids that the teacher does not know.
    """
    asked = config.generate
    assert asked is not None
    counts = CutCounts()
    prompts: list[Prompt] = []
    for item in (_without_last_answer(item, asked, counts) for item in items):
        sequence = None if item.is_empty else _prompt_sequence(item, tokenizer, config.input, vocab_size, counts)
        if sequence is None:
            counts.num_empty_items += 1
        elif _fits(sequence, asked, config.input):
            answers = [Prompt(sequence, answer_seed(asked.seed, sequence.key, index)) for index in range(asked.n)]
            prompts += answers if asked.n == 1 else [_numbered(prompt, index) for index, prompt in enumerate(answers)]
        else:
            counts.num_long_prompts += 1
    counts.num_sequences = len(prompts)
    return prompts, counts


def write_sequences(
    prompts: Sequence[Prompt], teacher: Teacher, config: CaptureConfig, tokenizer: Tokenizer, observe: Observe
) -> Iterator[TokenSequence]:
    """Yield the prompts with the teacher's answers, in order.

    Raises:
        ConfigError: the teacher only reads. TeacherError: it failed, or answers are missing or beyond what was asked for.
    """
    assert config.generate is not None
    answers = writer_of(teacher).generate(prompts, config.generate, tokenizer, observe)
    template = tokenizer.identity.chat_template_fingerprint
    for prompt in prompts:
        answer = next(answers, None)
        if answer is None or not 1 <= len(answer.token_ids_N) <= config.generate.max_tokens:
            length = "no" if answer is None else len(answer.token_ids_N)
            raise TeacherError(f"{prompt.source}: the teacher {teacher.identity.model!r} gave {length} tokens for an answer")
        yield answered(prompt, answer, template)


def answered(prompt: Prompt, answer: Generated, template_fingerprint: str) -> TokenSequence:
    """Prompt and answer as a sequence; see the module's docstring for what is supervised."""
    given, num_answer = prompt.sequence, len(answer.token_ids_N)
    input_ids_N = np.concatenate([given.input_ids_N, answer.token_ids_N]).astype(np.int32)
    supervised_N = np.zeros(len(input_ids_N), np.bool_)
    supervised_N[given.num_tokens - 1 : -1] = True
    return TokenSequence(
        input_ids_N=input_ids_N,
        supervised_N=supervised_N,
        roles_N=np.append(given.roles_N, np.full(num_answer, ROLE_CODES["assistant"], np.uint8)),
        turn_starts=given.turn_starts,
        source=given.source,
        key=sequence_key(input_ids_N, supervised_N, template_fingerprint),
        finish=answer.finish,
        domain=given.domain,
    )


def _without_last_answer(item: Item, asked: GenerateConfig, counts: CutCounts) -> Item:
    chat = item.content
    messages = chat.messages if isinstance(chat, Chat) else []
    if not isinstance(chat, Chat) or not messages or messages[-1]["role"] != "assistant":
        return item
    if asked.last_answer == "error":
        raise InputError(
            f"{item.source}: the chat ends with the assistant's words, so that there is nothing to answer; take them out, or "
            "set generate.last_answer to skip to have the teacher answer instead"
        )
    kept = max((index + 1 for index, message in enumerate(messages) if message["role"] != "assistant"), default=0)
    counts.num_dropped_answers += 1
    return replace(item, content=replace(chat, messages=messages[:kept]))


def _prompt_sequence(
    item: Item, tokenizer: Tokenizer, config: InputConfig, vocab_size: int, counts: CutCounts
) -> TokenSequence | None:
    """What comes before the answer, nothing of it supervised; None where it has no token. Its last turn is the answer's, which
    may start where it ends."""
    if isinstance(item.content, Chat):
        try:
            chat = tokenizer.encode_prompt(with_arguments(item.content, config))
        except InputError as error:
            raise InputError(f"{item.source}: {error}") from error
        counts.note(dict.fromkeys(chat.notes, 1))
        ids_N, roles_N, starts = np.asarray(chat.input_ids, np.int64), chat.roles, chat.turn_starts
    else:
        ids_N = tokenize_plain(item.content, tokenizer, config)
        roles_N, starts = np.zeros(len(ids_N), np.uint8), np.array([0, len(ids_N)], np.int32)
    if len(ids_N) == 0:
        return None
    check_ids(ids_N, item.source, config, tokenizer, vocab_size)
    input_ids_N, nothing_N = ids_N.astype(np.int32), np.zeros(len(ids_N), np.bool_)
    key = sequence_key(input_ids_N, nothing_N, tokenizer.identity.chat_template_fingerprint)
    return TokenSequence(input_ids_N, nothing_N, roles_N, starts, item.source, key, domain=item.domain)


def _fits(sequence: TokenSequence, asked: GenerateConfig, config: InputConfig) -> bool:
    room = config.window.size - asked.max_tokens
    if sequence.num_tokens <= room:
        return True
    if asked.long_prompts == "skip":
        return False
    raise InputError(
        f"{sequence.source}: a prompt of {sequence.num_tokens} tokens, but input.window.size ({config.window.size}) has room "
        f"for {room} besides generate.max_tokens ({asked.max_tokens}); raise the window, make max_tokens smaller, or set "
        "generate.long_prompts to skip"
    )


def _numbered(prompt: Prompt, index: int) -> Prompt:
    return replace(prompt, sequence=replace(prompt.sequence, source=f"{prompt.source}~{index}"))
