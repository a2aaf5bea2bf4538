"""Megatron-LM's offline distillation tars (d98e8a6): `_meta.json`, then one zstd-compressed `torch.save` blob per iteration.

A blob is a zip file: a pickle that says which tensors there are, and each tensor's bytes as a member of its own. The pickle is
not opened here, ever: a pickle runs what it likes. The writer's order is fixed (all values, then all low halves of the ids,
then all 17th bits), and its k is in `_meta.json`, so without top-p the bytes alone tell the positions.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa

from kdcache.errors import InputError
from kdcache.foreign.base import Finding, ForeignCache, ForeignSequence, ReadConfig, check_size
from kdcache.foreign.blocks import SENTINEL
from kdcache.store.files.regular import leads_inside

TAR_NAME = re.compile(r"cp(\d+)_dp(\d+)__(\d+)\.tar")
META = "_meta.json"
PAYLOAD = re.compile(r"(\d+)\.pt\.zst")
STORAGE = re.compile(r"[^/]+/data/(\d+)")
DTYPES = {"fp16": "<f2", "fp32": "<f4", "bf16": "<u2"}
MAX_META_BYTES = 2**20
MAX_PAYLOAD_BYTES = 2**31
FREE_BYTES, MAX_INFLATION = 2**26, 250
"""A payload may become 64 MiB, or this many times its size: half-precision logprobs and ids become twice."""

READ_BYTES = 2**22
VOCAB_LIMIT = 2**17


@dataclass(frozen=True)
class Saver:
    """What the metadata say of the positions."""

    k: int
    p: float | None
    dtype: str


def open_megatron(path: str, reading: ReadConfig) -> ForeignCache | None:
    """Open the tars at a path, which is one or a folder of them; None if it is neither.

    Raises:
        InputError: a tar without metadata, or whose metadata make no sense.
    """
    named = Path(path)
    files = [named] if TAR_NAME.fullmatch(named.name) and named.is_file() else []
    if named.is_dir():
        files = sorted(
            (f for f in named.iterdir() if TAR_NAME.fullmatch(f.name) and f.is_file() and leads_inside(f, named)),
            key=lambda f: [*map(int, _ranks_and_step(f))],
        )
    if not files:
        return None
    metas = {file: _read_meta(file) for file in files}
    meta = metas[files[0]]
    saver = _saver(meta, files[0])
    return ForeignCache(
        format="megatron",
        title="Megatron-LM offline logprobs (tar)",
        path=path,
        values=reading.values or "logprobs",
        read=partial(_sequences, {file: _saver(found, file) for file, found in metas.items()}),
        facts={
            "files": f"{len(files)}, of {len({_ranks_and_step(f)[:2] for f in files})} context and data ranks",
            "entries": f"top {saver.k}{f' within top-p {saver.p}' if saver.p else ''}, {saver.dtype}",
            "data": json.dumps(meta.get("identifiers"))[:500],
        },
        findings=(*_findings(meta, saver), *_mixed_runs(metas)),
    )


def _findings(meta: dict[str, Any], saver: Saver) -> Iterator[Finding]:
    yield Finding(
        "no_tokens", "fatal",
        "the tars hold no token ids: a Megatron student must replay the same data order (the seed, length, "
        "samples and blend in the metadata), so alignment cannot be checked here and nothing can be "
        "converted; capture again with kdcache",
    )  # fmt: skip
    yield Finding(
        "no_identity", "note", "neither the teacher nor its tokenizer is named; the metadata's hash is of the data alone"
    )
    if saver.p is not None:
        yield Finding(
            "needs_unpickling", "fatal",
            f"with top-p {saver.p} the width of a position is only in the pickled part of each blob, and "
            "pickles are not opened: they can run any code; the values were not looked at",
        )  # fmt: skip
    identifiers = meta.get("identifiers")
    text = json.dumps(identifiers, sort_keys=False, separators=(",", ":"))
    if hashlib.md5(text.encode(), usedforsecurity=False).hexdigest() != meta.get("hash"):
        yield Finding(
            "wrong_hash", "fatal", "the metadata's hash is not that of its own identifiers: they were edited or damaged"
        )


def _mixed_runs(metas: dict[Path, dict[str, Any]]) -> Iterator[Finding]:
    """Tars of runs over other data, or saved in another way, in one folder: a student's data order fits one of them at most."""
    for field, what in (("hash", "hash"), ("saver", "saver settings")):
        of_value: dict[str, list[str]] = {}
        for path, meta in metas.items():
            of_value.setdefault(json.dumps(meta.get(field), sort_keys=True), []).append(path.name)
        if len(of_value) > 1:
            shown = "; ".join(
                f"{value} in {names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}"
                for value, names in of_value.items()
            )
            sentence = (
                f"the tars are of {len(of_value)} runs, by the {what} in their metadata: {shown}; keep each run in a folder of "
                "its own"
            )
            yield Finding("mixed_runs", "fatal", sentence)
            return


