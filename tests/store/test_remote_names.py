"""What no store will ever answer otherwise is said at once, before anything is written; the user's own settings are kept."""

from __future__ import annotations

import json
import ssl
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from fault_proxy import FaultProxy

from kdcache.config.remote import RemoteConfig
from kdcache.errors import ConfigError, CorruptCacheError, KdcacheError, StorageError
from kdcache.store.files.location import RemotePath, locate
from kdcache.store.files.remote_errors import translated


def patient(**options: object) -> RemoteConfig:
    """Anything that is tried again takes longer than a test may."""
    return RemoteConfig(deadline_seconds=600.0, options=options)


class Redirecting(BaseHTTPRequestHandler):
    """A store that says, as S3 does, that the bucket is in another region."""

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        body = b"<Error><Code>PermanentRedirect</Code><Message>elsewhere</Message></Error>"
        self.send_response(301)
        self.send_header("x-amz-bucket-region", "eu-west-1")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_PUT = do_GET


@pytest.fixture
def redirecting() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Redirecting)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("uri", "sentence"),
    [
        ("s3://bkt//x", r"did you mean s3://bkt/x\?"),
        ("s3:///bkt/x", r"did you mean s3://bkt/x\?"),
        ("s3://bkt/a/./b/../c", r"did you mean s3://bkt/a/b/c\?"),
        ("gs://bkt/a\nb", "holds a control character"),
        ("s3:/bkt/a", "expected a URI, as text: s3://bkt/a"),
        (Path("s3://bkt/a"), "expected a URI, as text: s3://bkt/a"),
        ("file:/tmp/a", "expected a URI, as text: file:///tmp/a"),
    ],
)
def test_a_name_that_is_read_in_two_ways_is_refused(uri, sentence):
    with pytest.raises(ConfigError, match=sentence):
        locate(uri)


def test_odd_names_work_or_are_refused_before_anything_is_written(s3: FaultProxy):
    for name in ("a b", "\u00e4+%20&=", "a?b#c*[d]", "a\\b", "~", "a//", "x.y..z"):
        place = locate(f"s3://{s3.bucket}/{name}", patient())
        assert isinstance(place, RemotePath)
        (place / "x").write_bytes(b"1")
        assert [below.read_bytes() for below in place.iterdir()] == [b"1"]  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ConfigError, match=r"s3:// reads this name as '.*/v'; take a plainer one"):
        locate(f"s3://{s3.bucket}/v?versionId=1", patient()).write_bytes(b"")


def requests(place: RemotePath) -> Iterator[object]:
    yield place.stat
    yield lambda: list(place.iterdir())
    yield place.read_bytes
    yield lambda: place.write_bytes(b"1")
    yield lambda: place.create(b"1")


def test_what_cannot_change_is_said_at_once(s3: FaultProxy, redirecting: str):
    cases = [
        ("s3://Bad_Bucket!!/x", {}, "no such request can be made .*Invalid bucket name"),
        (f"s3://{s3.bucket}/x", {"nonsense": 1}, "unexpected keyword argument 'nonsense'.*remote.options"),
        (f"s3://{s3.bucket}/x", {"config_kwargs": {"nonsense": 1}}, "unexpected keyword argument 'nonsense'"),
        (f"s3://{s3.bucket}/x", {"client_kwargs": {"nonsense": 1}}, "unexpected keyword argument 'nonsense'"),
        (f"s3://{s3.bucket}/x", {"endpoint_url": "localhost:9000"}, "Invalid endpoint"),
        (f"s3://{s3.bucket}/x", {"profile": "nobody"}, "profile .nobody. could not be found"),
        (f"s3://{s3.bucket}/x", {"endpoint_url": redirecting}, "the bucket is in region 'eu-west-1'"),
        ("s3://no-such-bucket/x", {}, "the store has no bucket 'no-such-bucket'"),
    ]
    started = time.monotonic()
    for uri, options, sentence in cases:
        for request in requests(locate(uri, patient(**options))):  # pyright: ignore[reportArgumentType]
            with pytest.raises((ConfigError, StorageError), match=sentence):
                request()  # pyright: ignore[reportCallIssue]
    whole = locate(f"s3://{s3.bucket}/short", patient())
    whole.write_bytes(b"123")
    with pytest.raises(CorruptCacheError, match="has 3 bytes, expected 20 or more"):
        whole.read_range(10, 20)  # pyright: ignore[reportAttributeAccessIssue]
    assert time.monotonic() - started < 20


def test_the_users_settings_are_merged_with_ours(s3: FaultProxy, monkeypatch: pytest.MonkeyPatch):
    import fsspec

    from kdcache.store.files._fsspec import ObjectStore

    monkeypatch.setitem(
        fsspec.config.conf,
        "s3",
        {"config_kwargs": {"user_agent_extra": "of-the-file", "read_timeout": 77}, "default_block_size": 5},
    )
    config = RemoteConfig(options={"config_kwargs": {"read_timeout": 88, "s3": {"addressing_style": "path"}}})
    filesystem = ObjectStore("s3", config)._open()
    assert filesystem.default_block_size == 5
    assert filesystem.config_kwargs == {
        "connect_timeout": 10.0,
        "max_pool_connections": 16,
        "retries": {"max_attempts": 0},
        "user_agent_extra": "of-the-file",
        "read_timeout": 88,
        "s3": {"addressing_style": "path"},
    }


class Answer(Exception):
    """What a store's library raises, with the status of the answer or without one."""

    def __init__(self, status: int = 0, code: str = "") -> None:
        super().__init__("words")
        if status:
            self.response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}


class BotoCoreError(Exception):
    pass


class HTTPClientError(BotoCoreError):
    pass


PASSING = [
    *(Answer(status) for status in (408, 409, 429, 500, 503)),
    *(Answer(400, "RequestTimeout"), Answer(), HTTPClientError(), TimeoutError(), ConnectionResetError(), OSError("?")),
    *(json.JSONDecodeError("garbled", "<html>", 0), UnicodeDecodeError("utf-8", b"", 0, 0, "")),
]
FINAL = [
    *(Answer(status) for status in (301, 307, 400, 405, 501)),
    *(Answer(404, "NoSuchBucket"), BotoCoreError(), TypeError(), KeyError(), ValueError(), NotImplementedError()),
    ssl.SSLCertVerificationError(),
]


@pytest.mark.parametrize("error", PASSING, ids=repr)
def test_what_may_pass_is_an_oserror_that_is_tried_again(error):
    again = translated(error, "s3://b/x")
    assert isinstance(again, OSError)
    assert not isinstance(again, KdcacheError | FileNotFoundError | FileExistsError | PermissionError)


@pytest.mark.parametrize("error", FINAL, ids=repr)
def test_what_cannot_pass_is_an_error_of_ours(error):
    assert isinstance(translated(error, "s3://b/x"), ConfigError | StorageError)


def test_a_hub_that_may_not_be_asked_is_not_asked_again():
    from huggingface_hub.errors import OfflineModeIsEnabled

    error = translated(OfflineModeIsEnabled("Cannot reach the hub: offline mode is enabled"), "hf://datasets/u/r/c")
    assert isinstance(error, StorageError)
    assert "unset it" in str(error)


def test_a_missing_local_file_is_no_missing_bucket():
    local = FileNotFoundError(2, "No such file or directory", "/spool/x")
    assert type(translated(local, "s3://b/x", is_put=True)) is FileNotFoundError
    assert "no bucket 'b'" in str(translated(FileNotFoundError("b/x"), "gs://b/x", is_put=True))
