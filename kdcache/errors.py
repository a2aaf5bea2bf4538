"""The exception tree. Imports the standard library and `kdcache.shown` only.

::

    KdcacheError                            everything kdcache raises on purpose
    +-- ConfigError        (ValueError)     a config file or flag asks for something impossible
    +-- InputError         (ValueError)     text, messages or ids that cannot be read or do not fit
    +-- MissingDependencyError (ImportError) an optional package is not installed
    +-- CacheNotFoundError (FileNotFoundError) no cache at this path
    +-- FormatError        (ValueError)     bytes of a cache that are not what the spec says
    |   +-- UnsupportedVersionError         written by a format we do not read
    |   +-- CorruptCacheError               damaged: a digest, length, offset or id is wrong
    +-- MismatchError      (ValueError)     two identities differ: tokenizer, teacher, capture, snapshot
    +-- StateError         (ValueError)     a loader state that cannot be resumed here
    +-- LossError          (ValueError)     a loss that would be wrong for this record
    +-- TeacherError       (RuntimeError)   a model that does not load or answers wrongly
    +-- CaptureError       (RuntimeError)   a capture that could not finish; the cause is chained
    +-- NotFiniteError     (ArithmeticError) a number in a training or evaluation is not finite
    +-- StorageError       (RuntimeError)   a disk or an object store that is full, refuses access or does not answer

A message is one sentence or two: what, which value, what was expected, what to do. The command line prints it and exits
with status 2; any other exception is a bug and is shown with its traceback.
"""

from __future__ import annotations

from typing import Any

from kdcache.shown import Lines, shown, shown_lines


class KdcacheError(Exception):
    """Base of every error kdcache raises on purpose. Its message is one line of bounded length, without control characters,
    whatever it was made of; `kdcache.shown.Lines` keep their breaks."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*(_plain(argument) if isinstance(argument, str) else argument for argument in args))


def _plain(text: str) -> str:
    return shown_lines(text) if isinstance(text, Lines) else shown(text)


class ConfigError(KdcacheError, ValueError):
    """A config asks for something impossible; the message starts with the path of the field, as in `selection.k`."""


class InputError(KdcacheError, ValueError):
    """Input that cannot be read or does not fit; the message names the file and the line or item."""


class MissingDependencyError(KdcacheError, ImportError):
    """An optional package is not installed; the message names the extra that installs it."""

    def __init__(self, package: str, *, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package {package!r}, which is not installed: pip install 'kdcache[{extra}]'")


class CacheNotFoundError(KdcacheError, FileNotFoundError):
    """No cache exists at this path."""


class FormatError(KdcacheError, ValueError):
    """Bytes of a cache are not what the format spec says."""


class UnsupportedVersionError(FormatError):
    """The cache needs a format version or a feature that this kdcache does not read."""


class CorruptCacheError(FormatError):
    """A digest, length, offset, width or id in a cache is wrong; the message says where.

    Attributes:
        path: of the shard, if it was found in one.
        record_batch: index of the record batch in the shard.
        sequence: index in the cache of the sequence that was read.
    """

    path: str | None = None
    record_batch: int | None = None
    sequence: int | None = None


class MismatchError(KdcacheError, ValueError):
    """Two identities that must be equal differ; the message shows both sides."""


class StateError(KdcacheError, ValueError):
    """A loader state cannot be resumed here; the message shows both values."""


class LossError(KdcacheError, ValueError):
    """A loss would be wrong for this record, or its arrays do not fit together."""


class TeacherError(KdcacheError, RuntimeError):
    """A teacher does not load, or its answer breaks the contract."""


class CaptureError(KdcacheError, RuntimeError):
    """A capture could not finish; what is published stays published."""


class NotFiniteError(KdcacheError, ArithmeticError):
    """A loss, a gradient or a weight is NaN or infinite; the message names the step and the sequences. Nothing is published."""


class StorageError(KdcacheError, RuntimeError):
    """A disk or an object store is full, refuses access, or does not answer in time.

    It says nothing about the cache: what is published stays, and the same call resumes once the cause is gone.
    """
