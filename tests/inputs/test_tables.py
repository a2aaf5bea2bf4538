"""Whatever a Parquet or Arrow file holds, it is read or refused in a sentence: no traceback, and no process that dies."""

import decimal
import os
import random
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kdcache.config.capture import InputConfig
from kdcache.errors import InputError, KdcacheError
from kdcache.inputs.chat import Chat
from kdcache.inputs.content import Fields
from kdcache.inputs.formats.arrow_files import check_num_values
from kdcache.inputs.formats.base import InputFile
from kdcache.inputs.formats.parquet_bounds import items_at_once
from kdcache.inputs.formats.table_files import read_arrow, read_parquet
from kdcache.inputs.reader import ItemReader

TEXT = ["one", None, "", "two"]
IDS = [[1, 2], None, [], [3]]
TEXT_COLUMNS = {
    "large": pa.array(TEXT, pa.large_string()),
    "view": pa.array(TEXT, pa.string_view()),
    "dictionary": pa.array(TEXT).dictionary_encode(),
    "dictionary of views": pa.DictionaryArray.from_arrays(
        pa.array([0, None, 1, 2]), pa.array(["one", "", "two"], pa.string_view())
    ),
    "runs": pa.RunEndEncodedArray.from_arrays([2, 3, 4, 5, 6], ["zero", *TEXT]).slice(2),
    "binary": pa.array([value and value.encode() for value in TEXT], pa.binary()),
    "binary view": pa.array([value and value.encode() for value in TEXT], pa.binary_view()),
    "json": pa.ExtensionArray.from_storage(pa.json_(), pa.array(TEXT)),
}
ID_COLUMNS = {
    "large": pa.array(IDS, pa.large_list(pa.uint8())),
    "view": pa.array(IDS, pa.list_view(pa.int64())),
    "large view": pa.array(IDS, pa.large_list_view(pa.int32())),
    "of dictionaries": pa.array(IDS, pa.list_(pa.dictionary(pa.int8(), pa.int32()))),
    "dictionary": pa.DictionaryArray.from_arrays(pa.array([0, None, 1, 2]), pa.array([[1, 2], [], [3]])),
    "runs": pa.RunEndEncodedArray.from_arrays([1, 2, 3, 4], IDS),
}
OTHER_COLUMNS = {
    "map": pa.array([[("a", "b")]], pa.map_(pa.string(), pa.string())),
    "union": pa.UnionArray.from_dense(pa.array([0], pa.int8()), pa.array([0], pa.int32()), [pa.array(["a"]), pa.array([1])]),
    "decimal": pa.array([decimal.Decimal("1.5")]),
    "nested": pa.array([{"text": "a"}]),
    "lists of lists": pa.array([[[1]]]),
    "tensor": pa.FixedShapeTensorArray.from_numpy_ndarray(np.zeros((1, 2, 2))),
    "duration": pa.array([1], pa.duration("s")),
    "fixed": pa.array([b"ab"], pa.binary(2)),
    "half": pa.array([np.float16(1)]),
}


def write(path: Path, table: pa.Table) -> None:
    if path.suffix == ".parquet":
        pq.write_table(table, path)
        return
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table)


def plain(content):
    """Messages and ids as lists."""
    return content if isinstance(content, str) else content.messages if isinstance(content, Chat) else content.tolist()


def read(path: Path, **fields) -> list:
    items = ItemReader(InputConfig(format=path.suffix[1:], paths=(str(path),), **fields)).items()
    return [plain(item.content) for item in items]


