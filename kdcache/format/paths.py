"""File names inside a cache. Standard library only.

::

    manifests/000000.json            what the cache is and will hold; written first, no shards yet
    manifests/000001.json            a fold: the shards published so far; each names its parent's digest
    data/000017-<sha256, 16 hex>.arrow   the shard of unit 17, immutable
    journal/000017-<same 16 hex>.json    unit 17 is done, and this is its shard
    index/<sha256, 16 hex>.arrow     one entry per sequence: where it is, how long it is
    failed/000017-<hash of the reason, 16 hex>.json   unit 17 failed and was set aside; the directory is made with the first one
    damaged/...                      what a repair took out of the other folders, under its names; for people
    tmp/<host>-<pid>-<token>.<n>     not published yet; swept when its writer is gone
"""

import re

DATA, JOURNAL, MANIFESTS, INDEX, TMP = "data", "journal", "manifests", "index", "tmp"
DIRECTORIES = (DATA, JOURNAL, MANIFESTS, INDEX, TMP)
FAILED = "failed"
DAMAGED = "damaged"
SIDECARS = "sidecars"
"""Made when the first sidecar is written; most caches have none."""

_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHARD = re.compile(r"data/[0-9]{6,}-[0-9a-f]{16}\.arrow")
_SIDECAR = re.compile(r"sidecars/[0-9a-f]{16}\.safetensors")
_INDEX = re.compile(r"index/[0-9a-f]{16}\.arrow")
_MANIFEST = re.compile(r"([0-9]{6,})\.json")
_JOURNAL = _FAILED = re.compile(r"([0-9]{6,})-([0-9a-f]{16})\.json")


def shard_name(unit: int, sha256: str) -> str:
    """Where the shard of a unit lives, named by content."""
    return f"{DATA}/{unit:06d}-{sha256[:16]}.arrow"


def journal_name(unit: int, sha256: str) -> str:
    """Where the record lives that says: this unit is done, by this shard."""
    return f"{JOURNAL}/{unit:06d}-{sha256[:16]}.json"


def failed_name(unit: int, sha256: str) -> str:
    """Where the record lives that says: this unit failed, for the reason that has this hash."""
    return f"{FAILED}/{unit:06d}-{sha256[:16]}.json"


def index_name(sha256: str) -> str:
    """Where an index of sequences lives, named by content."""
    return f"{INDEX}/{sha256[:16]}.arrow"


def sidecar_name(sha256: str) -> str:
    """Where a sidecar lives, named by content."""
    return f"{SIDECARS}/{sha256[:16]}.safetensors"


def manifest_name(number: int) -> str:
    """Where manifest `number` lives."""
    return f"{MANIFESTS}/{number:06d}.json"


def parse_manifest_name(base_name: str) -> int | None:
    """The number in `000012.json`; None for any other name."""
    match = _MANIFEST.fullmatch(base_name)
    return int(match[1]) if match else None


def parse_journal_name(base_name: str) -> int | None:
    """The unit in `000012-0123456789abcdef.json`; None for any other name."""
    match = _JOURNAL.fullmatch(base_name)
    return int(match[1]) if match else None


def parse_failed_name(base_name: str) -> int | None:
    """The unit in the name of a record of failure; None for any other name."""
    match = _FAILED.fullmatch(base_name)
    return int(match[1]) if match else None


def is_own_name(name: str) -> bool:
    """Whether a file could be a shard, a record of the journal or of a failure, an index or a sidecar of ours: a sweep leaves
    others."""
    directory, _, base_name = name.partition("/")
    is_record = (directory == JOURNAL and parse_journal_name(base_name) is not None) or (
        directory == FAILED and parse_failed_name(base_name) is not None
    )
    return is_shard_name(name) or is_index_name(name) or is_sidecar_name(name) or is_record


def is_sha256(text: str) -> bool:
    """Whether a text is a SHA-256, whole, in lower-case hex digits."""
    return _SHA256.fullmatch(text) is not None


def is_shard_name(name: str) -> bool:
    """Whether a name from a manifest is one that `shard_name` gives: it cannot leave the cache's directory."""
    return _SHARD.fullmatch(name) is not None


def is_index_name(name: str) -> bool:
    """Whether a name from a manifest is one that `index_name` gives."""
    return _INDEX.fullmatch(name) is not None


def is_sidecar_name(name: str) -> bool:
    """Whether a name is one that `sidecar_name` gives."""
    return _SIDECAR.fullmatch(name) is not None
