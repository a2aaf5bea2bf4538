"""What servers call the parts of an answer, and which id a token's text stands for.

| server | prompt positions | written positions |
|---|---|---|
| vLLM, native | `prompt_logprobs`: null or {"5": {"logprob": -0.1}} | `outputs[].logprobs`, the same; `token_ids` |
| vLLM, OpenAI API | `prompt_logprobs` of the answer or of a choice | as OpenAI's; `choices[].token_ids` |
| SGLang | `meta_info.input_top_logprobs`: null or [[-0.1, 5, text]] | `meta_info.output_top_logprobs` |
| OpenAI completions | `choices[].logprobs`, where the prompt was echoed | `top_logprobs`: null or {token: -0.1}; `tokens` |
| OpenAI chat | | `choices[].logprobs.content[].top_logprobs`: [{token, logprob}] |
| TGI | (`details.prefill`: ids of the prompt) | `details.top_tokens`: [[{id, logprob}]]; `details.tokens` |
| llama.cpp | | `completion_probabilities[].top_logprobs`: [{id, logprob}]; `tokens` |

What a line says of a prompt and what it says of an answer are two texts here: the second starts with the first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kdcache.errors import InputError
from kdcache.foreign.formats.pairs import to_id
from kdcache.teacher.tokenizer import Tokenizer

Entries = list[tuple[Any, Any]]
"""(token, logprob) of one item, as the server wrote them; empty for null."""


@dataclass(frozen=True)
class Answer:
    """Logprobs of one text.

    Attributes:
        server: whose answers these are, for people.
        is_prompt: whether the items are about tokens of the prompt; else about those that the engine wrote.
        positions: an item for each token.
        tokens: of the positions, as the server wrote them (ids or text); None where it did not.
        prompt_ids: token ids of the prompt, where the answer holds them; whatever the server wrote.
        messages: the chat that was asked, if the answer keeps it.
        start: of a prompt, the token that item 0 is about (SGLang: logprob_start_len).
    """

    server: str
    is_prompt: bool
    positions: list[Entries]
    tokens: list[Any] | None = None
    prompt_ids: Any = None
    messages: Any = None
    start: int = 0

    @property
    def has_prompt_ids(self) -> bool:
        """Whether the tokens of the prompt, all of them, come with its positions."""
        return self.is_prompt and self.tokens is not None and not self.start


class AnswerTokens:
    """Ids of tokens that are written as numbers, as `token_id:5`, or as text of a known tokenizer."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._ids_of_text: dict[str, int | None] | None = None

    def id_of(self, token: Any, where: str) -> int:
        """The id; raises InputError where text does not tell it."""
        if self._tokenizer is None or not isinstance(token, str) or token.startswith("token_id:"):
            return to_id(token, where)
        if self._ids_of_text is None:
            self._ids_of_text = _ids_of_text(self._tokenizer)
        found = self._ids_of_text.get(token)
        if found is None:
            how = "is the text of several tokens" if token in self._ids_of_text else "is not the text of a token"
            raise InputError(
                f"{where}: {token!r:.60} {how} of this tokenizer, so its id cannot be known; ask the server for ids "
                "(vLLM: return_tokens_as_token_ids)"
            )
        return found

    def by_id(self, entries: Entries, where: str) -> dict[int, float]:
        """Map id -> logprob of one token's entries; raises InputError for a value that is not a number."""
        found = {}
        for token, value in entries:
            if type(value) not in (int, float):
                raise InputError(f"{where}: a token's logprob is {value!r:.60}, but a number was expected")
            found[self.id_of(token, where)] = float(value)
        return found


def answers_of(item: Mapping[str, Any]) -> Iterator[Answer]:
    """Yield the texts with logprobs in one line; none if it is not an answer."""
    body = item
    for inner in ("response", "body"):  # a line of OpenAI's batch output
        body = body[inner] if isinstance(body.get(inner), Mapping) else body
    messages = item.get("messages") or _part(item, "request", "messages") or _part(item, "request", "body", "messages")
    if isinstance(body.get("meta_info"), Mapping):
        yield from _sglang(body, messages)
        return
    prompt = body.get("prompt_token_ids") or item.get("prompt_token_ids") or item.get("input_ids")
    if isinstance(body.get("prompt_logprobs"), list):
        yield _vllm_prompt(body["prompt_logprobs"], prompt)
    for choice in (*_dicts(body.get("choices")), *_dicts(body.get("outputs"))):
        yield from _choice(choice, prompt, messages)
    yield from _written_elsewhere(body, prompt, messages)


def _choice(choice: Mapping[str, Any], prompt: Any, messages: Any) -> Iterator[Answer]:
    prompt = choice.get("prompt_token_ids") or prompt
    logprobs, written = choice.get("logprobs"), choice.get("token_ids")
    echo = _echo(logprobs) if isinstance(logprobs, Mapping) else None
    if isinstance(choice.get("prompt_logprobs"), list) and (prompt is not None or echo is None):
        yield _vllm_prompt(choice["prompt_logprobs"], prompt)
    if echo is not None and (prompt is None or not isinstance(choice.get("prompt_logprobs"), list)):
        yield echo
    elif isinstance(logprobs, list):
        yield Answer("vLLM's outputs", False, [_by_id(cell) for cell in logprobs], written, prompt, messages)
    elif isinstance(logprobs, Mapping) and isinstance(logprobs.get("content"), list):
        content = list(_dicts(logprobs["content"]))
        positions = [_entries(part.get("top_logprobs")) for part in content]
        yield Answer("chat answers", False, positions, written or [part.get("token") for part in content], prompt, messages)
    elif isinstance(logprobs, Mapping) and isinstance(logprobs.get("top_logprobs"), list) and echo is None:
        positions = [_entries(cell) for cell in logprobs["top_logprobs"]]
        yield Answer("completions", False, positions, written or logprobs.get("tokens"), prompt, messages)


