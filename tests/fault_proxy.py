"""An HTTP proxy in front of a store that does to some answers what networks and stores do: it fails, cuts, delays, changes or
loses them. Standard library only.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass(frozen=True)
class Request:
    """What a fault is chosen by; `number` counts all requests from 0."""

    number: int
    method: str
    path: str
    headers: dict[str, str] = field(repr=False)

    @property
    def is_read(self) -> bool:
        """Of an object's bytes."""
        return self.method == "GET" and "list-type" not in self.path


_buckets = itertools.count()

FAULTS = {
    "unavailable": "answers 503",
    "broken": "answers 500",
    "reset": "resets the connection and does nothing",
    "lost": "does what is asked and resets the connection without an answer",
    "truncated": "closes the connection in the middle of the body",
    "short": "answers a part of the body as if it were all",
    "slow": "answers too late",
    "changed": "changes a bit of the body",
}


class FaultProxy:
    """Forwards to `upstream`, a (host, port); `choose(request)` names the fault of a request, or None. Close it."""

    def __init__(self, upstream: tuple[str, int], choose: Callable[[Request], str | None] = lambda request: None) -> None:
        self.choose, self.upstream = choose, upstream
        self.bucket = ""
        self.requests: list[Request] = []
        self.faults: list[str] = []
        self.slow_seconds = 3.0
        self.lock = threading.Lock()
        self.create_lock = threading.Lock()  # moto looks whether an object is there and puts it in two steps; stores do not
        self._server = ThreadingHTTPServer(
            ("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": self, "upstream": upstream})
        )
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    @property
    def environment(self) -> dict[str, str]:
        """Variables by which S3 clients find the store."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def renew(self) -> None:
        """Do no harm, forget what was asked, and make a new bucket."""
        self.choose = lambda request: None
        self.requests, self.faults = [], []
        self.bucket = f"bucket-{next(_buckets)}"
        connection = http.client.HTTPConnection(*self.upstream, timeout=60)
        connection.request("PUT", f"/{self.bucket}")
        assert connection.getresponse().status == 200
        connection.close()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else head and body of an answer are 40 ms apart
    proxy: FaultProxy
    upstream: tuple[str, int]

    def log_message(self, format, *args):
        pass

    def do_any(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        proxy = self.proxy
        with proxy.lock:
            request = Request(len(proxy.requests), self.command, self.path, dict(self.headers.items()))
            proxy.requests.append(request)
        fault = proxy.choose(request)
        if fault is not None:
            with proxy.lock:
                proxy.faults.append(fault)
        if fault in ("unavailable", "broken"):
            return self.answer(503 if fault == "unavailable" else 500, {}, b"")
        if fault == "reset":
            return self.reset()
        if "If-None-Match" in request.headers:
            with proxy.create_lock:
                status, headers, data = self.forward(body)
        else:
            status, headers, data = self.forward(body)
        if fault == "lost":
            return self.reset()
        if fault == "slow":
            time.sleep(proxy.slow_seconds)
        if fault == "changed" and data:
            data = bytearray(data)
            data[len(data) // 2] ^= 16
        if fault == "short" and len(data) > 1:
            data = data[: len(data) // 2]
            headers.pop("Content-Length", None)
        return self.answer(status, headers, bytes(data), is_cut=fault == "truncated")

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_any

    def forward(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(*self.upstream, timeout=60)
        headers = {k: v for k, v in self.headers.items() if k.lower() not in ("connection", "expect", "transfer-encoding")}
        connection.request(self.command, self.path, body or None, headers)
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        dropped = ("connection", "transfer-encoding", "keep-alive")
        return answer.status, {k: v for k, v in answer.getheaders() if k.lower() not in dropped}, data

    def answer(self, status: int, headers: dict[str, str], data: bytes, *, is_cut: bool = False) -> None:
        try:
            self.send_response_only(status)
            if self.command != "HEAD":
                headers = {k: v for k, v in headers.items() if k.lower() != "content-length"} | {
                    "Content-Length": str(len(data))
                }
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data[: len(data) // 2] if is_cut else data)
        except OSError:
            self.close_connection = True  # the client has gone
        if is_cut:
            self.reset()

    def reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def handle(self):
        with contextlib.suppress(OSError, ValueError):
            super().handle()  # the client has gone, or we have closed the connection ourselves

    def finish(self):
        with contextlib.suppress(OSError, ValueError):
            super().finish()
