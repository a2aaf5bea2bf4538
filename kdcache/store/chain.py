"""The chain of manifests in a cache: read the newest, add one, check them all."""

from __future__ import annotations

from pathlib import Path

from kdcache.errors import CacheNotFoundError, CorruptCacheError, FormatError
from kdcache.format import paths
from kdcache.format.manifest import Manifest, ShardInfo, manifest_from_json, manifest_to_json, shard_from_json
from kdcache.store.files import fs
from kdcache.store.files.disk_errors import read_error
from kdcache.store.files.location import Location, children, read_file


def manifest_numbers(root: Location) -> list[int]:
    """The numbers of a cache's manifests, ascending; empty where it has none."""
    names = (path.name for path in children(root / paths.MANIFESTS))
    return sorted(n for n in map(paths.parse_manifest_name, names) if n is not None)


def read_manifest(root: Location, number: int) -> Manifest:
    """One manifest, checked against its own digest.

    Raises:
        CorruptCacheError, UnsupportedVersionError: see `manifest_from_json`.
    """
    path = root / paths.manifest_name(number)
    try:
        manifest = manifest_from_json(_read(path), where=str(path))
    except CorruptCacheError:
        if isinstance(path, Path):
            raise
        manifest = manifest_from_json(_read(path), where=str(path))  # it may have been changed on its way here
    if manifest.number != number:
        raise CorruptCacheError(f"{path}: says that it is manifest {manifest.number}, its name says {number}")
    return manifest


def newest_manifest(root: Location) -> Manifest:
    """The manifest with the highest number.

    Raises:
        CacheNotFoundError: no cache at the path. CorruptCacheError: the newest manifest is damaged; says what to do.
    """
    numbers = manifest_numbers(root)
    if not numbers:
        what = "the directory does not exist" if not root.is_dir() else "it holds no manifests/"
        raise CacheNotFoundError(f"no cache at {str(root)!r}: {what}; expected what `kdcache capture` wrote")
    try:
        return read_manifest(root, numbers[-1])
    except CorruptCacheError as error:
        damaged = CorruptCacheError(f"{error}; `kdcache repair {root}` sets the manifest aside and takes the one before it")
        damaged.path = str(root / paths.manifest_name(numbers[-1]))
        raise damaged from error


def add_manifest(root: Location, manifest: Manifest) -> bool:
    """Publish a manifest; False if another writer was first to publish one of that number."""
    added = fs.publish_new(root, manifest_to_json(manifest), paths.manifest_name(manifest.number))
    fs.reached("manifest published")
    return added


def read_journal_record(path: Location) -> ShardInfo:
    """One journal record, checked against its own digest and its name.

    Raises:
        FileNotFoundError: it is not there (any more). CorruptCacheError: see `shard_from_json`.
    """
    shard = shard_from_json(read_file(path), where=str(path))
    if path.name != Path(paths.journal_name(shard.unit, shard.sha256)).name:
        raise CorruptCacheError(f"{path}: is about unit {shard.unit} and SHA-256 {shard.sha256}, which is not its name")
    return shard


def check_journal(root: Location) -> list[str]:
    """Check the journal: a sentence for each damaged record. A cache can do without its journal."""
    problems: list[str] = []
    for path in sorted(children(root / paths.JOURNAL), key=str):
        try:
            if paths.parse_journal_name(path.name) is not None:
                read_journal_record(path)
        except FileNotFoundError:
            continue  # swept by a writer while we look
        except (OSError, CorruptCacheError) as error:
            problems.append(f"{error}; a writer does its unit again, unless a manifest has it: then delete the record")
    return problems


def check_chain(root: Location) -> list[str]:
    """Check the chain of manifests: a sentence for each fault; empty when every one is whole and names its parent."""
    problems: list[str] = []
    parent: str | None = None
    expected = 0
    for number in manifest_numbers(root):
        missing = [n for n in range(expected, number) if not _was_set_aside(root, n)]
        if missing:
            return [*problems, f"manifest {missing[0]} is missing; the next one there is {number}"]
        try:
            manifest = read_manifest(root, number)
        except FormatError as error:
            return [*problems, str(error)]
        if number == expected and manifest.parent != parent:
            problems.append(f"manifest {number} names {manifest.parent} as its parent, but manifest {number - 1} is {parent}")
        parent, expected = manifest.digest, number + 1
    return problems


def damaged_documents(root: Location) -> dict[str, str]:
    """Damaged manifests and journal records: name inside the cache -> what is wrong. Never those of a newer format."""
    found = {}
    for number in manifest_numbers(root):
        try:
            read_manifest(root, number)
        except CorruptCacheError as error:
            found[paths.manifest_name(number)] = str(error).removeprefix(f"{root / paths.manifest_name(number)}: ")
    for path in sorted(children(root / paths.JOURNAL), key=str):
        try:
            if paths.parse_journal_name(path.name) is not None:
                read_journal_record(path)
        except FileNotFoundError:
            continue
        except CorruptCacheError as error:
            found[f"{paths.JOURNAL}/{path.name}"] = str(error).removeprefix(f"{path}: ")
    return found


def _was_set_aside(root: Location, number: int) -> bool:
    return (root / paths.DAMAGED / paths.manifest_name(number).rpartition("/")[2]).exists()


def _read(path: Location) -> bytes:
    try:
        return read_file(path)
    except CorruptCacheError:
        raise
    except OSError as error:
        raise read_error(path, error) from error
