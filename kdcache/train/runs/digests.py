"""The digest of every file of a folder, in a file next to them: what a checkpoint or a finished model was when it was written.

`digests.json` holds `{"files": {name: {"num_bytes": ..., "xxh3_128": ...}}, "self": xxh3_128 of the JSON of `files`}`. It finds
damage; it does not protect against somebody who means harm.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import xxhash

from kdcache.errors import CorruptCacheError
from kdcache.store.files.regular import open_regular, read_regular

DIGESTS = "digests.json"
_BLOCK_BYTES = 1 << 20


class FileDigest(msgspec.Struct, frozen=True, kw_only=True):
    """Of one file."""

    num_bytes: int
    xxh3_128: str


class _Digests(msgspec.Struct, frozen=True, kw_only=True):
    files: dict[str, FileDigest]
    self: str


def write_digests(folder: Path) -> None:
    """Write `digests.json` of all other files in a folder."""
    files = {
        path.name: _digest(path) for path in sorted(folder.iterdir()) if path.name != DIGESTS and not path.name.startswith(".")
    }
    (folder / DIGESTS).write_bytes(msgspec.json.encode(_Digests(files=files, self=_digest_of_all(files))))


def find_damage(folder: Path) -> str | None:
    """What is not as it was written, naming the file; None where all is well."""
    try:
        digests = msgspec.json.decode(read_regular(folder / DIGESTS, folder), type=_Digests)
    except FileNotFoundError:
        return f"{DIGESTS} is missing"
    except (OSError, CorruptCacheError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return f"{DIGESTS} cannot be read: {error}"
    if digests.self != _digest_of_all(digests.files):
        return f"{DIGESTS} is damaged: it does not have its own digest"
    for name, expected in digests.files.items():
        if name in ("", ".", "..") or "/" in name or "\0" in name:
            return f"{DIGESTS} names {name[:80]!r}, which is not in the folder"
        damage = _file_damage(folder / name, expected)
        if damage is not None:
            return damage
    return None


def _file_damage(path: Path, expected: FileDigest) -> str | None:
    try:
        size = path.stat().st_size
        if size != expected.num_bytes:
            return f"{path.name} has {size} bytes, but was written with {expected.num_bytes}"
        found = _digest(path)
    except FileNotFoundError:
        return f"{path.name} is missing"
    except (OSError, CorruptCacheError) as error:
        return f"{path.name} cannot be read: {error}"
    if found != expected:
        return f"{path.name} is damaged: its digest is {found.xxh3_128}, but was {expected.xxh3_128} when it was written"
    return None


def _digest(path: Path) -> FileDigest:
    digest, num_bytes = xxhash.xxh3_128(), 0
    with open_regular(path, path.parent) as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
            num_bytes += len(block)
    return FileDigest(num_bytes=num_bytes, xxh3_128=digest.hexdigest())


def _digest_of_all(files: dict[str, FileDigest]) -> str:
    return xxhash.xxh3_128(msgspec.json.encode(files)).hexdigest()