def _sequences(files: dict[Path, Saver]) -> Iterator[ForeignSequence]:
    for path, saver in files.items():
        for name, data in _members(path) if saver.p is None else ():
            if PAYLOAD.fullmatch(name):
                yield from _microbatches(data, saver, f"{path}:{name}")


def _microbatches(data: bytes, saver: Saver, where: str) -> Iterator[ForeignSequence]:
    storages = _storages(_decompressed(data, where), where)
    num_microbatches = len(storages) // 3
    if not num_microbatches or len(storages) != 3 * num_microbatches:
        raise InputError(f"{where}: {len(storages)} tensors, expected three for each microbatch")
    groups = zip(
        storages[:num_microbatches],
        storages[num_microbatches : 2 * num_microbatches],
        storages[2 * num_microbatches :],
        strict=True,
    )
    for index, (values, low, high) in enumerate(groups):
        dtype = np.dtype(DTYPES[saver.dtype])
        sizes = len(values) // dtype.itemsize, len(low) // 2, len(high)
        if len(set(sizes)) != 1 or sizes[0] % saver.k or len(values) % dtype.itemsize or len(low) % 2:
            raise InputError(
                f"{where}: microbatch {index} has {sizes[0]} values, {sizes[1]} ids and {sizes[2]} bits for "
                f"positions of {saver.k}"
            )
        values_E = np.frombuffer(values, dtype)
        if saver.dtype == "bf16":
            values_E = (values_E.astype(np.uint32) << np.uint32(16)).view(np.float32)
        ids_E = np.frombuffer(low, "<u2").astype(np.int64) | (np.frombuffer(high, np.uint8) != 0).astype(np.int64) << 16
        counts_P = np.full(sizes[0] // saver.k, saver.k, np.int64)
        check_size(where, counts_P)
        yield _without_sentinels(f"{where}[{index}]", counts_P, ids_E, values_E.astype(np.float64))


def _without_sentinels(where: str, counts_P: np.ndarray, ids_E: np.ndarray, values_E: np.ndarray) -> ForeignSequence:
    kept_E = values_E > SENTINEL
    position_E = np.repeat(np.arange(len(counts_P)), counts_P)
    return ForeignSequence(
        source=where,
        input_ids_N=None,
        positions_P=np.arange(len(counts_P)),
        counts_P=np.bincount(position_E[kept_E], minlength=len(counts_P)).astype(np.int64),
        token_ids_E=ids_E[kept_E],
        values_E=values_E[kept_E],
    )


def _storages(blob: bytes, where: str) -> list[bytes]:
    """The bytes of every tensor, in the order in which they were saved."""
    try:
        with zipfile.ZipFile(io.BytesIO(blob)) as archive:
            found = {int(match[1]): info for info in archive.infolist() if (match := STORAGE.fullmatch(info.filename))}
            if sorted(found) != list(range(len(found))):
                raise InputError(f"{where}: not what torch.save writes: tensors {sorted(found)[:4]}...")
            # torch stores, and does not deflate: what is larger than the blob would be a bomb.
            if any(info.compress_type != zipfile.ZIP_STORED or info.file_size > len(blob) for info in found.values()):
                raise InputError(f"{where}: not what torch.save writes: a tensor is compressed")
            if sum(info.file_size for info in found.values()) > len(blob):
                raise InputError(f"{where}: not what torch.save writes: tensors lie on top of each other")
            return [archive.read(found[key]) for key in range(len(found))]
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{where}: not what torch.save writes: {error}") from error


def _decompressed(data: bytes, where: str) -> bytes:
    limit = min(MAX_PAYLOAD_BYTES, max(FREE_BYTES, MAX_INFLATION * len(data)))
    blob = bytearray()
    try:
        with pa.CompressedInputStream(pa.BufferReader(data), "zstd") as stream:
            # Piece by piece: one read of the whole would take memory for all that there may be.
            while piece := stream.read(READ_BYTES):
                blob += piece
                if len(blob) > limit:
                    raise InputError(
                        f"{where}: more than {limit:,} bytes come out of {len(data):,}, more than a real payload needs"
                    )
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{where}: not zstd: {error}") from error
    return bytes(blob)


def _read_meta(path: Path) -> dict[str, Any]:
    name, data = next(_members(path), ("", b""))
    if name != META:
        raise InputError(f"{path}: the first member is {name!r}, expected {META!r}: not a tar of Megatron's logits saver")
    try:
        meta = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path}: {META}: not JSON: {error}") from error
    if not isinstance(meta, dict):
        raise InputError(f"{path}: {META}: expected a JSON object")
    return meta


