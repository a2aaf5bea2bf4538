"""What a writer refuses before it writes: directories that are not its cache."""

from __future__ import annotations

from pathlib import Path

from kdcache.errors import (
    ConfigError,
    KdcacheError,
    MismatchError,
    StorageError,
    UnsupportedVersionError,
)
from kdcache.format import paths
from kdcache.format.identity import unfitted
from kdcache.format.manifest import FORMAT_VERSION, Manifest
from kdcache.store import chain
from kdcache.store.files import fs
from kdcache.store.files.location import Location


def refuse_foreign_directory(root: Location) -> None:
    """Raise MismatchError unless a cache is there or may be made there: a capture asks before it loads a model.

    Raises:
        ConfigError: a store in which no cache can be written. StorageError: the disk refuses.
    """
    if not isinstance(root, Path) and not root.can_create:
        raise ConfigError(
            f"{root}: a cache can be read from such a store but not written into it, as it cannot put an object "
            "only where none exists; write to a disk, s3:// or gs://, and copy the cache there when it is complete"
        )
    try:
        _refuse_what_is_there(root)
    except OSError as error:
        if isinstance(error, KdcacheError):
            raise
        raise StorageError(f"{str(root)!r} cannot be listed: {error.strerror or error}") from error


def _refuse_what_is_there(root: Location) -> None:
    if root.exists() and not root.is_dir():
        raise MismatchError(f"output {str(root)!r} is a file; expected a directory for the cache")
    if not root.is_dir() or chain.manifest_numbers(root):
        return
    own = (*paths.DIRECTORIES, paths.SIDECARS)
    foreign = sorted(p.name for p in root.iterdir() if p.name not in own) + _foreign_files(root)
    # Looked at again: another writer may have started the cache in between, and nothing of it is there before its manifest.
    if foreign and not chain.manifest_numbers(root):
        raise MismatchError(
            f"output directory {str(root)!r} is not a cache and not empty (it holds {foreign[0]!r}); "
            "choose an empty or new directory"
        )


def refuse_other_capture(root: Location, theirs: Manifest, ours: Manifest) -> None:
    """Raise MismatchError, naming what differs, unless the existing cache is the one to be written."""
    if theirs.format_version > FORMAT_VERSION:
        raise UnsupportedVersionError(
            f"{str(root)!r} has format version {theirs.format_version[0]}.{theirs.format_version[1]}, this kdcache writes "
            f"{FORMAT_VERSION[0]}.{FORMAT_VERSION[1]}: it can read the cache but not resume it; upgrade kdcache"
        )
    differences = unfitted(theirs.identity).differences(unfitted(ours.identity))
    if theirs.plan != ours.plan:
        differences.append(
            f"plan: {theirs.plan.num_units} units {theirs.plan.fingerprint[:12]} != {ours.plan.num_units} units "
            f"{ours.plan.fingerprint[:12]}"
        )
    if differences:
        raise MismatchError(
            f"{str(root)!r} holds another capture (there != asked for): {'; '.join(differences)}; "
            "choose another destination (`out`), or repeat the config that made it to resume"
        )


def _foreign_files(root: Location) -> list[str]:
    """Files where a cache's would be, without a manifest: a fold would sweep them as leftovers."""
    own = (*paths.DIRECTORIES, paths.SIDECARS)
    found = [path for name in own if (root / name).exists() for path in _listing(root / name)]
    # Of a writer that was killed between its sidecars and its first manifest; they are named by content.
    found = [path for path in found if not paths.is_sidecar_name(f"{path.parent.name}/{path.name}")]
    foreign = [path for path in found if path.parent.name != paths.TMP or not fs.is_temp_name(path.name)]
    return sorted(str(path).removeprefix(f"{root}/") for path in foreign)


def _listing(directory: Location) -> list[Location]:
    return list(directory.iterdir()) if directory.is_dir() else [directory]
