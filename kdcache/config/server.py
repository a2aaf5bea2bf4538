"""How a server that runs the teacher is asked."""

from __future__ import annotations

from typing import Literal

from kdcache.config.base import Config, NonNegative, Positive, Seconds


class ServerConfig(Config, frozen=True, kw_only=True):
    """The server that runs the teacher, for backend `served` only. Its address and how it is asked are not part of the
    teacher's identity: a capture may be resumed with another server of the same model.

    Attributes:
        url: as clients of the OpenAI API take it, as in `http://host:8000/v1`.
        model: the name under which the server knows the teacher; null where it serves only one model.
        api: which API returns prompt logprobs: `prompt_logprobs` (vLLM), `echo` (the older API's `echo` with `logprobs`, if it
            names tokens by their ids), or `auto`: the first of the two that the server understands.
        api_key_env: name of the environment variable that holds the server's key; null for none. The key itself is never
            written into a config, manifest or log.
        concurrency: most requests in flight; up to twice as many answers wait in memory.
        timeout_seconds: longest silence of the server before a request is given up and sent again.
        deadline_seconds: most time for one sequence, from its first request to its answer.
        retries: how often a request is sent again after a timeout, a lost connection, or status 408, 429 or 5xx.
        vocab_size: token ids that its distributions cover; null for the value in the config.json of teacher.model.
        context_length: most tokens of a sequence; null for the server's own limit, minus the one token that it must generate.
    """

    url: str | None = None
    model: str | None = None
    api: Literal["auto", "prompt_logprobs", "echo"] = "auto"
    api_key_env: str | None = None
    concurrency: Positive = 16
    timeout_seconds: Seconds = 300.0
    deadline_seconds: Seconds = 900.0
    retries: NonNegative = 6
    vocab_size: Positive | None = None
    context_length: Positive | None = None
