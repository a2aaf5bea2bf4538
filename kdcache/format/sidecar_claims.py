"""What a manifest says of its sidecars, and the ranges of that; no numpy."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from kdcache.errors import FormatError
from kdcache.format.paths import is_sha256
from kdcache.format.ranges import check_range

if TYPE_CHECKING:
    from kdcache.format.identity import FeatureInfo

MAX_SIDECARS = 1024
MAX_BYTES = 2**48
MAX_TENSORS = 4096
MAX_DIMENSIONS = 16

ITEM_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""safetensors' names of dtypes -> bytes of one number."""

_NAME = re.compile(r"[A-Za-z0-9_]+(:[A-Za-z0-9_]+)?")


class TensorInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One tensor of a sidecar: its dtype, by safetensors' name (`F32`, `BF16`), and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Of its numbers; raises FormatError where the dtype is unknown."""
        if self.dtype not in ITEM_BYTES:
            raise FormatError(f"a tensor has the dtype {self.dtype[:80]!r}, known are {', '.join(ITEM_BYTES)}")
        return ITEM_BYTES[self.dtype] * math.prod(self.shape)


class SidecarInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A file of tensors that belongs to a cache and to no sequence: a basis, means and scales, the teacher's output projection.

    Attributes:
        name: unique in the cache: `output_projection`, `scale:<feature>`, `pca:<feature>`, ...
        sha256: of the file, which is named by it.
        num_bytes: of the file.
        tensors: what it holds.
    """

    name: str
    sha256: str
    num_bytes: int
    tensors: dict[str, TensorInfo]


def check_sidecar_name(name: str) -> None:
    """Raise FormatError unless a sidecar may be called so."""
    if not _NAME.fullmatch(name):
        raise FormatError(
            f"a sidecar has the name {name[:80]!r}, expected letters, digits and underscores, with one colon at most"
        )


def check_sidecar_claims(sidecars: Sequence[SidecarInfo], features: Sequence[FeatureInfo]) -> None:
    """Raise FormatError where what is said of a sidecar is out of its range, or a feature's sidecar is not among them."""
    check_range("the number of sidecars", len(sidecars), MAX_SIDECARS)
    names = [sidecar.name for sidecar in sidecars]
    for sidecar in sidecars:
        check_sidecar_name(sidecar.name)
        if names.count(sidecar.name) > 1:
            raise FormatError(f"two sidecars have the name {sidecar.name!r}")
        _check_file(sidecar)
    there = {sidecar.name: sidecar.sha256 for sidecar in sidecars}
    for feature in features:
        for name, digest in needed_sidecars(feature).items():
            if there.get(name) != digest:
                raise FormatError(
                    f"feature {feature.name!r} needs the sidecar {name!r} with SHA-256 {digest!r}, the manifest lists "
                    f"{there.get(name)!r}"
                )


def needed_sidecars(feature: FeatureInfo) -> dict[str, str | None]:
    """The sidecars without which a feature cannot be decoded or reconstructed: name -> SHA-256, None before the fit."""
    needed: dict[str, str | None] = {}
    if feature.scale == "channel":
        needed[f"scale:{feature.name}"] = feature.scale_digest
    if feature.projection is not None and feature.projection.kind == "pca":
        needed[f"pca:{feature.name}"] = feature.projection.digest
    return needed


def _check_file(sidecar: SidecarInfo) -> None:
    where = f"sidecar {sidecar.name!r}"
    if not is_sha256(sidecar.sha256):
        raise FormatError(f"{where} has the SHA-256 {sidecar.sha256[:80]!r}, expected 64 hexadecimal digits")
    check_range(f"num_bytes of {where}", sidecar.num_bytes, MAX_BYTES)
    check_range(f"the number of tensors of {where}", len(sidecar.tensors), MAX_TENSORS)
    for name, tensor in sidecar.tensors.items():
        check_range(f"dimensions of {name[:80]!r} in {where}", len(tensor.shape), MAX_DIMENSIONS)
        for size in tensor.shape:
            check_range(f"a size of {name[:80]!r} in {where}", size, MAX_BYTES)
    num_bytes = sum(ITEM_BYTES.get(tensor.dtype, 1) * math.prod(tensor.shape) for tensor in sidecar.tensors.values())
    check_range(f"the bytes of the tensors of {where}", num_bytes, sidecar.num_bytes)
