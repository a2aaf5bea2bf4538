"""Sidecars as bytes: the layout of safetensors, which any tool opens, written the same way each time and read within bounds.

Eight bytes say how long the header is; the header is JSON, tensor -> dtype, shape and offsets; the numbers follow. No pickle.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from kdcache.errors import CorruptCacheError, FormatError
from kdcache.format.sidecar_claims import ITEM_BYTES, SidecarInfo, TensorInfo, check_sidecar_name

MAX_HEADER_BYTES = 2**20
_LENGTH_BYTES = 8

_DTYPES = {
    "F64": np.dtype("<f8"), "I64": np.dtype("<i8"), "U64": np.dtype("<u8"), "F32": np.dtype("<f4"), "I32": np.dtype("<i4"),
    "U32": np.dtype("<u4"), "F16": np.dtype("<f2"), "I16": np.dtype("<i2"), "U16": np.dtype("<u2"), "I8": np.dtype("i1"),
    "U8": np.dtype("u1"), "BOOL": np.dtype("?"), "BF16": np.dtype("<u2"),
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items() if name != "BF16"}


@dataclass(frozen=True, slots=True, eq=False)
class SidecarFile:
    """A sidecar that is ready to be published: what the manifest will say of it, and the file's bytes."""

    info: SidecarInfo
    data: bytes


def make_sidecar(name: str, arrays: Mapping[str, NDArray[Any]], bfloat16: Collection[str] = ()) -> SidecarFile:
    """A sidecar of these arrays; equal arrays give equal bytes.

    Args:
        name: see `SidecarInfo`.
        arrays: name of the tensor -> numbers.
        bfloat16: the tensors whose uint16 are the bits of bfloat16.

    Raises:
        FormatError: a name or a dtype that cannot be.
    """
    check_sidecar_name(name)
    tensors = {key: _described(key, array, is_bfloat16=key in bfloat16) for key, array in arrays.items()}
    # By falling size of a number, so that each lies at a multiple of it.
    order = sorted(tensors, key=lambda key: (-ITEM_BYTES[tensors[key].dtype], key))
    header, at = {}, 0
    for key in order:
        end = at + tensors[key].num_bytes
        header[key] = {"dtype": tensors[key].dtype, "shape": tensors[key].shape, "data_offsets": (at, end)}
        at = end
    text = msgspec.json.encode(header)
    text += b" " * (-len(text) % _LENGTH_BYTES)
    numbers = (np.ascontiguousarray(arrays[key], _DTYPES[tensors[key].dtype]).tobytes() for key in order)
    data = b"".join([len(text).to_bytes(_LENGTH_BYTES, "little"), text, *numbers])
    info = SidecarInfo(name=name, sha256=hashlib.sha256(data).hexdigest(), num_bytes=len(data), tensors=tensors)
    return SidecarFile(info, data)


def parse_sidecar(data: bytes, info: SidecarInfo, where: str) -> dict[str, NDArray[Any]]:
    """The arrays of a sidecar, views of the bytes; bfloat16 as its bits, uint16.

    Args:
        data: of the file, whose SHA-256 is known to be right.
        info: what the manifest says of it.
        where: the file, for messages.

    Raises:
        CorruptCacheError: the file's header is not one, or says something else than the manifest.
    """
    header, start = _header(data, where)
    found, ends = {}, []
    for key, entry in header.items():
        tensor, first, last = entry.tensor, *entry.data_offsets
        if info.tensors.get(key) != tensor:
            raise CorruptCacheError(f"{where}: holds {key[:80]!r} as {tensor}, the manifest says {info.tensors.get(key)}")
        try:
            num_bytes = tensor.num_bytes
        except FormatError as error:
            raise CorruptCacheError(f"{where}: {error}") from error
        if not 0 <= first <= last <= len(data) - start or last - first != num_bytes:
            raise CorruptCacheError(
                f"{where}: {key[:80]!r} lies at {first} to {last}, which is not in the file or not its size"
            )
        dtype = _DTYPES[tensor.dtype]
        array = np.frombuffer(data, np.uint8, num_bytes, start + first) if num_bytes else np.zeros(0, np.uint8)
        found[key] = array.view(dtype).reshape(tensor.shape)
        ends.append((first, last))
    if set(found) != set(info.tensors) or _overlap(ends):
        raise CorruptCacheError(f"{where}: lacks a tensor that the manifest names, or has two that overlap")
    return found


class _Entry(msgspec.Struct):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]

    @property
    def tensor(self) -> TensorInfo:
        return TensorInfo(dtype=self.dtype, shape=self.shape)


def _header(data: bytes, where: str) -> tuple[dict[str, _Entry], int]:
    num_bytes = int.from_bytes(data[:_LENGTH_BYTES], "little")
    start = _LENGTH_BYTES + num_bytes
    if len(data) < _LENGTH_BYTES or num_bytes > MAX_HEADER_BYTES or start > len(data):
        raise CorruptCacheError(f"{where}: not a sidecar: its header would have {num_bytes} bytes")
    try:
        fields = msgspec.json.decode(data[_LENGTH_BYTES:start], type=dict[str, msgspec.Raw])
        fields.pop("__metadata__", None)
        return {key: msgspec.json.decode(raw, type=_Entry) for key, raw in fields.items()}, start
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptCacheError(f"{where}: not a sidecar: {error}") from error


def _described(key: str, array: NDArray[Any], *, is_bfloat16: bool) -> TensorInfo:
    name = "BF16" if is_bfloat16 else _NAMES.get(array.dtype.newbyteorder("<"))
    if name is None or (is_bfloat16 and array.dtype != np.uint16):
        raise FormatError(f"tensor {key!r} of a sidecar is {array.dtype}, expected one of {', '.join(map(str, _NAMES))}")
    return TensorInfo(dtype=name, shape=tuple(array.shape))


def _overlap(spans: list[tuple[int, int]]) -> bool:
    spans = sorted(span for span in spans if span[0] < span[1])
    return any(end > start for (_, end), (start, _) in pairwise(spans))
