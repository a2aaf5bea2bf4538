"""Units that failed and were set aside: a small record each in failed/, so that `kdcache info` can say why they are missing.

A record promises nothing: a unit that is published is done, whatever failed/ says of it, and the next capture tries the others
again. So the records need no digest and no fold; a damaged one is passed over.
"""

from __future__ import annotations

import hashlib
import socket
import time
from collections.abc import Collection

import msgspec

from kdcache.errors import CorruptCacheError, StorageError
from kdcache.format import paths
from kdcache.shown import get_logger
from kdcache.store.files import fs
from kdcache.store.files.location import Location, children, read_file

_log = get_logger(__name__)


class FailedUnit(msgspec.Struct, frozen=True, kw_only=True):
    """One unit that a capture gave up.

    Attributes:
        unit: its index in the plan.
        error: the name of the exception's type.
        reason: its message.
        attempts: how often it was tried in that run.
        host: the machine that tried.
        time: when, in UTC, ISO 8601.
    """

    unit: int
    error: str
    reason: str
    attempts: int
    host: str = msgspec.field(default_factory=socket.gethostname)
    time: str = msgspec.field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))

    @property
    def name(self) -> str:
        """Path inside the cache: the same failure of the same unit, again, has the same name."""
        meaning = "\0".join((str(self.unit), self.error, self.reason))
        return paths.failed_name(self.unit, hashlib.sha256(meaning.encode("utf-8", "backslashreplace")).hexdigest())


def record_failure(root: Location, failed: FailedUnit) -> None:
    """Record a failure, unless the same one is recorded already.

    Raises:
        StorageError: the disk or the store refuses.
    """
    try:
        fs.make_directory(root, paths.FAILED)
        fs.publish_new(root, msgspec.json.format(msgspec.json.encode(failed), indent=1) + b"\n", failed.name)
    except OSError as error:
        raise StorageError(f"the failure of unit {failed.unit} could not be recorded in {str(root)!r}: {error}") from error


def read_failures(root: Location, *, published: Collection[int]) -> list[FailedUnit]:
    """The last failure of each unit that is not published, ordered by unit. Reads one small file for each of them."""
    last: dict[int, FailedUnit] = {}
    for path in sorted(children(root / paths.FAILED), key=str):
        unit = paths.parse_failed_name(path.name)
        if unit is None or unit in published:
            continue
        failed = _read(path)
        if failed is not None and (unit not in last or last[unit].time <= failed.time):
            last[unit] = failed
    return [last[unit] for unit in sorted(last)]


def _read(path: Location) -> FailedUnit | None:
    try:
        return msgspec.json.decode(read_file(path), type=FailedUnit)
    except (OSError, CorruptCacheError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        _log.warning("%s: not a record of a failure: %s", path, error)
        return None
