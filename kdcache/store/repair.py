"""A way out of damage: what is damaged or missing is set aside, and a snapshot without it is published.

The capture (or derivation) that made the cache, run again, then makes exactly the units that are gone. Nothing is deleted: what
was taken out lies in `damaged/`, under its name, until somebody deletes it. The files go first and the manifest comes after: a
repair that is killed in between leaves missing shards, which the next one sees. A damaged manifest is set aside too; the one
before it, with what the journal has since, is used instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from kdcache.config.remote import RemoteConfig
from kdcache.errors import CacheNotFoundError, CorruptCacheError, StorageError
from kdcache.format import paths
from kdcache.format.manifest import Manifest, ShardInfo
from kdcache.format.sidecar_claims import needed_sidecars
from kdcache.store import chain
from kdcache.store.files import fs
from kdcache.store.files.disk_errors import is_damage, reason_of
from kdcache.store.files.location import Location, locate
from kdcache.store.index import publish_index_without, snapshot_index
from kdcache.store.sidecars import read_sidecar
from kdcache.store.writing.writer import CacheWriter

MAX_TRIES = 20
"""Each time another writer's manifest came first."""

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""


@dataclass(frozen=True)
class Damage:
    """One file that is to be taken out of a cache, or was.

    Attributes:
        unit: index in the plan of the unit whose shard it is; None for a manifest, a journal record or a sidecar.
        name: of the file, inside the cache.
        reason: what is wrong with it, in words.
    """

    unit: int | None
    name: str
    reason: str


@dataclass(frozen=True)
class Repair:
    """What a repair found and did.

    Attributes:
        manifest: the newest snapshot, after it.
        damage: files that were set aside: manifests and journal records, sidecars, then shards in the order of their units.
        made_index: whether the index was damaged and made again.
    """

    manifest: Manifest
    damage: tuple[Damage, ...] = ()
    made_index: bool = False

    @property
    def num_units(self) -> int:
        """How many units were set aside."""
        return sum(damage.unit is not None for damage in self.damage)


def repair_cache(path: str | Path, progress: Progress | None = None, *, remote: RemoteConfig | None = None) -> Repair:
    """Set damaged and missing shards aside, and publish a snapshot of the others. Reads every byte once.

    A damaged sidecar goes as well, unless a feature cannot be read without it: that one stays, and is said at the end.

    Raises:
        CacheNotFoundError: no cache at the path. CorruptCacheError: no manifest is whole, or such a sidecar is damaged.
        StorageError: the disk or the store refuses, or one of the cache's folders is a link.
    """
    root = locate(path, remote)
    try:
        documents = _set_documents_aside(root)
        manifest = chain.newest_manifest(root)
        damage = _find(root, manifest, progress)
        made_index = _is_index_damaged(root, manifest)
        sidecars, needed = _damaged_sidecars(root, manifest)
        if damage or sidecars or made_index:
            fs.make_directories(root)  # none may be a link: what is written or moved would be elsewhere
            for found in damage:
                _set_aside(root, found, {shard.name: shard for shard in manifest.shards}[found.name])
            for found in sidecars:
                fs.make_directory(root, paths.DAMAGED)
                fs.move(root, found.name, f"{paths.DAMAGED}/{found.name.rpartition('/')[2]}")
            manifest = _publish(root, {found.name for found in (*damage, *sidecars)})
        if needed:
            raise CorruptCacheError(f"{needed[0].reason}; features cannot be read without it. All else is repaired")
        return Repair(manifest, (*documents, *sidecars, *damage), made_index)
    except CacheNotFoundError:
        raise
    except OSError as error:
        raise StorageError(f"{root}: could not be repaired: {reason_of(error)}; run it again") from error


def find_misfits(root: Location, manifest: Manifest) -> list[Damage]:
    """Shards that are missing or of another size than the manifest says: what is seen without reading them."""
    found = ((shard, _misfit(root, shard)) for shard in manifest.shards)
    return [Damage(shard.unit, shard.name, reason) for shard, reason in found if reason is not None]


def _set_documents_aside(root: Location) -> list[Damage]:
    """Move damaged manifests and journal records out; where the newest manifest was one, fold the journal into the one before.

    Raises:
        CorruptCacheError: no manifest is whole.
    """
    found = [Damage(None, name, reason) for name, reason in chain.damaged_documents(root).items()]
    if not found:
        return found
    names, numbers = {damage.name for damage in found}, chain.manifest_numbers(root)
    if all(paths.manifest_name(number) in names for number in numbers):
        raise CorruptCacheError(
            f"{root / found[0].name}: {found[0].reason}; no manifest of {str(root)!r} is whole, and nothing else says what its "
            "shards are: "
            "make the cache again in another folder"
        )
    fs.make_directories(root)
    fs.make_directory(root, paths.DAMAGED)
    for name in sorted(names):
        fs.move(root, name, f"{paths.DAMAGED}/{name.rpartition('/')[2]}")
    if paths.manifest_name(numbers[-1]) in names:
        CacheWriter.open(root, chain.newest_manifest(root)).fold()
    return found


