"""A real `vllm serve` on this machine for tests, and a small real HTTP server that may stand in front of it."""

from __future__ import annotations

import importlib.metadata
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

START_SECONDS = 240
"""A busy machine takes a minute, an idle one a third of it."""


@contextmanager
def vllm_serve(model: Path, folder: Path, *flags: str) -> Iterator[str]:
    """The base URL of `vllm serve MODEL`, in float32, until the block ends. Its output is in folder/serve.log."""
    port = free_port()
    # The flags keep it small: no graphs, 64 MiB for keys and values.
    small = ["--dtype", "float32", "--enforce-eager", "--kv-cache-memory-bytes", str(2**26), "--max-num-batched-tokens", "256"]
    command = [str(Path(sys.executable).with_name("vllm")), "serve", str(model), "--host", "127.0.0.1", "--port", str(port)]
    with (folder / "serve.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, *small, *flags], stdout=log, stderr=log, env=_environment(folder), start_new_session=True
        )
    try:
        _wait_until_healthy(process, port, folder / "serve.log")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        end_group(process)


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it has started."""
    for sent, seconds in ((signal.SIGTERM, 15), (signal.SIGKILL, 15)):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, sent)
        with suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
    with suppress(ProcessLookupError):  # a child that outlived it
        os.killpg(process.pid, signal.SIGKILL)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _environment(folder: Path) -> dict[str, str]:
    settings = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "VLLM_CPU_CI_ENV": "1"}
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        # The CPU build is a distribution of another name, under which the command `vllm` does not find its own version.
        version = importlib.metadata.version("vllm-cpu")
        info = folder / "metadata" / f"vllm-{version}+cpu.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")
        settings["PYTHONPATH"] = os.pathsep.join(filter(None, [str(info.parent), os.environ.get("PYTHONPATH")]))
    return os.environ | settings


def _wait_until_healthy(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
            return
        time.sleep(0.2)
    raise AssertionError(f"vllm serve did not start: {log.read_text(errors='replace')[-3000:]}")


class FrontServer:
    """Hands requests on to a server, and is gone after some completions, with every connection, as a killed server is."""

    def __init__(self, url: str, *, port: int = 0, completions: int | None = None) -> None:
        self.target, self.completions_left = url.removesuffix("/v1"), completions
        self.lock, self.connections = threading.Lock(), set[socket.socket]()
        self._http = _Front(("127.0.0.1", port), _FrontHandler)
        self._http.owner = self
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        return self._http.server_address[1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def may_complete(self) -> bool:
        with self.lock:
            if self.completions_left is None:
                return True
            self.completions_left -= 1
            return self.completions_left >= 0

    def close(self) -> None:
        if self._thread.is_alive():
            self._http.shutdown()
            self._http.server_close()
        for connection in list(self.connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class _Front(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    owner: FrontServer

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that hangs up is part of the tests


class _FrontHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    server: _Front

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
        self._hand_on(None)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path.endswith("/completions") and not self.server.owner.may_complete():
            threading.Thread(target=self.server.owner.close, daemon=True).start()
            raise ConnectionAbortedError
        self._hand_on(body)

    def _hand_on(self, body: bytes | None) -> None:
        request = urllib.request.Request(self.server.owner.target + self.path, body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                status, data = response.status, response.read()
        except urllib.error.HTTPError as error:
            status, data = error.code, error.read()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
