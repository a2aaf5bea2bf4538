"""Reading the sidecars of a cache: each is checked against the manifest on every read."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from kdcache.codec.features.constants import FeatureConstants, read_constants
from kdcache.errors import ConfigError, CorruptCacheError
from kdcache.format import paths
from kdcache.format.manifest import Manifest
from kdcache.format.sidecar import SidecarFile, parse_sidecar
from kdcache.format.sidecar_claims import SidecarInfo, needed_sidecars
from kdcache.store.files.disk_errors import read_error
from kdcache.store.files.location import Location, read_file
from kdcache.store.remote.remote_read import read_content


def find_sidecar(manifest: Manifest, name: str, where: str) -> SidecarInfo:
    """What the manifest says of a sidecar; raises ConfigError, with what there is, where it names none."""
    found = next((sidecar for sidecar in manifest.sidecars if sidecar.name == name), None)
    if found is None:
        has = ", ".join(sidecar.name for sidecar in manifest.sidecars) or "none"
        raise ConfigError(f"{where} has no sidecar {name!r}; it has {has}; capture again with what makes it")
    return found


def read_sidecar(root: Location, info: SidecarInfo) -> dict[str, NDArray[Any]]:
    """The arrays of a sidecar, bfloat16 as its bits, uint16; not to be written.

    Raises:
        CorruptCacheError: the file is missing or damaged, or is not what the manifest says.
    """
    return parse_sidecar(read_sidecar_file(root, info).data, info, str(root / paths.sidecar_name(info.sha256)))


def read_sidecar_file(root: Location, info: SidecarInfo) -> SidecarFile:
    """The file of a sidecar, its SHA-256 checked; raises as `read_sidecar`."""
    path = root / paths.sidecar_name(info.sha256)
    try:
        data = _content(path, info)
    except CorruptCacheError:
        raise
    except FileNotFoundError as error:
        raise CorruptCacheError(
            f"{path}: the sidecar {info.name!r} is missing; bring it back from a copy of the cache, or make the cache again"
        ) from error
    except OSError as error:
        raise read_error(path, error) from error
    if len(data) != info.num_bytes or hashlib.sha256(data).hexdigest() != info.sha256:
        raise CorruptCacheError(
            f"{path}: the sidecar {info.name!r} is damaged: {len(data)} bytes whose SHA-256 is not the one in the manifest; "
            "bring it back from a copy of the cache, or make the cache again"
        )
    return SidecarFile(info, data)


def sidecar_constants(root: Location, manifest: Manifest) -> dict[str, FeatureConstants]:
    """The constants of a cache's features, from its sidecars: feature name -> constants, without those that have none.

    Raises:
        CorruptCacheError: as `read_sidecar`, or a sidecar does not hold what its feature needs.
    """

    def arrays(name: str) -> dict[str, NDArray[Any]]:
        return read_sidecar(root, find_sidecar(manifest, name, str(root)))

    needing = [feature for feature in manifest.identity.features if needed_sidecars(feature)]
    return {feature.name: read_constants(feature, arrays) for feature in needing}


def _content(path: Location, info: SidecarInfo) -> bytes:
    if not isinstance(path, Path):
        return bytes(read_content(path, info.sha256, f"the sidecar {info.name!r}"))
    if path.stat().st_size != info.num_bytes:
        raise CorruptCacheError(
            f"{path}: the sidecar {info.name!r} has {path.stat().st_size} bytes, the manifest says {info.num_bytes}; it is "
            "damaged: bring it back from a copy of the cache, or make the cache again"
        )
    return read_file(path)
