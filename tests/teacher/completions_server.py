"""A small real HTTP server with vLLM's completions API, whose model is the fake teacher; its manners and faults are chosen.

Its numbers have a closed form, so the teacher that asks it can be held to every promise without an engine.
"""

from __future__ import annotations

import gzip
import itertools
import json
import socket
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from contracts.teacher import make_sequence

from kdcache.config.server import ServerConfig
from kdcache.config.teacher import FakeConfig, TeacherConfig
from kdcache.teacher import load_teacher
from kdcache.teacher.base import Teacher
from kdcache.teacher.fake import FakeTeacher, FakeTokenizer

VOCAB_SIZE, MAX_MODEL_LEN = 300, 101


@dataclass
class Manners:
    """How the server is unlike vLLM at its best.

    Attributes:
        understands: of `prompt_logprobs` and `echo`, what it does not pass over.
        max_logprobs: a larger k is refused in vLLM's words; with `caps` it is silently made smaller.
        names_ids: whether it heeds return_tokens_as_token_ids.
        temperature_in: rows that the temperature is applied to: of `prompt` and `generated`.
        sharpens: factor of the generated row's logprobs, as of a server with a temperature of its own.
        key: that it asks for.
        models: that it lists.
        tokenizes: `ours`, `otherwise`, `special otherwise`, or `no`.
        fingerprint: system_fingerprint of its answers.
        faults: what becomes of the next completions, one each, "" for a good answer.
        wait_seconds: before each completion.
    """

    understands: tuple[str, ...] = ("prompt_logprobs", "echo")
    max_logprobs: int = VOCAB_SIZE
    caps: bool = False
    names_ids: bool = True
    temperature_in: tuple[str, ...] = ()
    sharpens: float = 1.0
    key: str | None = None
    models: tuple[dict[str, Any], ...] = ({"id": "served-fake", "max_model_len": MAX_MODEL_LEN},)
    tokenizes: str = "ours"
    fingerprint: str | None = "stub-1"
    faults: deque[str] = field(default_factory=deque)
    wait_seconds: float = 0.0


