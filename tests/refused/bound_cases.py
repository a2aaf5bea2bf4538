"""One hostile input for each line of the spec's table of bounds. Run as a program, it tries all under a limit of memory and
prints what each came to as JSON. Arguments: a sound cache, a folder to write to.
"""

from __future__ import annotations

import importlib
import io
import json
import resource
import shutil
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import hostile
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kdcache.codec.features.columns import read_vectors
from kdcache.config.yaml_text import MAX_YAML_BYTES, parse_yaml
from kdcache.foreign.base import ReadConfig
from kdcache.foreign.formats.distillkit_codec import parse_config
from kdcache.foreign.judge.doctor import ExamineConfig, examine
from kdcache.format.identity import FeatureInfo
from kdcache.format.sidecar import make_sidecar, parse_sidecar
from kdcache.inputs.formats.any_file import read_text_or_ids
from kdcache.store.reader import open_reader

LIMIT_BYTES = 3 * 2**28
"""Beyond what the process has when the first case is tried: most ask for more, the others for time without end."""

ROW = {"input_ids": [1, 2, 3], "topk_ids": [[1, 2], [3, 4]], "topk_logprobs": [[-1.0, -2.0], [-1.0, -2.0]]}
CHAT = [{"role": "user", "content": "hello"}]


class Case(NamedTuple):
    """Attributes:
    write: puts the input into an empty folder, before the limit, and says where; given the sound cache too.
    run: what is tried under the limit.
    """

    write: Callable[[Path, Path], Path | None]
    run: Callable[[Any], object]


def spoilt(spoil: Callable[[Path], object]) -> Case:
    def write(sound: Path, folder: Path) -> Path:
        shutil.copytree(sound, folder / "cache")
        spoil(folder / "cache")
        return folder / "cache"

    return Case(write, read_all)


def read_all(cache: Path) -> None:
    with open_reader(cache) as reader:
        for _ in reader:
            pass


def foreign(write: Callable[[Path], Path]) -> Case:
    return Case(lambda _, folder: write(folder), lambda path: examine(path, ExamineConfig(read=ReadConfig())))


def plain(run: Callable[[], object]) -> Case:
    return Case(lambda _, __: None, lambda _: run())


def table(columns: dict[str, Any]) -> dict[str, Any]:
    return {name: pa.array([value]) for name, value in ROW.items()} | columns


def arrow(columns: dict[str, Any], **options: Any) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        batch = pa.record_batch(list(columns.values()), names=list(columns))
        packed = pa.ipc.IpcWriteOptions(**options)
        with pa.OSFile(str(folder / "a.arrow"), "wb") as sink, pa.ipc.new_file(sink, batch.schema, options=packed) as writer:
            writer.write_batch(batch)
        return folder / "a.arrow"

    return write