def written(path: Path, table: pa.Table) -> bool:
    try:
        write(path, table)
    except (pa.ArrowException, OSError):  # Parquet has no such type
        return False
    return True


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_every_column_of_texts_or_ids_is_read(tmp_path, suffix):
    for kind, columns, wanted in (("text", TEXT_COLUMNS, ["one", "", "", "two"]), ("ids", ID_COLUMNS, [[1, 2], [], [], [3]])):
        for name, column in columns.items():
            if written(tmp_path / f"x{suffix}", pa.table({"x": column})):
                assert read(tmp_path / f"x{suffix}", content=kind, field="x") == wanted, name
    chat = [{"role": "user", "content": "hi"}]
    role = pa.struct({"role": pa.dictionary(pa.int32(), pa.string()), "content": pa.string_view()})
    for list_type in (pa.list_(role), pa.list_view(role), pa.list_(role, 1)):
        if written(tmp_path / f"x{suffix}", pa.table({"messages": pa.array([chat], list_type)})):
            assert read(tmp_path / f"x{suffix}", content="messages") == [chat]


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_every_other_column_is_refused_in_a_sentence(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    for kind in ("text", "ids", "messages"):
        for column in (*OTHER_COLUMNS.values(), *(TEXT_COLUMNS.values() if kind == "ids" else ())):
            if written(path, pa.table({"x": column})):
                with pytest.raises(InputError, match=r"x\.\w+(: |#\d+: )column 'x'.* (is|has the type) .*, but|not a readable"):
                    read(path, content=kind, field="x")
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"]), pa.array(["c"])], ["text", "text", "n"])
    if written(path, twice):
        with pytest.raises(InputError, match="2 columns are named 'text'; rename all but one"):
            read(path)
        assert read(path, field="n") == ["c"]  # the others are nobody's business
    for table in (pa.table({}), pa.table({"text": pa.array([], pa.string())})):
        write(path, table)
        if table.num_columns:
            assert read(path) == []
        else:
            with pytest.raises(InputError, match="no column 'text'; it has no columns"):
                read(path)


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_text_that_is_not_utf8_is_named_by_row(tmp_path, suffix):
    path, data = tmp_path / f"x{suffix}", pa.array([b"fine", None, b"half a pair: \xed\xa0\x80"], pa.binary())
    for column in (data, pa.Array.from_buffers(pa.string(), 3, data.buffers()), data.cast(pa.binary_view())):
        if written(path, pa.table({"x": column})):
            with pytest.raises(InputError, match=r"x\.\w+#2: column 'x' is not UTF-8 text \(byte 0xed\)"):
                read(path, field="x")


def test_streams_joined_into_one_file_are_refused(tmp_path):
    with pa.ipc.new_stream(tmp_path / "one.arrow", pa.schema([("text", pa.string())])) as writer:
        writer.write_table(pa.table({"text": ["a"]}))
    one = (tmp_path / "one.arrow").read_bytes()
    (tmp_path / "two.arrow").write_bytes(one + one)
    with pytest.raises(InputError, match="more data follows the end of its Arrow stream"):
        list(ItemReader(InputConfig(format="arrow", paths=(str(tmp_path / "two.arrow"),))).items())
    (tmp_path / "padded.arrow").write_bytes(one + b"\0" * 64)
    assert [
        item.content for item in ItemReader(InputConfig(format="arrow", paths=(str(tmp_path / "padded.arrow"),))).items()
    ] == ["a"]


@pytest.mark.parametrize("file_format", ["txt", "lines", "jsonl", "parquet", "arrow"])
def test_a_pointer_of_git_lfs_is_no_data(tmp_path, file_format):
    (tmp_path / "data").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 5\n")
    with pytest.raises(InputError, match="holds a Git LFS pointer"):
        list(ItemReader(InputConfig(format=file_format, paths=(str(tmp_path / "data"),))).items())


def test_a_table_that_is_cut_while_it_is_read_is_named(tmp_path):
    path = tmp_path / "x.arrow"
    with pa.ipc.new_file(path, pa.schema({"text": pa.string()})) as writer:
        for _ in range(3):
            writer.write_batch(pa.record_batch({"text": ["a" * 10_000] * 10}))
    items = ItemReader(InputConfig(format="arrow", paths=(str(path),))).items()
    next(items)
    os.truncate(path, 4096)
    with pytest.raises(InputError, match=r"x\.arrow: was cut while it was being read"):
        list(items)


def mutations(data: bytes, rng: random.Random) -> bytes:
    """Bytes with a few of them overwritten, some taken out, or the end missing."""
    damaged = bytearray(data)
    for _ in range(rng.choice([1, 1, 3, 30])):
        at = rng.randrange(len(damaged))
        damaged[at : at + rng.choice([1, 4, 8])] = rng.choice([b"\xff" * 4, b"\0" * 4, rng.randbytes(1), rng.randbytes(4), b""])
    return bytes(damaged[: rng.choice([len(damaged)] * 4 + [rng.randrange(len(damaged))])])


def fuzz(folder: str, num_rounds: int) -> None:
    """Read damaged files; whatever is no error of ours ends the process."""
    rng = random.Random(0)
    chats = pa.array([[{"role": "user", "content": "hi"}]] * 4)
    sound = []
    for suffix in (".arrow", ".parquet"):
        for kind, columns in (("text", TEXT_COLUMNS), ("ids", ID_COLUMNS), ("messages", {"chats": chats})):
            for column in columns.values():
                path = Path(folder) / f"x{suffix}"
                if written(path, pa.table({"x": column, "y": range(4)})):
                    sound.append((path, kind, path.read_bytes()))
    for _ in range(num_rounds):
        for path, kind, data in sound:
            path.write_bytes(mutations(data, rng))
            with suppress(KdcacheError):
                read(path, content=kind, field="x")


def test_damaged_tables_end_in_errors_of_ours(tmp_path):
    # In a process of its own: what this is about ends the process.
    code = f"import test_tables; test_tables.fuzz({str(tmp_path)!r}, 50)"
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": paths}
    )
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])


