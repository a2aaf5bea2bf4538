"""JSON in all its layouts and packings gives the same items, from any place on; what is wrong is said as what it is."""

import gzip
import json
import random
from pathlib import Path

import pytest
import zstandard

from kdcache.config.capture import InputConfig
from kdcache.errors import InputError
from kdcache.inputs.content import BEGINNING
from kdcache.inputs.formats import json_values, open_file
from kdcache.inputs.reader import ItemReader

ROWS = [
    {"text": text, "more": {"x": [1, "]}", {}]}}
    for text in ['a "quoted" } text', "\\", "", "two\nlines", "u\u2028n \u00e4" * 40]
]
LAYOUTS = {
    "lines": "".join(json.dumps(row) + "\n" for row in ROWS),
    "files one after another": "".join(f"\ufeff{json.dumps(row)}\n" for row in ROWS),
    "crlf": "\ufeff" + "\r\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS),
    "array": json.dumps(ROWS),
    "printed array": " \n" + json.dumps(ROWS, indent=2, ensure_ascii=False) + "\n",
    "array of lines": "\ufeff[\n" + ",\n".join(map(json.dumps, ROWS)) + "\n]\n",
    "one line": "".join(map(json.dumps, ROWS)),
    "old line ends": "\r".join(map(json.dumps, ROWS)),
    "printed objects": "\n".join(json.dumps(row, indent=2) for row in ROWS),
    "objects in a row": "".join(json.dumps(row, indent=1) for row in ROWS),
}
PACKINGS = {
    "plain": lambda data: data,
    "gzip": gzip.compress,
    "two gzip members": lambda data: gzip.compress(data[:99]) + gzip.compress(data[99:]),
    "zstd": zstandard.ZstdCompressor(write_checksum=True).compress,
    "zstd frames": lambda data: b"\x50\x2a\x4d\x18\x02\0\0\0hi" + b"".join(map(zstandard.compress, (data[:99], data[99:]))),
}


def reader(path: Path, **fields) -> ItemReader:
    return ItemReader(InputConfig(format="jsonl", paths=(str(path),), **fields))


def refusal(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    with pytest.raises(InputError) as caught:
        list(reader(path).items())
    return str(caught.value).removeprefix(str(path))


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_items_come_from_every_layout_and_packing_from_any_place_on(tmp_path, monkeypatch, layout, packing):
    path = tmp_path / "x.jsonl"  # a name that says nothing of the packing
    path.write_bytes(PACKINGS[packing](LAYOUTS[layout].encode()))
    for chunk_bytes in (4, 2**18):
        monkeypatch.setattr(json_values, "_CHUNK_BYTES", chunk_bytes)
        source = reader(path)
        items = list(source.items(BEGINNING))
        assert [item.content for item in items] == [row["text"] for row in ROWS]
        for number in random.Random(0).sample(range(len(items)), len(items)):
            assert list(source.items(items[number].start)) == items[number:]
            assert next(source.items(items[number].start)) == items[number]  # and the rest is not read
        source.close()


def test_one_object_is_one_item_and_an_empty_array_is_none(tmp_path):
    for data, wanted in (
        (b'{"text":\n "a"}', ["a"]),
        (b'{"text": "a"}', ["a"]),
        (b" [ ] \n", []),
        (b"", []),
        (gzip.compress(b""), []),
    ):
        (tmp_path / "x.json").write_bytes(data)
        assert [item.content for item in reader(tmp_path / "x.json").items()] == wanted


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b'[{"text": "a"}, {"text": "b"}', ": the file is cut off within its array, after 2 values"),
        (b'[{"text": "a"}, {"text": "b', "#1: not JSON: the file ends within this object"),
        (b'[{"text": "a"} {"text": "b"}]', ": not JSON: no comma after value 0 of the array"),
        (b'[{"text": "a"},]', "#1: expected a JSON object, which starts with '{', but found ']'"),
        (b'[{"text": "a"}, 7]', "#1: expected a JSON object, which starts with '{', but found '7]'"),
        (b'[{"text": "a"}]\n{"text": "b"}', ": not JSON: more text after the end of the array"),
        (b'[{"txt": "a"}]', "#0: no field 'text'; the line has 'txt' (see input.field); to leave this file out, name"),
        (b'{"text": "a"\n{"text": "b"}\n', ":1: not JSON: Input data was truncated"),
        (b'{"text": "a"}\n{"text": "b", "s": [1, NaN]}\n', ":2: field 's'[1] is NaN, which JSON does not allow (write null"),
        (b'[{"text": "a", "s": {"t": -Infinity}}]', "#0: field 's'.t is -Infinity, which JSON does not allow"),
        (b'{"text": "a", "s": 1e999}', ":1: field 's' is 1e999, a number out of range"),
        (b"NaN", ":1: the value is NaN, which JSON does not allow"),
        (b'{"\\udc00": 1}', ":1: a key holds \\udc00, a lone surrogate"),
        (b'{"text": "a"},\n{"text": "b"},\n', ":1: not JSON: JSON is malformed: trailing characters"),
        (b'{"text": "x\\ud800y"}', ":1: field 'text' holds \\ud800, a lone surrogate, which is half a character"),
        (b'{"a": [{"b": "\\udc00"}], "text": ""}', ":1: field 'a'[0].b holds \\udc00, a lone surrogate"),
        (b'{"text": "\xed\xa0\x80"}', ":1: not UTF-8 text (byte 0xed); convert the file to UTF-8"),
        (b"\xff\xfe{\0}\0", ": holds UTF-16 text: convert it to UTF-8"),
        (b"PK\x03\x04....", ": holds a zip archive: unpack it"),
        (b"BZh91AY&SY", ": holds bzip2 data: decompress it, or compress it with gzip or zstd"),
        (b"PAR1\x15\x00", ": holds a Parquet file: set input.format to 'parquet'"),
        (gzip.compress(gzip.compress(b"")), ": holds compressed twice: decompress it once"),
        (gzip.compress(b'{"text": "a"}\n' * 99)[:-9], ": not a whole gzip file: Truncated compressed stream"),
        (zstandard.compress(b'{"text": "a"}\n' * 99)[:-3], ": not a whole zstd file: "),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_as_what_it_is(tmp_path, data, sentence):
    assert refusal(tmp_path / "x.json", data).startswith(sentence)


