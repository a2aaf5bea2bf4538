"""The `served` teacher: a model that answers over HTTP, in `vllm serve` or another server with logprobs of a prompt.

A server is not ours, so whatever can be checked is proven before anything is captured, and what an answer says of its maker
(name, `system_fingerprint`) must stay the same. See answers.py for what is asked and read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import msgspec

from kdcache.config.capture import TeacherConfig
from kdcache.errors import ConfigError, TeacherError
from kdcache.format.manifest import FeatureInfo, SelectionInfo, TeacherIdentity
from kdcache.format.record import Distributions, TokenSequence
from kdcache.shown import get_logger
from kdcache.teacher import load_tokenizer
from kdcache.teacher.base import check_sequences, no_positions, top_k_of
from kdcache.teacher.checkpoint import check_model_name, config_fields, short_name
from kdcache.teacher.features import no_features
from kdcache.teacher.served.answers import (
    APIS,
    Completion,
    completion_request,
    max_answer_bytes,
    read_answer,
    read_completion,
    read_positions,
    speaks,
    split_entries,
)
from kdcache.teacher.served.client import Request, ServerClient, ServerLostError, ServerRefusedError
from kdcache.teacher.served.proofs import compare_answers, compare_ids, probe_prompts, tokenizer_texts
from kdcache.teacher.served.retry import limit_in
from kdcache.teacher.served.settings import (
    api_key,
    choose_card,
    context_length_of,
    name_for_identity,
    refuse_settings,
    vocab_size_of,
)
from kdcache.teacher.tokenizer import Tokenizer

log = get_logger(__name__)

T = TypeVar("T")

MAX_NAME_CHARACTERS = 200
"""The longest version, which goes into manifests."""

PROBE_K = 5
"""The older API gives no more."""


class ServedTeacher:
    """A model on a server; see the module's docstring."""

    def __init__(self, config: TeacherConfig) -> None:
        """Find the model, and prove that the server's numbers are what a record needs.

        Raises:
            ConfigError: a setting that a server does not have, or one that is missing.
            TeacherError: the server does not answer, or its answers cannot be used.
        """
        refuse_settings(config)
        check_model_name(config.model)
        self._config, self._server = config, config.server
        self._client: ServerClient | None = ServerClient(config.server, api_key(config.server))
        self._known_ks: set[int] = set()
        try:
            self._find()
        except BaseException:
            self.close()
            raise

    @property
    def identity(self) -> TeacherIdentity:
        """See `Teacher`: what the server says of itself, and otherwise what the config says."""
        return self._identity

    def score(
        self, sequences: Sequence[TokenSequence], selection: SelectionInfo, features: Sequence[FeatureInfo] = ()
    ) -> Iterator[Distributions]:
        """See `Teacher`. Raises ConfigError also if the server gives fewer entries than k."""
        if features:
            raise no_features("a server")
        k = top_k_of(selection, vocab_size=self._identity.vocab_size, backend="served")
        if self._client is None:
            raise TeacherError(f"the teacher {self._identity.model!r} is closed")
        check_sequences(sequences, self._identity)
        if any(sequence.supervised_N.any() for sequence in sequences):
            self._check_k(k)
        return self._score_all(self._client, sequences, k)

    def close(self) -> None:
        """See `Teacher`. The server keeps running."""
        client, self._client = self._client, None
        if client is not None:
            client.close()

    def _score_all(self, client: ServerClient, sequences: Sequence[TokenSequence], k: int) -> Iterator[Distributions]:
        asked = (sequence for sequence in sequences if sequence.supervised_N.any())
        answers = client.ask_all(self._request(sequence.input_ids_N.tolist(), k) for sequence in asked)
        for sequence in sequences:
            if not sequence.supervised_N.any():
                yield no_positions()
                continue
            try:
                completion = next(answers)
                self._check_maker(completion)
                yield read_answer(completion, self._api, sequence, k)
            except ServerLostError:
                # The next use starts by finding the server again, which may be another one by then.
                self.close()
                raise
            except ServerRefusedError as error:
                raise TeacherError(f"{sequence.source}: the server {self._server.url} refused it, {error.sentence}") from error
            except TeacherError as error:
                raise TeacherError(f"{sequence.source}: {error}") from error

    def _find(self) -> None:
        card = self._card()
        self._name = str(card["id"])
        fields = config_fields(self._config.model, self._config.revision)
        vocab_size = vocab_size_of(self._config, fields)
        self._api = self._find_api(probe_prompts(vocab_size)[0])
        self._prove_temperature(vocab_size)
        self._identity = TeacherIdentity(
            model=short_name(self._config.model),
            revision=self._config.revision,
            architecture=str((fields.get("architectures") or ["unknown"])[0]),
            vocab_size=vocab_size,
            dtype="unknown" if self._config.dtype == "auto" else self._config.dtype,
            quantization=self._config.quantization,
            engine="served",
            engine_version=self._version(),
            engine_options={"served_model": name_for_identity(self._name), "system_fingerprint": self._maker[1]},
            context_length=context_length_of(self._server, card),
        )
        self._prove_tokenizer()

    def _card(self) -> dict[str, Any]:
        """The server's entry for the teacher. This is the first request, where a wrong address or key shows."""
        url = self._server.url
        try:
            listed = self._ask(Request("models", msgspec.json.decode))
        except ServerRefusedError as error:
            hint = ""
            if error.status in (401, 403):
                hint = "; teacher.server.api_key_env names the environment variable that holds the key"
            elif error.status == 404:
                hint = "; with most servers teacher.server.url ends in /v1"
            raise ConfigError(f"the server {url} does not list its models, {error.sentence}{hint}") from error
        return choose_card(listed, self._server)

    def _find_api(self, prompt: Sequence[int]) -> str:
        """The first way of asking that gives logprobs of a prompt; sets `_maker`."""
        asked = APIS if self._server.api == "auto" else (self._server.api,)
        refusals: list[str] = []
        for api in asked:
            try:
                completion = self._complete(api, prompt)
            except ServerRefusedError as error:
                refusals.append(f" ({api}: {error.sentence})")
                continue
            if speaks(completion, api):
                self._maker = (completion.model, completion.system_fingerprint)
                return api
        raise TeacherError(
            f"the server {self._server.url} gives no logprobs of a prompt, asked by {' and by '.join(asked)}"
            f"{''.join(refusals)}; `vllm serve` does"
        )

    def _prove_temperature(self, vocab_size: int) -> None:
        """Prove that the generated token's logprobs are like the prompt's, and that no temperature is in either."""
        shorter, longer = probe_prompts(vocab_size)
        problem = compare_answers(
            (self._complete(self._api, shorter), shorter),
            (self._complete(self._api, longer, temperature=0.5), longer),
            self._api,
        )
        if problem is not None:
            raise TeacherError(f"the server {self._server.url} cannot be a teacher: {problem}")

    def _prove_tokenizer(self) -> None:
        """Prove that the server's tokenizer gives the ids that ours gives, if it can be asked."""
        config, url = self._config, self._server.url
        name = config.tokenizer or config.model
        revision = config.revision if config.tokenizer is None else None
        tokenizer = load_tokenizer(name, revision=revision, trust_remote_code=config.trusts_remote_code)
        plain, special = tokenizer_texts(tokenizer)
        try:
            problem = self._compare_tokens(tokenizer, plain)
            about_special = self._compare_tokens(tokenizer, special) if special else None
        except ServerRefusedError:
            self._doubt(
                f"the server {url} does not say how it tokenizes (/tokenize, as in vLLM), so whether it is as {name!r} does"
            )
            return
        if problem is not None:
            raise TeacherError(
                f"the server {url} has another tokenizer than {name!r}: {problem}; set teacher.model or teacher.tokenizer to "
                "what the server runs"
            )
        if about_special is not None:
            self._doubt(
                f"the server {url} reads special tokens differently from {name!r} ({about_special}), so whether they "
                "are the same"
            )

    def _compare_tokens(self, tokenizer: Tokenizer, text: str) -> str | None:
        body = {"model": self._name, "prompt": text, "add_special_tokens": False}
        theirs = self._ask(Request(f"{self._root}/tokenize", _tokens_of, body))
        return compare_ids(tokenizer.encode(text, add_special_tokens=False), theirs)

    def _doubt(self, sentence: str) -> None:
        """Raise TeacherError under `strict`, else warn."""
        if self._config.strict:
            raise TeacherError(f"{sentence} is not known, and teacher.strict forbids continuing")
        log.warning("%s is not known", sentence)

    def _check_k(self, k: int) -> None:
        """Raise ConfigError if the server does not give this many entries."""
        if k in self._known_ks:
            return
        problem, limits = self._try_k(k)
        if problem is not None:
            # Tested, not believed: a number in the server's sentence may be its limit or something else.
            limit = next((limit for limit in limits if 0 < limit < k and self._try_k(limit)[0] is None), None)
            allowed = "set a smaller selection.k" if limit is None else f"set selection.k to {limit} or less"
            raise ConfigError(
                f"selection.k is {k}, but the server {self._server.url} {problem}; {allowed}, or start the server with more "
                f"(vLLM: --max-logprobs {k})"
            )
        self._known_ks.add(k)

    def _try_k(self, k: int) -> tuple[str | None, list[int]]:
        """Why the server does not give k entries, or None; and how many it may give instead, the likely ones first."""
        prompt = list(probe_prompts(self._identity.vocab_size)[0])
        try:
            positions, came = read_positions(self._complete(self._api, prompt, k=k), self._api, prompt)
            # One entry too few looks complete if the token that came is outside the top k: it must be inside once.
            best = max(positions[-1], key=lambda token: positions[-1][token])
            longer = read_positions(self._complete(self._api, [*prompt, best], k=k), self._api, [*prompt, best])
        except ServerRefusedError as error:
            limit = limit_in(error.sentence)
            return f"refuses it, {error.sentence}", [] if limit is None else [limit]
        positions, came = [*positions, *longer[0]], [*came, *longer[1]]
        try:  # Some servers silently give fewer.
            for entries, token in zip(positions, came, strict=True):
                split_entries(entries, token, k)
        except TeacherError as error:
            fewest = min(map(len, positions))  # the token that came is among the limit's, or one more
            return f"gives fewer: {error}", [fewest, fewest - 1]
        return None, []

    def _check_maker(self, completion: Completion) -> None:
        maker = (completion.model, completion.system_fingerprint)
        if maker != self._maker:
            # Closed: the server must be found and identified again before it is asked for more.
            self.close()
            raise TeacherError(
                f"the server {self._server.url} answers as {maker!r:.200} now, and was {self._maker!r} at the start"
            )

    def _version(self) -> str:
        """vLLM's version; `unknown` if the server does not say."""
        try:
            return self._ask(Request(f"{self._root}/version", _version_of))
        except ServerRefusedError:
            return "unknown"

    def _complete(self, api: str, prompt: Sequence[int], *, k: int = PROBE_K, temperature: float = 1.0) -> Completion:
        request = self._request(prompt, k, api=api, temperature=temperature)
        return self._ask(request)

    def _request(
        self, prompt: Sequence[int], k: int, *, api: str | None = None, temperature: float = 1.0
    ) -> Request[Completion]:
        body = completion_request(api or self._api, self._name, prompt, k, temperature)
        return Request("completions", read_completion, body, max_answer_bytes(len(prompt), k))

    def _ask(self, request: Request[T]) -> T:
        client = self._client
        assert client is not None
        try:
            return client.ask(request)
        except ServerLostError:
            self.close()
            raise

    @property
    def _root(self) -> str:
        """The root of vLLM's own paths: next to /v1, not below it."""
        return str(self._server.url).rstrip("/").removesuffix("/v1")


def _tokens_of(data: bytes) -> list[int]:
    return _field_of(data, "tokens", list)


def _version_of(data: bytes) -> str:
    return _field_of(data, "version", str)


def _field_of(data: bytes, name: str, kind: type[T]) -> T:
    """A field of a JSON object; an answer of another program on the same path counts as a refusal."""
    fields = msgspec.json.decode(data)
    value = fields.get(name) if isinstance(fields, dict) else None
    if not value or not isinstance(value, kind) or (isinstance(value, str) and len(value) > MAX_NAME_CHARACTERS):
        raise ServerRefusedError(200, f"an answer without {name!r}")
    return value