def _vllm_prompt(positions: list[Any], prompt: Any) -> Answer:
    return Answer("vLLM's prompt_logprobs", True, [_by_id(cell) for cell in positions], prompt_ids=prompt)


def _echo(logprobs: Mapping[str, Any]) -> Answer | None:
    """A completion that starts with its prompt: only there is a token that nothing was said about."""
    if not isinstance(logprobs.get("top_logprobs"), list):
        return None
    positions = [_entries(cell) for cell in logprobs["top_logprobs"]]
    is_echo = bool(positions) and not positions[0] and (logprobs.get("token_logprobs") or [0])[0] is None
    return Answer("completions", True, positions, logprobs.get("tokens")) if is_echo else None


def _written_elsewhere(body: Mapping[str, Any], prompt: Any, messages: Any) -> Iterator[Answer]:
    """Yield what TGI and llama.cpp write along with the text of an answer."""
    details, steps = body.get("details"), body.get("completion_probabilities")
    if isinstance(details, Mapping) and isinstance(details.get("top_tokens"), list):
        before = [part.get("id") for part in _dicts(details.get("prefill"))] or prompt
        written = [part.get("id") for part in _dicts(details.get("tokens"))]
        yield Answer("TGI's answers", False, [_entries(cell) for cell in details["top_tokens"]], written, before, messages)
    if isinstance(steps, list):
        parts = list(_dicts(steps))
        positions = [_entries(part.get("top_logprobs")) for part in parts]
        yield Answer("llama.cpp's answers", False, positions, [part.get("id") for part in parts], prompt, messages)


def _sglang(body: Mapping[str, Any], messages: Any) -> Iterator[Answer]:
    about = body["meta_info"]
    for side, is_prompt in (("input", True), ("output", False)):
        positions, tokens = about.get(f"{side}_top_logprobs"), about.get(f"{side}_token_logprobs")
        if not positions or not isinstance(positions, list) or not any(positions):
            continue
        written = [entry[1] if isinstance(entry, list) and len(entry) > 1 else None for entry in tokens or ()] or None
        prompt = body.get("prompt_token_ids") or body.get("input_ids")
        if prompt is None and not is_prompt:
            prompt = _input_ids(about)
        start = _start(about, positions) if is_prompt else 0
        yield Answer(
            "SGLang's answers",
            is_prompt,
            [_entries(cell) for cell in positions],
            written,
            prompt,
            None if is_prompt else messages,
            start,
        )


def _start(about: Mapping[str, Any], positions: list[Any]) -> int:
    """The prompt's token that the first item is about: there are as many items as tokens from there on."""
    num_tokens = about.get("prompt_tokens")
    return max(num_tokens - len(positions), 0) if type(num_tokens) is int else 0


def _input_ids(about: Mapping[str, Any]) -> list[int] | None:
    tokens = about.get("input_token_logprobs")
    if not isinstance(tokens, list) or len(tokens) != about.get("prompt_tokens"):
        return None
    return [entry[1] for entry in tokens] if all(isinstance(entry, list) and len(entry) > 1 for entry in tokens) else None


def _by_id(cell: Any) -> Entries:
    """Convert vLLM's own objects, whose keys are ids: JSON makes text of them, and some tokens' text is a number."""
    return [(int(token) if isinstance(token, str) and token.isdecimal() else token, value) for token, value in _entries(cell)]


def _entries(cell: Any) -> Entries:
    """(token, logprob) pairs of whatever a server writes for one token."""
    if isinstance(cell, Mapping):
        return [(token, _value(value)) for token, value in cell.items() if value is not None]
    if isinstance(cell, list):
        return [_pair(entry) for entry in cell]
    return []


def _pair(entry: Any) -> tuple[Any, Any]:
    if isinstance(entry, Mapping):
        return next((entry[name] for name in ("token_id", "id", "token") if name in entry), None), entry.get("logprob")
    if isinstance(entry, list) and len(entry) > 1:  # SGLang's [logprob, id, text]
        return entry[1], entry[0]
    return None, None


def _value(value: Any) -> Any:
    return value.get("logprob") if isinstance(value, Mapping) else value


def _ids_of_text(tokenizer: Tokenizer) -> dict[str, int | None]:
    """Text -> its id, None where several tokens have it (bytes of one character, say)."""
    found: dict[str, int | None] = {}
    for token in range(tokenizer.identity.vocab_size):
        text = tokenizer.decode([token])
        found[text] = None if text in found else token
    return found


def _dicts(cell: Any) -> Iterator[Mapping[str, Any]]:
    return (entry for entry in cell if isinstance(entry, Mapping)) if isinstance(cell, list) else iter(())


def _part(entries: Mapping[str, Any], *names: str) -> Any:
    found: Any = entries
    for name in names:
        found = found.get(name) if isinstance(found, Mapping) else None
    return found
