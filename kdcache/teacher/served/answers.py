"""What a server is asked, and what its answers mean. Pure functions: no sockets.

There are two ways to get the logprobs of a prompt of token ids. Both generate one token after it, which is dropped:

- `prompt_logprobs` (vLLM): logprobs by token id for every token but the first; those of the generated token are elsewhere.
- `echo` (the older completions API, vLLM's too): one list over tokens, with the generated token last.

At each token stand the k most probable tokens and the token that came, which may be one of them: k
entries or k + 1. What stands at token i is its distribution given the tokens before it, our
position i-1; the generated token's is the last position. The generated token is drawn at
temperature 1 without filters, so that it does not matter whether a server takes its logprobs before
or after temperature and filters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from kdcache.errors import TeacherError
from kdcache.format.record import Distributions, TokenSequence
from kdcache.teacher.base import answer

APIS = ("prompt_logprobs", "echo")

TOKEN_ID_PREFIX = "token_id:"
"""How vLLM writes a token's id where the API has a field for its text (`return_tokens_as_token_ids`). Texts do not identify
tokens: in most vocabularies many tokens have the same one."""

IMPOSSIBLE_NATS = -9999.0
"""What servers write for -inf, which JSON does not have."""

MAX_EXCESS = 1e-3
"""How far the probabilities of a support may sum above 1: float32 rounding, and no more."""

MAX_BYTES_PER_ENTRY = 256
"""vLLM's entries take about 90: id, logprob, rank and the token's text, which may be long, but not at every position."""

MAX_BYTES_OF_THE_REST = 2**22
MAX_TOKEN_ID = 2**31 - 1

Logprobs = dict[int, float]
"""Token id -> logprob in nats."""


Name = Annotated[str, msgspec.Meta(max_length=1000)]
"""A name that is compared with every answer's, and goes into manifests."""


class Entry(msgspec.Struct, gc=False):
    """One entry of vLLM's prompt logprobs; rank and text are not read."""

    logprob: float


class TokenLogprobs(msgspec.Struct):
    """The older API's logprobs: lists over tokens."""

    tokens: list[str]
    top_logprobs: list[dict[str, float] | None] | None = None


class Choice(msgspec.Struct):
    """One continuation of one prompt."""

    logprobs: TokenLogprobs | None = None
    prompt_logprobs: list[dict[int, Entry] | None] | None = None


class Completion(msgspec.Struct):
    """What we read of an answer of the completions endpoint."""

    choices: list[Choice]
    model: Name | None = None
    system_fingerprint: Name | None = None


def completion_request(api: str, model: str, prompt: Sequence[int], k: int, temperature: float = 1.0) -> dict[str, Any]:
    """The body of a request for the k most probable tokens at every position of a prompt.

    Args:
        api: one of APIS.
        model: as the server calls it.
        prompt: token ids.
        k: entries per position.
        temperature: of the generated token; other than 1 only to find out what it changes.
    """
    # No seed: the draw is dropped, and a CPU build of vLLM (0.32) does not survive a seeded request whose prompt is read in two
    # steps: it takes the first step's draw back, which CPU generators cannot do.
    body: dict[str, Any] = {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": 1,
        "logprobs": k,
        "temperature": temperature,
        "top_p": 1.0,
        "return_tokens_as_token_ids": True,
    }
    if api == "echo":
        return body | {"echo": True}
    # A server takes what a request does not set from the model's own generation config.
    filters = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    return body | filters | {"prompt_logprobs": k}


def max_answer_bytes(num_tokens: int, k: int) -> int:
    """The most bytes of an answer about a prompt: each token stands there by itself, and may be one more entry."""
    return MAX_BYTES_OF_THE_REST + (num_tokens + 1) * (k + 2) * MAX_BYTES_PER_ENTRY


def read_completion(data: bytes) -> Completion:
    """Parse the bytes of an answer.

    Raises:
        msgspec.DecodeError: incomplete JSON: the answer was cut off on its way.
        TeacherError: JSON, but not a completion.
    """
    try:
        return msgspec.json.decode(data, type=Completion)
    except msgspec.ValidationError as error:
        raise TeacherError(f"the server's answer is not a completion with logprobs: {error}") from error


def speaks(completion: Completion, api: str) -> bool:
    """Whether an answer has what this way of asking should bring; servers ignore fields that they do not know."""
    if not completion.choices:
        return False
    choice = completion.choices[0]
    if api == "prompt_logprobs":
        return choice.prompt_logprobs is not None
    return choice.logprobs is not None and choice.logprobs.top_logprobs is not None and len(choice.logprobs.tokens) > 1


