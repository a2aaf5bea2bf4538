"""Damaged and hostile files end in one sentence: nothing crashes, is allocated without bound, or is run."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import re
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from foreign_cases import write_rows

from kdcache.errors import InputError
from kdcache.foreign import base
from kdcache.foreign.base import ReadConfig
from kdcache.foreign.formats.detect import is_own_cache
from kdcache.foreign.formats.distillkit_codec import parse_config
from kdcache.foreign.judge.doctor import ExamineConfig, examine

DATA = Path(__file__).parent / "data"
GOOD = {"input_ids": [1, 2, 3], "topk_ids": [[1, 2], [3, 4]], "topk_logprobs": [[-1.0, -2.0], [-1.0, -2.0]]}


def told(path: Path, **read: Any) -> str:
    with pytest.raises(InputError) as caught:
        examine(path, ExamineConfig(read=ReadConfig(**read)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"topk_ids": [[1, 2], [3]]}, "2 positions of 1 to 2 ids, but 2 positions of 2 values"),
        ({"topk_ids": [[1, 2]]}, "1 positions of 2 ids, but 2 positions of 2 values"),
        ({"topk_ids": [[1.5, 2], [3, 4]]}, "token ids must be whole numbers"),
        ({"topk_ids": [[10**400, 2], [3, 4]]}, "number is too large|not a JSON object|whole numbers"),
        ({"topk_ids": [[2**63, 2], [3, 4]]}, "token ids must be whole numbers"),
        ({"topk_ids": "none"}, "expected a list of lists of numbers, found a str"),
        ({"topk_ids": [[True, False], [1, 2]]}, "found a list with a bool"),
        ({"topk_logprobs": [["-1", "-2"], [1, 2]]}, "found a list with a str"),
        ({"topk_logprobs": [[None, -2], [-1, -2]]}, "found a list with a NoneType"),
        ({"input_ids": [[1]]}, "found a list with a list"),
    ],
)
def test_cells_that_are_no_lists_of_numbers(tmp_path: Path, change: dict[str, Any], sentence: str):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps(GOOD | change) + "\n")
    message = told(path)
    assert re.search(sentence, message)
    assert f"{path}:2" in message


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"topk_ids": pa.array([[["a", "b"]]])}, "expected a list of lists of numbers"),
        ({"topk_ids": pa.array([[1, 2]])}, "expected a list of lists of numbers"),
        ({"topk_logprobs": pa.array([[[None, -2.0], [-1.0, -2.0]]])}, "with nulls"),
        ({"input_ids": pa.array([["x"]])}, "expected a list of numbers"),
    ],
)
def test_columns_of_other_types(tmp_path: Path, change: dict[str, pa.Array], sentence: str):
    columns = {name: pa.array([value]) for name, value in GOOD.items()} | change
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    assert sentence in told(tmp_path / "a.parquet")


@pytest.mark.parametrize("line", ["{", "[1]", '{"input_ids": NaN}', "\xff", "null", "[" * 100_000])
def test_lines_that_are_no_json_object(tmp_path: Path, line: str):
    (tmp_path / "a.jsonl").write_bytes(line.encode("latin-1") + b"\n")
    assert re.search(r"a\.jsonl(:1|#0)?: ", told(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_files_cut_anywhere_or_with_any_byte_turned_end_in_a_sentence_or_are_read(tmp_path: Path, name: str):
    whole = write_rows(tmp_path / name, [GOOD] * 3).read_bytes()
    rng = np.random.default_rng(0)
    damaged = [whole[:end] for end in rng.integers(0, len(whole), 25)]
    for place in rng.integers(0, len(whole), 60):
        turned = bytearray(whole)
        turned[place] ^= int(rng.integers(1, 256))
        damaged.append(bytes(turned))
    for data in damaged:
        (tmp_path / name).write_bytes(data)
        with contextlib.suppress(InputError):
            examine(tmp_path / name, ExamineConfig())


def test_rows_larger_than_anything_real_are_not_allocated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(base, "MAX_ENTRIES_PER_POSITION", 1)
    assert "a position has 2 entries; at most 1 are read" in told(write_rows(tmp_path / "a.jsonl", [GOOD]))


def test_a_parquet_file_whose_run_lengths_stand_for_too_many_values_is_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("kdcache.inputs.formats.parquet_bounds.MAX_VALUES_PER_ITEM", 10_000)
    bomb = GOOD | {"topk_ids": [[7] * 20_001]}
    assert "claims to hold 20,001 values in 1 items" in told(write_rows(tmp_path / "a.parquet", [bomb]))


ROWS_OF_NOTHING = {
    "nulls": lambda offsets, n: pa.ListArray.from_arrays(offsets, pa.nulls(n)),
    "empty lists": lambda offsets, n: pa.ListArray.from_arrays(
        offsets, pa.Array.from_buffers(pa.list_(pa.int64(), 0), n, [None], children=[pa.array([], pa.int64())])
    ),
}


@pytest.mark.parametrize("name", ROWS_OF_NOTHING)
@pytest.mark.parametrize(
    ("n", "sentence"),
    [
        (2**24 + 1, "16,777,217 positions of one sequence; at most 16,777,216 are read"),
        (2**31 - 2, "claims to hold 4,294,967,298 values"),
    ],
)
def test_rows_of_nothing_are_not_counted_into_memory(tmp_path: Path, name: str, n: int, sentence: str):
    rows = ROWS_OF_NOTHING[name](pa.array([0, n], pa.int32()), n)
    batch = pa.record_batch([pa.array([[1, 2, 3]]), rows, rows], names=["input_ids", "topk_ids", "topk_logprobs"])
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    assert (tmp_path / "a.arrow").stat().st_size < 3000
    assert sentence in told(tmp_path / "a.arrow")


@pytest.mark.parametrize("opened", [pa.ipc.new_file, pa.ipc.new_stream])
@pytest.mark.parametrize("as_dictionary", [False, True])
def test_compressed_buffers_are_read_within_a_factor_and_refused_beyond(tmp_path: Path, opened: Any, as_dictionary: bool):
    def write(name: str, num_zeros: int) -> Path:
        zeros = pa.array([bytes(num_zeros)], pa.large_binary())
        extra = pa.DictionaryArray.from_arrays(pa.array([0]), zeros) if as_dictionary else zeros
        batch = pa.record_batch([*(pa.array([value]) for value in GOOD.values()), extra], names=[*GOOD, "more"])
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        with pa.OSFile(str(tmp_path / name), "wb") as sink, opened(sink, batch.schema, options=options) as writer:
            writer.write_batch(batch)
        return tmp_path / name

    assert examine(write("small.arrow", 2**20), ExamineConfig()).counts.num_positions == 2
    bomb = write("bomb.arrow", 2**27)
    assert bomb.stat().st_size < 2**16
    assert "more than real data needs" in told(bomb)


class Runs:
    """What a pickle does when it is opened."""

    def __reduce__(self) -> Any:
        return (Path.write_text, (Path("opened"), "yes"))


@pytest.mark.parametrize("ending", [".pt", ".pkl", ".npy", ".bin"])
def test_pickles_are_refused_unopened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str):
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"a{ending}").write_bytes(pickle.dumps(Runs()))
    assert "may be pickles, which run any code" in told(tmp_path / f"a{ending}")
    assert not Path("opened").exists()


META = {"hash": "0", "identifiers": {}, "saver": {"k": 2, "p": None, "min_k": 1, "save_dtype": "fp16"}}


def tar(path: Path, members: dict[str, bytes], kind: bytes = tarfile.REGTYPE) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        if kind != tarfile.REGTYPE:
            info = tarfile.TarInfo("link")
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    return path


def blob(storages: list[bytes], *, compression: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Runs()))
        for number, data in enumerate(storages):
            archive.writestr(f"archive/data/{number}", data)
    return pa.compress(stream.getvalue(), "zstd", asbytes=True)


def test_a_megatron_tar_with_a_hostile_pickle_is_read_without_opening_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    values = np.array([-1, -2], "<f2").tobytes()
    ids = np.array([5, 6], "<u2").tobytes()
    members = {"_meta.json": json.dumps(META).encode(), "1.pt.zst": blob([values, ids, b"\0\1"]), "../../evil": b"x"}
    path = tar(tmp_path / "cp0_dp0__1.tar", members, tarfile.SYMTYPE)
    found = examine(path, ExamineConfig())
    assert (found.counts.num_positions, found.counts.max_id) == (1, 6 + 65536)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cp0_dp0__1.tar"]


@pytest.mark.parametrize(
    ("members", "sentence"),
    [
        ({}, "the first member is ''"),
        ({"1.pt.zst": b""}, "the first member is '1.pt.zst'"),
        ({"_meta.json": b"{"}, "not JSON"),
        ({"_meta.json": b"[]"}, "expected a JSON object"),
        ({"_meta.json": b'{"saver": {"k": 0, "save_dtype": "fp16"}}'}, "expected k, p and save_dtype"),
        ({"_meta.json": b'{"saver": {"k": 2, "save_dtype": "int4"}}'}, "expected k, p and save_dtype"),
        ({"_meta.json": b" " * (2**20 + 1)}, "at most 1,048,576 are read"),
        ({"_meta.json": json.dumps(META).encode(), "1.pt.zst": b"nonsense"}, "not zstd"),
        ({"_meta.json": json.dumps(META).encode(), "1.pt.zst": pa.compress(b"x" * 99, "zstd", asbytes=True)}, "torch.save"),
        ({"_meta.json": json.dumps(META).encode(), "1.pt.zst": blob([b"12"])}, "1 tensors, expected three"),
        ({"_meta.json": json.dumps(META).encode(), "1.pt.zst": blob([b"1234", b"12", b"1"])}, "2 values, 1 ids and 1 bits"),
        (
            {"_meta.json": json.dumps(META).encode(), "1.pt.zst": blob([b"1" * 9999] * 3, compression=zipfile.ZIP_DEFLATED)},
            "a tensor is compressed",
        ),
    ],
)
def test_tars_that_are_not_what_they_claim(tmp_path: Path, members: dict[str, bytes], sentence: str):
    assert sentence in told(tar(tmp_path / "cp0_dp0__1.tar", members))


def test_a_bomb_in_a_tar_stops_at_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("kdcache.foreign.formats.megatron.MAX_PAYLOAD_BYTES", 10_000)
    members = {"_meta.json": json.dumps(META).encode(), "1.pt.zst": pa.compress(b"\0" * 20_000, "zstd", asbytes=True)}
    assert "more than 10,000 bytes come out of" in told(tar(tmp_path / "cp0_dp0__1.tar", members))


def test_tensors_on_top_of_each_other_and_sparse_members_are_refused(tmp_path: Path):
    one = io.BytesIO()
    with zipfile.ZipFile(one, "w") as archive:
        archive.writestr("archive/data/0", b"1" * 3000)
        (info,) = archive.infolist()
        for number in (1, 2):
            twin = zipfile.ZipInfo(f"archive/data/{number}")
            for name in ("header_offset", "file_size", "compress_size", "CRC"):
                setattr(twin, name, getattr(info, name))
            archive.filelist.append(twin)
    members = {"_meta.json": json.dumps(META).encode(), "1.pt.zst": pa.compress(one.getvalue(), "zstd", asbytes=True)}
    assert "on top of each other" in told(tar(tmp_path / "cp0_dp0__1.tar", members))


def test_headers_of_a_tar_that_hold_no_numbers_or_go_on_and_on_end_in_a_sentence(tmp_path: Path):
    path, data = tmp_path / "cp0_dp0__1.tar", json.dumps(META).encode()
    for headers in ({"GNU.sparse.map": "a,b", "GNU.sparse.size": "9"}, {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}):
        with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
            info = tarfile.TarInfo("_meta.json")
            info.size, info.pax_headers = len(data), headers
            archive.addfile(info, io.BytesIO(data))
        assert "not a readable tar" in told(path)
    long = tarfile.TarInfo("././@LongLink")
    long.type, long.size = tarfile.GNUTYPE_LONGNAME, 3
    chain = (long.tobuf(tarfile.GNU_FORMAT) + b"ab\0".ljust(512, b"\0")) * 5000
    path.write_bytes(chain + bytes(1024))
    assert "not a readable tar" in told(path)


def test_a_tensor_that_ends_beyond_its_blob_and_a_dtype_that_is_a_list_end_in_a_sentence(tmp_path: Path):
    one = io.BytesIO()
    with zipfile.ZipFile(one, "w") as archive:
        archive.writestr("archive/data/0", b"1" * 30)
        (info,) = archive.infolist()
        info.file_size = info.compress_size = 150
    members = {"_meta.json": json.dumps(META).encode(), "1.pt.zst": pa.compress(one.getvalue(), "zstd", asbytes=True)}
    assert "not what torch.save writes" in told(tar(tmp_path / "cp0_dp0__1.tar", members))
    for dtype in ([], {}):
        fields = {**META, "saver": {"k": 2, "p": None, "save_dtype": dtype}}
        path = tar(tmp_path / "cp0_dp0__1.tar", {"_meta.json": json.dumps(fields).encode()})
        assert "expected k, p and save_dtype" in told(path)


def test_text_of_a_parquet_file_that_is_not_utf_8_ends_in_a_sentence(tmp_path: Path):
    text = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")])
    pq.write_table(pa.table({"choices": text}), tmp_path / "a.parquet")
    assert "UTF8" in told(tmp_path / "a.parquet")


def test_a_name_that_no_file_has_ends_in_a_sentence():
    assert not is_own_cache("a" * 5000)
    assert "cannot be read: File name too long" in told(Path("a" * 5000))


def test_a_whole_number_beyond_every_float_ends_in_a_sentence(tmp_path: Path):
    row = {"tokens": [1, 2], "ids": [[1, 2]], "values": [[-(10**400), -1]]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    assert "a number is too large" in told(tmp_path / "a.jsonl")


def test_a_config_of_a_curve_of_many_terms_is_refused():
    fields = {"d": 2**20, "k": 2**20, "exact_k": 0, "polynomial_terms": [0] * 10**5}
    for terms in (fields["polynomial_terms"], [0] * 16, [10**30]):
        with pytest.raises(InputError, match="polynomial_terms"):
            parse_config(fields | {"polynomial_terms": terms}, "config")


def test_a_tar_cut_short(tmp_path: Path):
    whole = (DATA / "megatron" / "top_k" / "cp0_dp0__2.tar").read_bytes()
    for end in (100, 600, 1100, 1600, 3000):
        (tmp_path / "cp0_dp0__2.tar").write_bytes(whole[:end])
        assert "cp0_dp0__2.tar" in told(tmp_path / "cp0_dp0__2.tar")


@pytest.mark.parametrize(
    "fields",
    [
        None, [], {"k": 5}, {"d": 10, "k": 20, "exact_k": 1, "polynomial_terms": [0], "residual_bins": []},
        {"d": 10, "k": 5, "exact_k": 9, "residual_bins": []}, {"d": 2**40, "k": 5, "exact_k": 5},
        {"d": 10, "k": 5, "exact_k": 1, "polynomial_terms": ["tan"]}, {"d": 10, "k": 5, "exact_k": 1, "exact_dtype": "int8"},
        {"d": 10, "k": 5, "exact_k": 4, "residual_bins": [{"scale_dtype": "float16", "element_bits": 4, "num_elements": 4}]},
        {"d": 10, "k": 5, "exact_k": 1, "residual_bins": [{"scale_dtype": "float16", "element_bits": 99, "num_elements": 1}]},
        {"polynomial_degree": 10**9, "k": 5, "exact_k": 1, "vocab_size": 10},
    ],
)  # fmt: skip
def test_configs_that_ask_for_the_impossible(fields: Any):
    with pytest.raises(InputError, match=r"x.yaml: not a compression config of DistillKit"):
        parse_config(fields, "x.yaml")


def test_yaml_that_runs_code_or_grows_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import shutil

    monkeypatch.chdir(tmp_path)
    shutil.copy(DATA / "distillkit" / "exact" / "data_0.parquet", tmp_path)
    for text in (
        "!!python/object/apply:os.mkdir [opened]",
        "a: &a [1,1]\nb: [*a, *a]",
        "d: [",
        "\t",
        "{" * 5000,
        "a" * (2**20 + 1),
    ):
        (tmp_path / "compression_config.yaml").write_text(text)
        assert "compression_config.yaml" in told(tmp_path)
    assert not Path("opened").exists()


def test_folders_that_hold_nothing_or_two_kinds(tmp_path: Path):
    assert "no such file or folder" in told(tmp_path / "nowhere")
    assert "neither a cache of kdcache, nor Parquet" in told(tmp_path)
    write_rows(tmp_path / "a.parquet", [GOOD])
    write_rows(tmp_path / "b.jsonl", [GOOD])
    assert "holds jsonl and parquet files; name one of them" in told(tmp_path)
