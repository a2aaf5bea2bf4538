"""Requests to a server: many in flight, answers in the order of the requests, retried after errors that may pass.

An event loop in a thread of its own does the waiting, so that a request that is no longer wanted can be dropped at once,
whatever the server is doing.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
import weakref
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import httpx2
import msgspec

from kdcache.config.server import ServerConfig
from kdcache.errors import TeacherError
from kdcache.shown import first_line
from kdcache.teacher.served.retry import error_in, is_transient, refusal, seconds_to_wait, unreadable

T = TypeVar("T")

CONNECT_SECONDS = 20.0
MAX_SMALL_ANSWER_BYTES = 2**22
"""The most bytes of an answer without logprobs: a list of models or of a few tokens, a version."""

MAX_REFUSAL_BYTES = 2**20
"""How much of a refusal is read; the rest is ignored."""

ENCODING = "gzip"
"""The only compression that we ask for: it is unpacked piece by piece here, up to the bound and no further."""

POLL_SECONDS = 0.5
"""How often a waiting thread wakes up: if it is not the main one, an interrupt cannot wake it."""


class ServerLostError(TeacherError):
    """The server did not answer, whatever we tried."""


class ServerRefusedError(TeacherError):
    """The server refused; asking again would not help.

    Attributes:
        status: of HTTP.
        sentence: what the server said.
    """

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status, self.sentence = status, sentence


@dataclass(frozen=True)
class Request(Generic[T]):
    """One request, and how to read its answer.

    Attributes:
        path: relative to the base URL; an absolute URL replaces it.
        read: parses the answer's bytes; a msgspec.DecodeError from it means that the answer was cut off.
        body: of a POST; None for a GET.
        max_bytes: the longest answer, decompressed; it follows from what is asked.
    """

    path: str
    read: Callable[[bytes], T]
    body: Any = None
    max_bytes: int = MAX_SMALL_ANSWER_BYTES


class ServerClient:
    """A client of one server. It has a lifetime: close it."""

    def __init__(self, config: ServerConfig, key: str | None) -> None:
        """Start the event loop; nothing is sent yet.

        Args:
            config: where the server is, and how patient to be.
            key: for the server only; it appears in no message.
        """
        self._config, self._key = config, key
        self._indices = itertools.count()
        self._loop = asyncio.new_event_loop()
        thread = threading.Thread(target=self._loop.run_forever, name="kdcache-server-client", daemon=True)
        thread.start()
        self._http, self._slots = self._in_loop(self._open()).result()
        # Also if nobody closes it, and when the interpreter ends.
        self._finish = weakref.finalize(self, _shut_down, self._loop, thread, self._http)

    def ask(self, request: Request[T]) -> T:
        """The answer to one request.

        Raises:
            ServerLostError: no answer came after all retries, or by the deadline.
            ServerRefusedError: the server refused.
        """
        return next(self.ask_all([request]))

    def ask_all(self, requests: Iterable[Request[T]]) -> Iterator[T]:
        """The answers, in the order of the requests, which are taken as needed; raises as `ask`.

        Dropping the iterator cancels what is in flight.
        """
        waiting: deque[Future[T]] = deque()
        remaining = iter(requests)
        try:
            while True:
                if self._loop.is_closed():
                    raise TeacherError(f"the connection to the server {self._config.url} was closed while it was being asked")
                for request in itertools.islice(remaining, 2 * self._config.concurrency - len(waiting)):
                    waiting.append(self._in_loop(self._ask(request, str(next(self._indices)))))
                if not waiting:
                    return
                answer = _result(waiting[0])
                waiting.popleft()
                yield answer
        finally:
            for future in waiting:
                future.cancel()

    def close(self) -> None:
        """Cancel what is in flight and close the connections; calling it twice is fine."""
        self._finish()

    def _in_loop(self, coroutine: Any) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    async def _open(self) -> tuple[httpx2.AsyncClient, asyncio.Semaphore]:
        config = self._config
        http = httpx2.AsyncClient(
            base_url=str(config.url).rstrip("/") + "/",
            headers={"Accept-Encoding": ENCODING} | ({"Authorization": f"Bearer {self._key}"} if self._key else {}),
            timeout=httpx2.Timeout(config.timeout_seconds, connect=min(config.timeout_seconds, CONNECT_SECONDS)),
            # The slots bound the connections; a bound here would make requests wait within their own time limits.
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=config.concurrency),
        )
        return http, asyncio.Semaphore(config.concurrency)

    async def _ask(self, request: Request[T], key: str) -> T:
        async with self._slots:
            started, attempt = time.monotonic(), 0
            while True:
                attempt += 1
                seconds_left = self._config.deadline_seconds - (time.monotonic() - started)
                answer, problem, retry_after = await self._try(request, seconds_left)
                if problem is None:
                    return answer  # pyright: ignore[reportReturnType]
                wait = seconds_to_wait(attempt, key, retry_after)
                passed = time.monotonic() - started
                if attempt > self._config.retries or passed + wait > self._config.deadline_seconds:
                    raise ServerLostError(self._lost(problem, attempt, passed, wait))
                await asyncio.sleep(wait)

    async def _try(self, request: Request[T], seconds_left: float) -> tuple[T | None, str | None, str | None]:
        """The answer; or what went wrong this time, with the server's Retry-After."""
        try:
            async with asyncio.timeout(seconds_left):
                response, body = await self._send(request)
        except TimeoutError:
            return None, "no answer before the deadline", None
        except httpx2.TimeoutException as error:
            waited = CONNECT_SECONDS if isinstance(error, httpx2.ConnectTimeout) else self._config.timeout_seconds
            return None, f"no answer within {min(waited, self._config.timeout_seconds):g} seconds", None
        except (httpx2.TransportError, zlib.error) as error:
            return None, self._clean(first_line(error)), None
        status = response.status_code
        if status == 200:
            # A path outside the base URL is asked for in case it exists.
            found = error_in(body, status_without_one=404 if "://" in request.path else 503)
            if found is None:
                return self._read(request, body)
            status, sentence = found
        else:
            sentence = refusal(status, body, response.headers.get("Location"))
        if not is_transient(status):
            raise ServerRefusedError(status, self._clean(sentence))
        return None, self._clean(sentence), response.headers.get("Retry-After")

    def _read(self, request: Request[T], body: bytes) -> tuple[T | None, str | None, str | None]:
        try:
            return request.read(body), None, None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            return None, self._clean(unreadable(body, error)), None
        except RecursionError as error:
            raise TeacherError(f"the server {self._config.url} gave an answer that is nested too deeply to be read") from error

    async def _send(self, request: Request[Any]) -> tuple[httpx2.Response, bytes]:
        """The response and its body, which is read up to its longest allowed length."""
        if request.body is None:
            streamed = self._http.stream("GET", request.path)
        else:
            content, headers = msgspec.json.encode(request.body), {"Content-Type": "application/json"}
            streamed = self._http.stream("POST", request.path, content=content, headers=headers)
        async with streamed as response:
            return response, await self._body(request, response)

    async def _body(self, request: Request[Any], response: httpx2.Response) -> bytes:
        encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
        if encoding not in (ENCODING, "identity", ""):
            raise TeacherError(
                f"the server {self._config.url} compresses its answers with {encoding!r:.60}, without being asked to"
            )
        is_answer = response.status_code == 200
        limit, body = request.max_bytes if is_answer else MAX_REFUSAL_BYTES, bytearray()
        unpack = zlib.decompressobj(wbits=31) if encoding == ENCODING else None  # 31: gzip's framing
        async for piece in response.aiter_raw():
            body += unpack.decompress(piece, limit + 1 - len(body)) if unpack else piece
            # The compressed bytes count too: endless compressed data may unpack to nothing.
            if len(body) <= limit and response.num_bytes_downloaded <= limit:
                continue
            if not is_answer:
                return bytes(body[:limit])
            raise TeacherError(
                f"the server {self._config.url} gave an answer of more than {limit:,} bytes, the most that an answer to "
                "this request can have"
            )
        return bytes(body)

    def _lost(self, problem: str, attempts: int, seconds: float, wait: float) -> str:
        server = self._config
        tries = f"{attempts} time{'' if attempts == 1 else 's'} in {seconds:.0f} seconds"
        if attempts > server.retries:
            limit = f"teacher.server.retries is {server.retries}"
        else:
            limit = f"the next try would be {wait:.0f} seconds later, past teacher.server.deadline_seconds, "
            limit += f"{server.deadline_seconds:g}"
        return f"the server {server.url} was asked {tries} ({limit}); the last time: {problem}"

    def _clean(self, sentence: str) -> str:
        """Mask the key in a sentence: some servers repeat it."""
        return sentence.replace(self._key, "***") if self._key else sentence


def _shut_down(loop: asyncio.AbstractEventLoop, thread: threading.Thread, http: httpx2.AsyncClient) -> None:
    if thread is threading.current_thread():  # collected by the loop's own thread, which cannot wait for itself
        loop.stop()
        return
    with suppress(Exception):
        asyncio.run_coroutine_threadsafe(_hang_up(http), loop).result(CONNECT_SECONDS)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


async def _hang_up(http: httpx2.AsyncClient) -> None:
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await http.aclose()


def _result(future: Future[T]) -> T:
    while True:
        try:
            return future.result(timeout=POLL_SECONDS)
        except NotYet:
            if future.done():
                return future.result()