def _find(root: Location, manifest: Manifest, progress: Progress | None) -> list[Damage]:
    found, num_done, num_all = [], 0, manifest.total("num_bytes")
    for shard in manifest.shards:
        reason = _misfit(root, shard) or _changed(root, shard)
        if reason is not None:
            found.append(Damage(shard.unit, shard.name, reason))
        num_done += shard.num_bytes
        if progress is not None:
            progress(num_done, num_all)
    return found


def _misfit(root: Location, shard: ShardInfo) -> str | None:
    try:
        num_bytes = (root / shard.name).stat().st_size
    except FileNotFoundError:
        return "it is missing"
    except OSError as error:
        return _unreadable(root / shard.name, error)
    return None if num_bytes == shard.num_bytes else f"it has {num_bytes} bytes, the manifest says {shard.num_bytes}"


def _changed(root: Location, shard: ShardInfo) -> str | None:
    path = root / shard.name
    copy = None if isinstance(path, Path) else fs.temp_path(root)
    try:
        if copy is not None and not isinstance(path, Path):
            path.download(copy)
        sha256 = fs.sha256_of(copy or Path(str(path)))
    except FileNotFoundError:
        return "it is missing"
    except CorruptCacheError as error:
        return str(error)  # no plain file, or not in the cache's folder
    except OSError as error:
        return _unreadable(root / shard.name, error)
    finally:
        if copy is not None:
            copy.unlink(missing_ok=True)
    return None if sha256 == shard.sha256 else "its SHA-256 is not the one in the manifest"


def _unreadable(path: Location, error: OSError) -> str:
    """What an error says of a damaged file; raises StorageError where it says nothing: a sound file is never set aside."""
    if not is_damage(error):
        raise StorageError(f"{path}: cannot be read: {error.strerror or error}; nothing was set aside") from error
    return f"it cannot be read: {error.strerror}"


def _damaged_sidecars(root: Location, manifest: Manifest) -> tuple[list[Damage], list[Damage]]:
    """Damaged sidecars that the cache can do without, and those that it needs."""
    needed = {name for feature in manifest.identity.features for name in needed_sidecars(feature)}
    others: list[Damage] = []
    lost: list[Damage] = []
    for sidecar in manifest.sidecars:
        try:
            read_sidecar(root, sidecar)
        except CorruptCacheError as error:
            name = paths.sidecar_name(sidecar.sha256)
            if sidecar.name in needed:
                lost.append(Damage(None, name, str(error)))
            else:
                reason = str(error).removeprefix(f"{root / name}: ").partition(";")[0]
                others.append(Damage(None, name, f"{reason}; what made the cache puts it back when it is run again"))
    return others, lost


def _is_index_damaged(root: Location, manifest: Manifest) -> bool:
    try:
        snapshot_index(root, manifest)
    except CorruptCacheError:
        return True
    return False


def _set_aside(root: Location, damage: Damage, shard: ShardInfo) -> None:
    """Move a shard out, its journal record first: a record whose shard is there is a unit that is done."""
    fs.make_directory(root, paths.DAMAGED)
    for name in (paths.journal_name(shard.unit, shard.sha256), damage.name):
        fs.move(root, name, f"{paths.DAMAGED}/{name.rpartition('/')[2]}")


def _publish(root: Location, names: set[str]) -> Manifest:
    """Publish a snapshot without these files; of a unit that was made again in the meantime the new shard stays."""
    for _ in range(MAX_TRIES):
        newest = chain.newest_manifest(root)
        units = {shard.unit for shard in newest.shards if shard.name in names}
        shards = tuple(shard for shard in newest.shards if shard.unit not in units)
        sidecars = tuple(sidecar for sidecar in newest.sidecars if paths.sidecar_name(sidecar.sha256) not in names)
        index = publish_index_without(root, newest, units)
        manifest = msgspec.structs.replace(
            newest, number=newest.number + 1, parent=newest.digest, shards=shards, sidecars=sidecars, index=index
        )
        if chain.add_manifest(root, manifest):
            return manifest
    raise StorageError(f"{root}: {MAX_TRIES} times another writer's manifest came first; run the repair again")