def read_positions(completion: Completion, api: str, prompt: Sequence[int]) -> tuple[list[Logprobs], list[int]]:
    """The logprobs at each of a prompt's N positions, and the token that came after it.

    Raises:
        TeacherError: positions are missing, name their tokens by text, or are not those of the prompt.
    """
    if not speaks(completion, api):
        raise TeacherError(f"the server's answer has no logprobs of the prompt (teacher.server.api {api!r})")
    choice = completion.choices[0]
    if api == "prompt_logprobs":
        first, *positions = _plain(choice.prompt_logprobs or [None])
        last, last_tokens = _by_id(choice.logprobs)
        came = [*prompt[1:], *last_tokens]
    else:
        last, tokens = _by_id(choice.logprobs)
        first, positions, came = (last.pop(0) if last else None), [], tokens[1:]
        if [*tokens[: len(prompt)]] != list(prompt):
            raise TeacherError(f"the server read {tokens[: len(prompt)]!r:.60}, and not the prompt {list(prompt)!r:.60}")
    positions += last
    if first is not None or len(positions) != len(prompt) or len(came) != len(prompt):
        raise TeacherError(f"the server gave logprobs of {len(positions)} positions for the {len(prompt)} tokens of a prompt")
    if not all(positions):
        without = next(position for position, entries in enumerate(positions) if not entries)
        raise TeacherError(f"the server gave no logprobs for position {without} of a prompt of {len(prompt)} tokens")
    return [entries for entries in positions if entries is not None], came


def read_answer(completion: Completion, api: str, sequence: TokenSequence, k: int) -> Distributions:
    """The record of an answer.

    Raises:
        TeacherError: as `read_positions`; or a position does not hold the k most probable tokens and the one that came.
    """
    positions, came = read_positions(completion, api, sequence.input_ids_N.tolist())
    ids: list[list[int]] = []
    logprobs: list[list[float]] = []
    target_logprobs: list[float] = []
    for position in sequence.positions_P.tolist():
        support, of_came = split_entries(positions[position], came[position], k)
        ids.append(list(support))
        logprobs.append(list(support.values()))
        target_logprobs.append(of_came)
    logprobs_PK = _nats(logprobs)
    check_normalised(logprobs_PK)
    for token in (token for entries in ids for token in entries):
        if not 0 <= token <= MAX_TOKEN_ID:
            raise TeacherError(f"the server names token {token}, an id that no vocabulary has")
    return answer(sequence, np.array(ids, np.int32), logprobs_PK, _nats(target_logprobs))


def split_entries(entries: Logprobs, came: int, k: int) -> tuple[Logprobs, float]:
    """The k most probable tokens of a position, and the logprob of the one that came.

    Raises:
        TeacherError: there are not k entries, or k + 1 of which the one that came is the least.
    """
    if came not in entries:
        raise TeacherError(f"the server's logprobs are not those of the text: token {came} came, and is not among them")
    of_came = entries[came]
    if len(entries) == k:
        return entries, of_came
    support = {token: logprob for token, logprob in entries.items() if token != came}
    if len(support) < k:
        raise TeacherError(
            f"the server gives {len(entries)} tokens at a position, including the one that came, where selection.k asks for {k}"
        )
    if len(support) > k or of_came > min(support.values()):
        raise TeacherError(
            f"the server gives {len(entries)} tokens at a position, which are not the {k} most probable and the one that came"
        )
    return support, of_came


def check_normalised(logprobs_PK: NDArray[np.float32]) -> None:
    """Raise TeacherError unless the probabilities at each position sum to at most 1."""
    if not len(logprobs_PK):
        return
    mass = float(np.exp(np.minimum(logprobs_PK.astype(np.float64), 100.0)).sum(axis=-1).max())
    if mass > 1.0 + MAX_EXCESS:
        raise TeacherError(
            f"the server's numbers are not logprobs over the vocabulary: the probabilities of one position sum to {mass:.4g}; "
            "start vLLM with --logprobs-mode raw_logprobs, which is its default"
        )


def _plain(positions: Sequence[dict[int, Entry] | None]) -> list[Logprobs | None]:
    return [None if entries is None else {token: entry.logprob for token, entry in entries.items()} for entries in positions]


def _by_id(logprobs: TokenLogprobs | None) -> tuple[list[Logprobs | None], list[int]]:
    if logprobs is None or logprobs.top_logprobs is None:
        return [], []
    named = logprobs.top_logprobs
    positions = [None if entries is None else {_id_of(text): nats for text, nats in entries.items()} for entries in named]
    return positions, [_id_of(text) for text in logprobs.tokens]


def _id_of(text: str) -> int:
    digits = text.removeprefix(TOKEN_ID_PREFIX)
    if digits == text or not digits.isdecimal():
        raise TeacherError(
            f"the server names tokens by their text ({text!r:.40}) and not by their id, and many tokens have the same text; "
            "use a server that knows return_tokens_as_token_ids, as vLLM does"
        )
    if len(digits) > len(str(MAX_TOKEN_ID)):
        raise TeacherError(f"the server names token {digits:.40}, an id that no vocabulary has")
    return int(digits)


def _nats(values: Sequence[Any]) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):  # out of float32's range is impossible, too
        array = np.array(values, np.float32)
    array[array <= IMPOSSIBLE_NATS] = -np.inf
    return array
