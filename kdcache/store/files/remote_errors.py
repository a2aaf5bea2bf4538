"""What a store's exception means: missing, occupied, refused, a request that nobody can answer, or one to try again.

Sorted by what the exception carries, not by its name: the HTTP status, where an answer came; whether it is one of the
transport's, where none did. What was raised before a request was sent is raised again each time.
"""

from __future__ import annotations

import errno
import json
import os
import ssl
from typing import Any

from kdcache.errors import ConfigError, KdcacheError, StorageError

_OCCUPIED = {"PreconditionFailed", "412"}
_NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError", "RefreshError"}
_PASSING_STATUSES = {408, 409, 425, 429}
_PASSING_CODES = {"RequestTimeout", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch", "SlowDown"}
"""Of answers with status 400: the request was damaged or slow on its way."""
_FINAL_SERVER_STATUSES = {501, 505}
_UNSENT = (TypeError, ValueError, LookupError, AttributeError, NotImplementedError, ImportError, AssertionError)
_GARBLED = (UnicodeError, json.JSONDecodeError)
_BOTOCORE_TRANSPORT = {"HTTPClientError", "ConnectionError", "ResponseParserError", "IncompleteReadError", "ChecksumError"}
_BOTOCORE_TRANSPORT |= {"FlexibleChecksumError", "ResponseStreamingError", "CredentialRetrievalError", "MetadataRetrievalError"}


def translated(error: Exception, uri: str, *, is_put: bool = False) -> Exception:
    """Translate a store's exception into one whose type says what to do.

    Returns:
        FileNotFoundError, FileExistsError, PermissionError: the store's answers. ConfigError, StorageError: no other answer
        will come. Any other OSError: try again.
    """
    causes = _causes(error)
    codes = {_code(cause) for cause in causes}
    status = http_status(error)
    # A put finds nothing missing but its bucket; a missing local file has a name of its own.
    is_missing_bucket = is_put and isinstance(error, FileNotFoundError) and error.filename is None
    if "NoSuchBucket" in codes or is_missing_bucket:
        return StorageError(f"{uri}: the store has no bucket {_bucket(uri)!r}; make it, or correct the name")
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), uri)
    if isinstance(error, FileExistsError) or codes & _OCCUPIED:
        return FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), uri)
    if any(type(cause).__name__ in _NO_CREDENTIALS for cause in causes):
        return PermissionError(errno.EACCES, _shown(error), uri)
    if isinstance(error, PermissionError):
        return error
    if 300 <= status < 400:
        return StorageError(f"{uri}: the store sends this request elsewhere (status {status}){_elsewhere(causes)}")
    if _is_final(status, codes):
        return StorageError(f"{uri}: the store refuses the request and will again (status {status}): {_shown(error)}")
    return _without_answer(error, causes, uri, status)


def http_status(error: BaseException) -> int:
    """The HTTP status that an exception, or one of its causes, carries; 0 where no answer came."""
    return next((status for status in map(_status, _causes(error)) if status), 0)


def _status(error: BaseException) -> int:
    response = getattr(error, "response", None)  # botocore's is a dict; requests' and httpx's have a status_code
    if isinstance(response, dict):
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    else:
        found = getattr(response, "status_code", None) or getattr(error, "status", None) or getattr(error, "code", 0)
    return int(found) if str(found).isdecimal() else 0


def _is_final(status: int, codes: set[str]) -> bool:
    if status >= 500:
        return status in _FINAL_SERVER_STATUSES
    return status >= 400 and status not in _PASSING_STATUSES and not codes & _PASSING_CODES


def _without_answer(error: Exception, causes: list[BaseException], uri: str, status: int) -> Exception:
    if isinstance(error, KdcacheError):
        return error
    if any(isinstance(cause, ssl.SSLCertVerificationError) for cause in causes):
        return StorageError(f"{uri}: the store's certificate is not trusted: {_shown(error)}")
    if any(type(cause).__name__ == "OfflineModeIsEnabled" for cause in causes):
        return StorageError(f"{uri}: HF_HUB_OFFLINE forbids asking the hub; unset it, or name a local copy of the cache")
    if not status and any(_is_unsent(cause) for cause in causes):
        return ConfigError(
            f"{uri}: no such request can be made ({type(error).__name__}: {_shown(error)}); correct the name, remote.options, "
            "or the settings of fsspec and of the store's library"
        )
    if isinstance(error, OSError):
        return error
    return OSError(errno.EIO, f"{type(error).__name__}: {_shown(error)}", uri)


def _is_unsent(error: BaseException) -> bool:
    names = {kind.__name__ for kind in type(error).__mro__}
    if "BotoCoreError" in names:
        return not names & _BOTOCORE_TRANSPORT
    return isinstance(error, _UNSENT) and not isinstance(error, (OSError, *_GARBLED))


def _elsewhere(causes: list[BaseException]) -> str:
    for cause in causes:
        response: Any = getattr(cause, "response", None)
        if isinstance(response, dict):
            headers = response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
            region, endpoint = headers.get("x-amz-bucket-region"), response.get("Error", {}).get("Endpoint")
            if region:
                return f": the bucket is in region {region!r}; set AWS_DEFAULT_REGION={region}"
            if endpoint or headers.get("location"):
                return f": to {endpoint or headers.get('location')}; name that endpoint (remote.options.endpoint_url)"
    return "; name the endpoint or the region of the bucket"


def _causes(error: BaseException | None) -> list[BaseException]:
    causes: list[BaseException] = []
    while error is not None and error not in causes:
        causes.append(error)
        error = error.__cause__ or error.__context__
    return causes


def _code(error: BaseException) -> str:
    response = getattr(error, "response", None)
    found = response.get("Error", {}).get("Code", "") if isinstance(response, dict) else ""
    return str(found)


def _bucket(uri: str) -> str:
    return uri.partition("://")[2].partition("/")[0]


def _shown(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return (text if len(text) <= 200 else f"{text[:197]}...") or type(error).__name__