def views_of(data: bytes, number: int, kind: pa.DataType) -> pa.Array:
    """So many views of the same bytes."""
    view = np.array([len(data), int.from_bytes(data[:4], "little"), 0, 0], np.int32)
    return pa.Array.from_buffers(kind, number, [None, pa.py_buffer(np.tile(view, number).tobytes()), pa.py_buffer(data)])


ROWS_OF_LITTLE = {
    "nulls": lambda: pa.nulls(2**31 - 1),
    "views of one text": lambda: views_of(b"x" * 10**5, 10**5, pa.string_view()),
    "views of the same bytes": lambda: views_of(b"x" * 10**5, 10**5, pa.binary_view()),
    "a run of one text": lambda: pa.RunEndEncodedArray.from_arrays(pa.array([2**31 - 1], pa.int32()), pa.array(["hello"])),
}


@pytest.mark.parametrize("name", ROWS_OF_LITTLE)
def test_rows_that_take_no_room_in_a_file_take_none_in_memory(tmp_path: Path, name: str):
    path = tmp_path / "a.arrow"
    batch = pa.RecordBatch.from_arrays([ROWS_OF_LITTLE[name]()], names=["text"])
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    with pytest.raises(InputError, match=r"claims to hold .* values, more than real data needs"):
        next(read_arrow(InputFile(str(path), Fields("text", "text"))))


def test_a_parquet_file_of_long_runs_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("kdcache.inputs.formats.parquet_bounds.FREE_VALUES", 2**20)
    path = tmp_path / "a.parquet"
    runs = pa.ListArray.from_arrays(pa.array([0, 2**24], pa.int32()), pa.array(np.zeros(2**24, np.int32)))
    pq.write_table(pa.table({"text": ["a"], "runs": runs}), path, compression="zstd")
    with pytest.raises(InputError, match="16,777,216 values in"):
        next(read_parquet(InputFile(str(path), Fields("text", "text"))))


def test_rows_that_name_one_long_text_again_and_again_are_read_a_few_at_a_time(tmp_path: Path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["x" * 2**18] * 5000, "n": list(range(5000))}), path, compression="zstd")
    num_bytes, metadata = path.stat().st_size, pq.read_metadata(path)
    num_rows = items_at_once(metadata, ["text"], num_bytes, 1024)
    assert 100 < num_rows * metadata.row_group(0).column(0).total_uncompressed_size / 2**18 <= 256  # 64 MiB
    assert items_at_once(metadata, ["n"], num_bytes, 1024) == 1024
    assert items_at_once(metadata, ["text"], 2**40, 1024) == 1024


def test_a_long_text_that_a_dictionary_inside_of_lists_names_again_and_again_is_refused(tmp_path: Path):
    # Each message becomes a text of its own, where rows of a column share theirs.
    picked = pa.DictionaryArray.from_arrays(pa.array([0] * 300, pa.int32()), pa.array(["x" * 2**18, None]))
    chats = pa.ListArray.from_arrays(
        [0, 300], pa.StructArray.from_arrays([["user", "assistant"] * 150, picked], ["role", "content"])
    )
    with pytest.raises(InputError, match=r"a file of 5,000 bytes claims to hold .* values"):
        check_num_values([chats], 5000, "a.arrow")
    check_num_values([chats], 2**20, "a.arrow")
    check_num_values([picked], 5000, "a.arrow")
