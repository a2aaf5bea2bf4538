"""What a server is asked, and what its answers mean. Pure functions: no sockets.

Two ways to the logprobs of a prompt that is given as token ids, both with one token generated after it, which is thrown away:

- `prompt_logprobs` (vLLM): a row for every token but the first, its keys token ids; the generated token has its row elsewhere.
- `echo` (the older completions API, vLLM's too): one list of rows, the generated token's last.

A row holds the k most probable tokens and the token that came, which may be one of them: k entries or k + 1. Row i is about
token i given the tokens before it, our position i-1; the generated token's row is the last position. The generated token is
drawn at temperature 1 without filters: then a server whose logprobs are taken after them gives the same as one whose are not.

Shape letters: N tokens of a sequence, P supervised positions, K entries per position.
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
"""How vLLM writes a token's id where the API has room for its text only (`return_tokens_as_token_ids`). By their texts tokens
cannot be told apart: in most vocabularies many have the same one."""

IMPOSSIBLE_NATS = -9999.0
"""What servers write for -inf, which JSON does not have."""

MAX_EXCESS = 1e-3
"""Most that the probabilities of a support may sum to above 1: float32 rounding, and no more."""

MAX_BYTES_PER_ENTRY = 256
"""vLLM's take about 90: an id, a logprob, a rank and the token's text, which may be long but is not at every position."""

MAX_BYTES_OF_THE_REST = 2**22
MAX_TOKEN_ID = 2**31 - 1

Row = dict[int, float]
"""Token id -> logprob in nats."""


Name = Annotated[str, msgspec.Meta(max_length=1000)]
"""It is compared with every answer's, and goes into manifests."""


class Entry(msgspec.Struct, gc=False):
    """One entry of vLLM's rows; rank and text are not read."""

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
    """An answer of the completions endpoint, as far as it is read."""

    choices: list[Choice]
    model: Name | None = None
    system_fingerprint: Name | None = None


def completion_request(api: str, model: str, prompt: Sequence[int], k: int, temperature: float = 1.0) -> dict[str, Any]:
    """The body of a request for the k most probable tokens at every position of a prompt.

    Args:
        api: one of APIS.
        model: as the server calls it.
        prompt: token ids.
        k: entries per row.
        temperature: of the generated token; another than 1 is for finding out what it changes.
    """
    # No seed: the draw is thrown away, and a CPU build of vLLM (0.32) does not survive a seeded request whose prompt is read in
    # two steps: it takes the first step's draw back, which CPU generators cannot.
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
    # A server takes from the model's own generation config what a request does not set.
    filters = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    return body | filters | {"prompt_logprobs": k}


def max_answer_bytes(num_tokens: int, k: int) -> int:
    """Most bytes of an answer about a prompt: the token that comes may be one more entry, and so is each token by itself."""
    return MAX_BYTES_OF_THE_REST + (num_tokens + 1) * (k + 2) * MAX_BYTES_PER_ENTRY


def read_completion(data: bytes) -> Completion:
    """An answer's bytes.

    Raises:
        msgspec.DecodeError: not whole JSON: the answer was cut off on its way.
        TeacherError: JSON, but not a completion.
    """
    try:
        return msgspec.json.decode(data, type=Completion)
    except msgspec.ValidationError as error:
        raise TeacherError(f"the server's answer is not a completion with logprobs: {error}") from error


def speaks(completion: Completion, api: str) -> bool:
    """Whether an answer has what this way of asking should bring; a server passes over what it does not know."""
    if not completion.choices:
        return False
    choice = completion.choices[0]
    if api == "prompt_logprobs":
        return choice.prompt_logprobs is not None
    return choice.logprobs is not None and choice.logprobs.top_logprobs is not None and len(choice.logprobs.tokens) > 1


def read_rows(completion: Completion, api: str, prompt: Sequence[int]) -> tuple[list[Row], list[int]]:
    """The N rows of a prompt's positions, and for each the token that came there.

    Raises:
        TeacherError: rows are missing, name their tokens by text, or are not those of the prompt.
    """
    if not speaks(completion, api):
        raise TeacherError(f"the server's answer has no logprobs of the prompt (teacher.server.api {api!r})")
    choice = completion.choices[0]
    if api == "prompt_logprobs":
        first, *rows = _plain(choice.prompt_logprobs or [None])
        last_rows, last_tokens = _token_rows(choice.logprobs)
        came = [*prompt[1:], *last_tokens]
    else:
        last_rows, tokens = _token_rows(choice.logprobs)
        first, rows, came = (last_rows.pop(0) if last_rows else None), [], tokens[1:]
        if [*tokens[: len(prompt)]] != list(prompt):
            raise TeacherError(f"the server read {tokens[: len(prompt)]!r:.60}, and not the prompt {list(prompt)!r:.60}")
    rows += last_rows
    if first is not None or len(rows) != len(prompt) or len(came) != len(prompt):
        raise TeacherError(f"the server gave {len(rows)} rows of logprobs for the {len(prompt)} tokens of a prompt")
    if not all(rows):
        without = next(position for position, row in enumerate(rows) if not row)
        raise TeacherError(f"the server gave no logprobs for position {without} of a prompt of {len(prompt)} tokens")
    return [row for row in rows if row is not None], came