def _saver(meta: dict[str, Any], path: Path) -> Saver:
    fields: Any = meta.get("saver")
    k, p, dtype = (fields.get(name) for name in ("k", "p", "save_dtype")) if isinstance(fields, dict) else (None,) * 3
    if not isinstance(dtype, str) or dtype not in DTYPES:
        dtype = None
    if type(k) is not int or not 1 <= k <= VOCAB_LIMIT or dtype is None or not (p is None or isinstance(p, float | int)):
        raise InputError(f"{path}: {META}: saver is {fields!r}, expected k, p and save_dtype")
    return Saver(k, p, dtype)


def _members(path: Path) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of every plain file in a tar, in order; nothing is unpacked onto the disk."""
    try:
        _refuse_cut(path)
        with tarfile.open(path, mode="r|") as archive:
            for member in archive:
                if not member.isreg():
                    continue
                if member.issparse():
                    raise InputError(f"{path}: member {member.name!r} is sparse: its bytes are not in the tar")
                limit = MAX_META_BYTES if member.name == META else MAX_PAYLOAD_BYTES
                if member.size > limit:
                    raise InputError(f"{path}: member {member.name!r} has {member.size:,} bytes, at most {limit:,} are read")
                stream = archive.extractfile(member)
                yield member.name, b"" if stream is None else stream.read()
    except InputError:
        raise
    # tarfile reads headers of sparse members as numbers, and each header that speaks of the next one by recursion.
    except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError, RecursionError) as error:
        raise InputError(f"{path}: not a readable tar: {error}") from error


def _refuse_cut(path: Path) -> None:
    """A tar ends with blocks of zeros; Python's reader takes a file that was cut between two members for a whole one."""
    with path.open("rb") as stream:
        size = stream.seek(0, io.SEEK_END)
        stream.seek(max(size - tarfile.BLOCKSIZE, 0))
        if stream.read() != bytes(tarfile.BLOCKSIZE):
            raise InputError(f"{path}: not a whole tar: it does not end with the empty blocks that mark the end")


def _ranks_and_step(path: Path) -> tuple[str, str, str]:
    match = TAR_NAME.fullmatch(path.name)
    assert match is not None
    return match[1], match[2], match[3]
