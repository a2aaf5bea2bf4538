"""Publishing sidecars: files named by content first, then a manifest that lists them."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from kdcache.errors import FormatError
from kdcache.format import paths
from kdcache.format.feature_claims import check_feature_claims, requirements
from kdcache.format.manifest import Manifest
from kdcache.format.sidecar import SidecarFile
from kdcache.format.sidecar_claims import check_sidecar_claims
from kdcache.store.files import fs
from kdcache.store.files.location import Location
from kdcache.store.files.regular import write_new


def publish_sidecar(root: Location, sidecar: SidecarFile) -> None:
    """Write a sidecar's file under its final name; an equal one is replaced by its equal."""
    fs.make_directory(root, paths.SIDECARS)
    temp = fs.temp_path(root)
    try:
        write_new(temp, sidecar.data)
        fs.publish_file(root, temp, paths.sidecar_name(sidecar.info.sha256))
    finally:
        temp.unlink(missing_ok=True)
    fs.reached("sidecar published")


def with_sidecars(manifest: Manifest, sidecars: Sequence[SidecarFile]) -> Manifest:
    """Manifest 0 with its sidecars and with what it requires of readers, before any of them is published.

    Raises:
        FormatError: a feature has not been fitted, or its sidecar is missing.
    """
    infos = {sidecar.name: sidecar for sidecar in (*manifest.sidecars, *(file.info for file in sidecars))}
    features = manifest.identity.features
    listed = msgspec.structs.replace(
        manifest, sidecars=tuple(infos[name] for name in sorted(infos)), requires=requirements(features)
    )
    check_feature_claims(listed.identity.features)
    check_sidecar_claims(listed.sidecars, listed.identity.features)
    return listed


def with_sidecar(manifest: Manifest, sidecar: SidecarFile, *, replaces: bool) -> Manifest | None:
    """The next snapshot, with one more sidecar; None where it is there already.

    Raises:
        FormatError: another one has its name.
    """
    infos = {info.name: info for info in manifest.sidecars}
    there = infos.get(sidecar.info.name)
    if there == sidecar.info:
        return None
    if there is not None and not replaces:
        raise FormatError(
            f"the cache has a sidecar {there.name!r} with SHA-256 {there.sha256[:16]}..., other than the new one, "
            f"{sidecar.info.sha256[:16]}...; sidecars are not changed: give it another name"
        )
    infos[sidecar.info.name] = sidecar.info
    sidecars = tuple(infos[name] for name in sorted(infos))
    check_sidecar_claims(sidecars, manifest.identity.features)
    return msgspec.structs.replace(manifest, number=manifest.number + 1, parent=manifest.digest, sidecars=sidecars)