def test_a_bomb_is_refused_and_a_long_line_too(tmp_path, monkeypatch):
    monkeypatch.setattr(open_file, "FREE_BYTES", 2**20)
    for data in (gzip.compress(b"\n" * 2**22), zstandard.compress(b'{"text": ""}\n' * 2**20)):
        assert "more than 250 bytes come out of each byte" in refusal(tmp_path / "x.jsonl", data)
    monkeypatch.setattr(open_file, "MAX_ITEM_BYTES", 2**10)
    monkeypatch.setattr(open_file, "MAX_INFLATED_ITEM_BYTES", 2**9)
    assert ":2: a line of more than 1,024 bytes" in refusal(
        tmp_path / "x.jsonl", b'{"text": ""}\n' + b'{"text": "' + b"a" * 2000
    )
    monkeypatch.setattr(json_values, "_CHUNK_BYTES", 100)
    assert ":1: a line of more than 512 bytes" in refusal(tmp_path / "x.jsonl", gzip.compress(b"a" * 600))
    assert "#0: an object of more than 1,024 bytes" in refusal(tmp_path / "x.jsonl", b'[{"text": "' + b"a" * 5000)


def test_texts_and_lines_are_decompressed_too(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"\xef\xbb\xbfone\r\ntwo"))
    for input_format, wanted in (("txt", ["one\r\ntwo"]), ("lines", ["one", "two"])):
        source = ItemReader(InputConfig(format=input_format, paths=(str(tmp_path),)))
        assert [item.content for item in source.items()] == wanted


def test_a_compressed_file_goes_forward_and_is_not_begun_anew(tmp_path, monkeypatch):
    path = tmp_path / "x.jsonl.zst"
    path.write_bytes(zstandard.compress("".join(json.dumps({"text": str(i)}) + "\n" for i in range(2000)).encode()))
    begun = []
    begin = open_file._Inflated._begin
    monkeypatch.setattr(open_file._Inflated, "_begin", lambda stream: (begun.append(1), begin(stream)))
    source = reader(path)
    items = list(source.items())
    begun.clear()
    for number in range(0, 2000, 100):
        assert next(source.items(items[number].start)) == items[number]
    assert len(begun) == 1