class CompletionsServer:
    """The server, on a free port of this machine, until it is closed."""

    def __init__(self, manners: Manners | None = None, port: int = 0) -> None:
        self.manners = manners or Manners()
        self.model = FakeTeacher(
            TeacherConfig(model="fake", backend="fake", fake=FakeConfig(vocab_size=VOCAB_SIZE, context_length=MAX_MODEL_LEN))
        )
        self.bodies: list[dict[str, Any]] = []
        self.in_flight = self.most_in_flight = 0
        self.lock = threading.Lock()
        self.connections: set[socket.socket] = set()
        self._teachers: list[Teacher] = []
        self._http = _Server(("127.0.0.1", port), _Handler)
        self._http.owner = self
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        return self._http.server_address[1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def config(self, **changes: Any) -> TeacherConfig:
        """Of a teacher that asks this server, hurriedly."""
        server = {"url": self.url, "vocab_size": VOCAB_SIZE, "retries": 2, "timeout_seconds": 5.0} | changes.pop("server", {})
        settings = {"model": "fake", "tokenizer": "fake", "backend": "served", "server": ServerConfig(**server)}
        return TeacherConfig(**(settings | changes))

    def teacher(self, **changes: Any) -> Teacher:
        """One that asks this server; closed with it."""
        teacher = load_teacher(self.config(**changes))
        self._teachers.append(teacher)
        return teacher

    def close(self) -> None:
        """Twice is fine."""
        for teacher in self._teachers:
            teacher.close()
        if self._thread.is_alive():
            self.stop()

    def stop(self) -> None:
        """The server alone: it is gone for those who ask it."""
        self._http.shutdown()
        for connection in list(self.connections):
            hang_up(connection)
        self._http.server_close()
        self._thread.join()


def hang_up(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    owner: CompletionsServer

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that hangs up is part of the tests


class _Refusal(Exception):
    def __init__(self, status: int, message: str, **headers: str) -> None:
        self.status, self.message, self.headers = status, message, {n.replace("_", "-"): v for n, v in headers.items()}


class _Instead(Exception):
    """This body in place of an answer."""

    def __init__(self, status: int, body: str) -> None:
        self.status, self.body = status, body


class _Raw(Exception):
    """This, byte for byte, piece by piece, until it ends or nobody reads it."""

    def __init__(self, pieces: Iterable[bytes], **headers: str) -> None:
        self.pieces, self.headers = pieces, {name.replace("_", "-"): value for name, value in headers.items()}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body in one packet: in two the second waits for the first's acknowledgement
    server: _Server

    def setup(self) -> None:
        super().setup()
        self.server.owner.connections.add(self.connection)

    def finish(self) -> None:
        self.server.owner.connections.discard(self.connection)
        with suppress(OSError):
            super().finish()

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self._answer(lambda: self._post(body))

    def _answer(self, make: Any) -> None:
        try:
            status, fields, headers = 200, make(), {}
        except _Refusal as refusal:
            status, headers = refusal.status, refusal.headers
            fields = {"error": {"message": refusal.message, "type": "BadRequestError", "code": refusal.status}}
        except _Instead as instead:
            status, fields, headers = instead.status, instead.body, {}
        except _Raw as raw:
            self._pour(raw)
            return
        data = (fields if isinstance(fields, str) else json.dumps(fields)).encode()
        if isinstance(fields, dict) and fields.pop("cut", False):
            data = data[: len(data) // 2]
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def _pour(self, raw: _Raw) -> None:
        self.close_connection = True
        self.send_response(200)
        for name, value in raw.headers.items():
            self.send_header(name, value)
        self.end_headers()
        with suppress(OSError):
            for piece in raw.pieces:
                self.wfile.write(piece)
                self.wfile.flush()

    @property
    def _manners(self) -> Manners:
        return self.server.owner.manners

    def _get(self) -> Any:
        self._check_key()
        if self.path == "/v1/models":
            return {"object": "list", "data": list(self._manners.models)}
        if self.path == "/version":
            return {"version": "7.7"}
        raise _Refusal(404, "Not Found")

    def _post(self, body: dict[str, Any]) -> Any:
        self._check_key()
        if self.path == "/tokenize" and self._manners.tokenizes != "no":
            ids = FakeTokenizer().encode(body["prompt"], add_special_tokens=body["add_special_tokens"])
            is_plain = body["prompt"].startswith("Hello")
            as_ours = self._manners.tokenizes == ("special otherwise" if is_plain else "otherwise")
            return {"tokens": ids if self._manners.tokenizes == "ours" or as_ours else [*ids[:3], 7, *ids[4:]]}
        if self.path != "/v1/completions":
            raise _Refusal(404, "Not Found")
        owner = self.server.owner
        with owner.lock:
            owner.bodies.append(body)
            owner.in_flight += 1
            owner.most_in_flight = max(owner.most_in_flight, owner.in_flight)
            fault = owner.manners.faults.popleft() if owner.manners.faults else ""
        try:
            time.sleep(self._manners.wait_seconds)
            return self._complete(body, fault)
        finally:
            with owner.lock:
                owner.in_flight -= 1

    def _check_key(self) -> None:
        key = self._manners.key
        said = self.headers.get("Authorization", "")
        if key is not None and said != f"Bearer {key}":
            raise _Refusal(401, f"Unauthorized: {said!r}")

    def _complete(self, body: dict[str, Any], fault: str) -> Any:
        if fault == "reset":
            hang_up(self.connection)
            raise ConnectionAbortedError
        if fault == "hang":
            time.sleep(30)
        elif fault.isdecimal():
            raise _Refusal(int(fault), "so it is" if fault != "503" else "Service Unavailable", Retry_After="0")
        elif fault.startswith("answers "):
            raise _Instead(200, fault.removeprefix("answers "))
        elif fault in HOSTILE:
            raise HOSTILE[fault]()
        elif fault.startswith("moved "):
            raise _Refusal(307, "", Location=fault.removeprefix("moved "))
        elif fault.startswith("wait "):
            raise _Refusal(429, "Too Many Requests", Retry_After=fault.removeprefix("wait "))
        manners, prompt = self._manners, body["prompt"]
        k = body["logprobs"]
        if k > manners.max_logprobs and not manners.caps:
            raise _Refusal(400, f"Requested sample logprobs of {k}, which is greater than max allowed: {manners.max_logprobs}")
        rows = self._rows(prompt, min(k, manners.max_logprobs), body["temperature"])
        generated = rows[-1][1]
        choice: dict[str, Any] = {"index": 0, "text": "?"}
        if body.get("echo") and "echo" in manners.understands:
            tokens = [*prompt, generated]
            choice["logprobs"] = self._older([(None, prompt[0]), *rows], tokens)
        else:
            choice["logprobs"] = self._older(rows[-1:], [generated])
        if "prompt_logprobs" in body and "prompt_logprobs" in manners.understands:
            choice["prompt_logprobs"] = [None] + [
                {str(token): {"logprob": nats, "rank": 1, "decoded_token": "?"} for token, nats in row.items()}
                for row, _ in rows[:-1]
            ]
        fields = {"model": body["model"], "system_fingerprint": manners.fingerprint, "choices": [choice]}
        return fields | ({"cut": True} if fault == "cut" else {})

    def _rows(self, prompt: list[int], k: int, temperature: float) -> list[tuple[dict[int, float], int]]:
        """(k or k + 1 entries, the token that came) at every position; the last one's is drawn."""
        dense_NV = self.server.owner.model.dense_logprobs(make_sequence(prompt))
        for name, part in (("prompt", slice(0, -1)), ("generated", slice(-1, None))):
            if name in self._manners.temperature_in:
                dense_NV[part] = dense_NV[part] / temperature
                dense_NV[part] -= np.log(np.exp(dense_NV[part]).sum(axis=-1, keepdims=True))
        dense_NV[-1] *= self._manners.sharpens
        came = [*prompt[1:], (sum(prompt) * 7) % VOCAB_SIZE]
        rows = []
        for logprobs_V, token in zip(dense_NV, came, strict=True):
            ids = dict.fromkeys([token, *np.argsort(-logprobs_V, kind="stable")[:k].tolist()])
            rows.append(({i: max(float(logprobs_V[i]), -9999.0) for i in ids}, token))
        return rows

    def _older(self, rows: Any, tokens: list[int]) -> dict[str, Any]:
        name = (lambda i: f"token_id:{i}") if self._manners.names_ids else (lambda i: f"t{i % 9}")
        tops = [None if row is None else {name(i): nats for i, nats in row.items()} for row, _ in rows]
        return {"tokens": [name(i) for i in tokens], "top_logprobs": tops, "token_logprobs": [None] * len(tokens)}


def _dripping() -> Iterator[bytes]:
    yield b'{"choices": ['
    while True:
        time.sleep(0.05)
        yield b" "


def _empty_blocks() -> Iterator[bytes]:
    yield gzip.compress(b"")[:10]
    yield from itertools.repeat(b"\0\0\0\xff\xff" * 2**14)


def _inflating() -> Iterator[bytes]:
    pack = zlib.compressobj(9, wbits=31)
    yield pack.compress(b'{"choices": [')
    while True:
        yield pack.compress(b" " * 2**20)


HOSTILE: dict[str, Callable[[], _Raw]] = {
    "endless": lambda: _Raw(itertools.repeat(b" " * 2**16)),
    "endless nothing": lambda: _Raw(_empty_blocks(), Content_Encoding="gzip"),
    "bomb": lambda: _Raw(_inflating(), Content_Encoding="gzip"),
    "bomb in a bomb": lambda: _Raw(_inflating(), Content_Encoding="gzip, gzip"),
    "other compression": lambda: _Raw([b"x"], Content_Encoding="zstd"),
    "deep": lambda: _Raw([b'{"choices": ' + b"[" * 10**6]),
    "deep and ignored": lambda: _Raw([b'{"other": ' + b"[" * 10**6]),
    "drip": lambda: _Raw(_dripping()),
    "long header": lambda: _Raw([b"{}"], X_Long="x" * 10**7),
    "many headers": lambda: _Raw([b"{}"], **{f"X_{number}": "x" * 1000 for number in range(10**4)}),
}
"""What becomes of a completion that is meant to harm."""