def parquet(columns: dict[str, Any]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        pq.write_table(pa.table(columns), folder / "a.parquet", compression="zstd", use_dictionary=False)
        return folder / "a.parquet"

    return write


def rows_of_nothing(num_rows: int) -> Callable[[Path], Path]:
    rows = pa.ListArray.from_arrays(pa.array([0, num_rows], pa.int32()), pa.nulls(num_rows))
    return arrow(table({"topk_ids": rows, "topk_logprobs": rows}))


def long_run(folder: Path) -> Path:
    run = pa.ListArray.from_arrays(pa.array([0, 2**27 + 1], pa.int32()), pa.array(np.zeros(2**27 + 1, np.int8)))
    return parquet(table({"x": run}))(folder)


def wide_row(folder: Path) -> Path:
    rows = pa.array([[np.zeros(2**20 + 1, np.int32)]], pa.list_(pa.list_(pa.int32())))
    return parquet(table({"topk_ids": rows, "topk_logprobs": rows}))(folder)


def with_zeros(write: Callable[..., Callable[[Path], Path]], **options: Any) -> Callable[[Path], Path]:
    """More of them than the limit, compressed."""

    def made(folder: Path) -> Path:
        return write(table({"x": pa.array([bytes(3 * 2**28)], pa.large_binary())}), **options)(folder)

    return made


def megatron(payload: Callable[[], bytes]) -> Callable[[Path], Path]:
    meta = {"hash": "0", "identifiers": {}, "saver": {"k": 2, "p": None, "min_k": 1, "save_dtype": "fp16"}}

    def write(folder: Path) -> Path:
        with tarfile.open(folder / "cp0_dp0__1.tar", "w") as archive:
            for name, data in {"_meta.json": json.dumps(meta).encode(), "1.pt.zst": payload()}.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        return folder / "cp0_dp0__1.tar"

    return write


def packed_zeros(num_bytes: int) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        for _ in range(num_bytes // 2**20):
            stream.write(bytes(2**20))
    return sink.getvalue().to_pybytes()


def tensors_that_overlap() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data/0", bytes(2**20))
        (info,) = archive.infolist()
        for number in range(1, 3000):
            twin = zipfile.ZipInfo(f"archive/data/{number}")
            for name in ("header_offset", "file_size", "compress_size", "CRC"):
                setattr(twin, name, getattr(info, name))
            archive.filelist.append(twin)
    return pa.compress(stream.getvalue(), "zstd", asbytes=True)


def one_text_in_many_views(number: int) -> pa.Array:
    view = np.array([10**6, int.from_bytes(b"xxxx", "little"), 0, 0], np.int32)
    views = pa.py_buffer(np.tile(view, number).tobytes())
    return pa.Array.from_buffers(pa.string_view(), number, [None, views, pa.py_buffer(b"x" * 10**6)])


def long_compressed_text(folder: Path) -> Path:
    pack = zlib.compressobj(9, wbits=31)
    with (folder / "a.jsonl.gz").open("wb") as file:
        for _ in range(2**11):
            file.write(pack.compress(b" " * 2**20))
    return folder / "a.jsonl.gz"


def yaml(text: str) -> Case:
    return plain(lambda: parse_yaml(text, where="config.yaml"))


def read_items(write: Callable[[Path], Path]) -> Case:
    return Case(lambda _, folder: write(folder), lambda path: sum(1 for _ in read_text_or_ids(str(path))))


def served(fault: str, **server: Any) -> Case:
    def run() -> None:
        from completions_server import CompletionsServer
        from contracts.teacher import make_sequence, top_k

        with_faults = CompletionsServer()
        try:
            teacher = with_faults.teacher(server={"retries": 0, **server})
            list(teacher.score([make_sequence([1, 2, 3])], top_k(5)))
            with_faults.manners.faults.append(fault)
            list(teacher.score([make_sequence([1, 2, 3])], top_k(5)))
        finally:
            with_faults.close()

    return plain(run)


def template(text: str) -> Case:
    def run() -> None:
        from kdcache.teacher.chat.jinja_template import ChatTemplate

        ChatTemplate(text).render({"messages": CHAT})

    return plain(run)


MANY = "{% for i in range(99999) %}"
LAUGHS = "a: &a [x]\n" + "\n".join(
    f"{b}: &{b} [{', '.join(9 * ['*' + a])}]" for a, b in zip("abcdefghi", "bcdefghij", strict=True)
)
CURVE = {"d": 2**20, "k": 2**20, "exact_k": 0, "polynomial_terms": [0] * 10**5}

SIDECAR = make_sidecar("x", {"x": np.zeros(4, np.float32)}).info
ATTENTION = FeatureInfo(name="x", kind="attention", layer=1, size=2, num_heads=1, top_keys=2)
KEYS_IN_FRONT = {"feature:x": np.zeros(6, np.float16), "feature:x:distance": np.full(6, 65535, np.uint16)}


def claiming_sidecar(size: int) -> bytes:
    """A header that claims so many numbers."""
    header = json.dumps({"x": {"dtype": "F32", "shape": [size], "data_offsets": [0, 4 * size]}}).encode()
    return len(header).to_bytes(8, "little") + header


CASES: dict[str, Case] = {
    "compressed buffers": spoilt(hostile.compress),
    "Arrow's metadata version": spoilt(hostile.older_arrow),
    "record batches' offsets": spoilt(
        lambda c: hostile.replace_shard(c, hostile.repeat_a_batch(hostile.shard_path(c).read_bytes()))
    ),
    "entries by the selection": spoilt(hostile.replaced_selection({"kind": "top_k", "params": {"k": 2**31}})),
    "entries by their counts": spoilt(lambda c: hostile.edit_rows(c, hostile.set_list("num_entries", [65535] * 11))),
    "header of a sidecar": plain(lambda: parse_sidecar((2**62).to_bytes(8, "little") + b"{}", SIDECAR, "here")),
    "tensors of a sidecar": plain(lambda: parse_sidecar(claiming_sidecar(2**40), SIDECAR, "here")),
    "keys of attention": plain(lambda: read_vectors(KEYS_IN_FRONT, ATTENTION, np.ones(3, bool))),
    "nesting of a manifest": spoilt(lambda c: hostile.manifest_path(c).write_bytes(b"[" * 10**6)),
    "decompressed Arrow": foreign(with_zeros(arrow, compression="zstd")),
    "values of an Arrow file": foreign(rows_of_nothing(2**31 - 2)),
    "values of an Arrow input": read_items(arrow({"text": one_text_in_many_views(10**5)})),
    "values of a Parquet column": foreign(long_run),
    "decompressed Parquet": foreign(with_zeros(parquet)),
    "positions of a foreign sequence": foreign(rows_of_nothing(2**24 + 1)),
    "entries of a foreign position": foreign(wide_row),
    "decompressed payload of a tar": foreign(megatron(lambda: packed_zeros(2**30))),
    "tensors of a tar": foreign(megatron(tensors_that_overlap)),
    "terms of a fitted curve": plain(lambda: parse_config(CURVE, "compression_config.yaml")),
    "decompressed text": read_items(long_compressed_text),
    "values of a YAML file": yaml(LAUGHS),
    "what an alias stands in": yaml("a: &a [*a]"),
    "nesting of a YAML file": yaml("[" * 100_000),
    "bytes of a YAML file": yaml("#" * (MAX_YAML_BYTES + 1)),
    "digits of a YAML number": yaml("a: 1" + ":1" * 10**6),
    "bytes of a server's answer": served("bomb"),
    "compression of a server's answer": served("bomb in a bomb"),
    "time of a server's answer": served("drip", deadline_seconds=1.0),
    "steps of a chat template": template(f"{MANY}{MANY}{{% endfor %}}{{% endfor %}}"),
    "size of what a template makes": template("{{ 'x' * 10**10 }}"),
    "length of a chat template": template("x" * 2**21),
}


def limit_memory() -> None:
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + LIMIT_BYTES, now + LIMIT_BYTES))


def outcome(case: Case, path: Path | None) -> list[str]:
    try:
        case.run(path)
    except Exception as error:
        return [type(error).__name__, str(error)]
    return ["nothing", ""]


def main(sound: Path, folder: Path) -> None:
    """Print name -> the kind of what it raised, and its sentence."""
    for module in ("contracts.teacher", "completions_server", "kdcache.teacher.chat.jinja_template"):
        importlib.import_module(module)
    read_all(sound)
    places = {name: folder / str(number) for number, name in enumerate(CASES)}
    for place in places.values():
        place.mkdir()
    written = {name: case.write(sound, places[name]) for name, case in CASES.items()}
    limit_memory()
    print(json.dumps({name: outcome(case, written[name]) for name, case in CASES.items()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