def read_answer(completion: Completion, api: str, sequence: TokenSequence, k: int) -> Distributions:
    """An answer as a record.

    Raises:
        TeacherError: as `read_rows`; or a row that is not the k most probable tokens and the one that came.
    """
    rows, came = read_rows(completion, api, sequence.input_ids_N.tolist())
    ids: list[list[int]] = []
    logprobs: list[list[float]] = []
    target_logprobs: list[float] = []
    for position in sequence.positions_P.tolist():
        support, of_came = split_row(rows[position], came[position], k)
        ids.append(list(support))
        logprobs.append(list(support.values()))
        target_logprobs.append(of_came)
    logprobs_PK = _nats(logprobs)
    check_normalised(logprobs_PK)
    for token in (token for row in ids for token in row):
        if not 0 <= token <= MAX_TOKEN_ID:
            raise TeacherError(f"the server names a token {token}, and no vocabulary has that id")
    return answer(sequence, np.array(ids, np.int32), logprobs_PK, _nats(target_logprobs))


def split_row(row: Row, came: int, k: int) -> tuple[Row, float]:
    """The k most probable tokens of a row, and the logprob of the one that came.

    Raises:
        TeacherError: the row has not k entries, or k + 1 of which the one that came is the least.
    """
    if came not in row:
        raise TeacherError(f"the server's logprobs are not those of the text: token {came} came, and is not among them")
    of_came = row[came]
    if len(row) == k:
        return row, of_came
    support = {token: logprob for token, logprob in row.items() if token != came}
    if len(support) < k:
        raise TeacherError(
            f"the server gives {len(row)} tokens at a position, that which came among them, where selection.k asks for {k}"
        )
    if len(support) > k or of_came > min(support.values()):
        raise TeacherError(
            f"the server gives {len(row)} tokens at a position, which are not the {k} most probable and the one that came"
        )
    return support, of_came


def check_normalised(logprobs_PK: NDArray[np.float32]) -> None:
    """Raise TeacherError unless each row can be part of a distribution: its probabilities sum to at most 1."""
    if not len(logprobs_PK):
        return
    mass = float(np.exp(np.minimum(logprobs_PK.astype(np.float64), 100.0)).sum(axis=-1).max())
    if mass > 1.0 + MAX_EXCESS:
        raise TeacherError(
            f"the server's numbers are not logprobs over the vocabulary: the probabilities of one position sum to {mass:.4g}; "
            "start vLLM with --logprobs-mode raw_logprobs, which is its default"
        )


def _plain(rows: Sequence[dict[int, Entry] | None]) -> list[Row | None]:
    return [None if row is None else {token: entry.logprob for token, entry in row.items()} for row in rows]


def _token_rows(logprobs: TokenLogprobs | None) -> tuple[list[Row | None], list[int]]:
    if logprobs is None or logprobs.top_logprobs is None:
        return [], []
    rows = [None if row is None else {_id_of(text): nats for text, nats in row.items()} for row in logprobs.top_logprobs]
    return rows, [_id_of(text) for text in logprobs.tokens]


def _id_of(text: str) -> int:
    digits = text.removeprefix(TOKEN_ID_PREFIX)
    if digits == text or not digits.isdecimal():
        raise TeacherError(
            f"the server names tokens by their text ({text!r:.40}) and not by their id, and many tokens have the same text; "
            "a server is needed that knows return_tokens_as_token_ids, as vLLM does"
        )
    if len(digits) > len(str(MAX_TOKEN_ID)):
        raise TeacherError(f"the server names a token {digits:.40}, and no vocabulary has that id")
    return int(digits)


def _nats(values: Sequence[Any]) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):  # beyond float32 is impossible as well
        array = np.array(values, np.float32)
    array[array <= IMPOSSIBLE_NATS] = -np.inf
    return array
