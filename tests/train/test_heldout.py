import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kdcache.errors import InputError
from kdcache.teacher import load_tokenizer
from kdcache.train.evaluation.heldout import read_heldout

TOKENIZER = load_tokenizer("fake")


def _file(path: Path, *lines: str) -> Path:
    (path / "heldout.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return path / "heldout.jsonl"


def test_texts_become_windows_that_know_their_text_and_their_bytes(tmp_path: Path) -> None:
    ids = TOKENIZER.encode("abcdefgh", True)
    sequences = read_heldout(_file(tmp_path, '{"text": "abcdefgh"}', "", '{"text": "xy"}'), TOKENIZER, window=3)
    assert len(ids) == 9, "a BOS and a token per byte"
    assert [s.text for s in sequences] == [0, 0, 0, 1]
    assert [i for s in sequences if s.text == 0 for i in s.input_ids_N] == ids
    assert sequences[0].num_targets == 2
    assert [s.num_bytes for s in sequences] == [len(TOKENIZER.decode(list(s.input_ids_N[1:])).encode()) for s in sequences]


def test_ids_are_taken_as_they_are(tmp_path: Path) -> None:
    (sequence,) = read_heldout(_file(tmp_path, '{"input_ids": [1, 2, 3]}'), TOKENIZER, window=8)
    assert sequence.input_ids_N.tolist() == [1, 2, 3]


def test_a_leftover_of_one_token_is_left_out(tmp_path: Path) -> None:
    path = _file(tmp_path, '{"input_ids": [1, 2, 3, 4, 5]}', '{"input_ids": [6, 7]}', '{"input_ids": [8]}')
    assert [s.input_ids_N.tolist() for s in read_heldout(path, TOKENIZER, window=4)] == [[1, 2, 3, 4], [6, 7]]


def test_max_tokens_keeps_windows_from_the_whole_file(tmp_path: Path) -> None:
    path = _file(tmp_path, *(f'{{"input_ids": {list(range(number, number + 40))}}}' for number in range(10)))
    kept = read_heldout(path, TOKENIZER, window=4, max_tokens=100)
    assert sum(len(s.input_ids_N) for s in kept) == 100
    assert {s.text for s in kept} == set(range(10))
    assert len(read_heldout(path, TOKENIZER, window=4, max_tokens=400)) == 100


def test_max_tokens_below_a_window_gives_one_short_window(tmp_path: Path) -> None:
    path = _file(tmp_path, '{"input_ids": [1, 2, 3, 4, 5, 6, 7]}')
    (sequence,) = read_heldout(path, TOKENIZER, window=6, max_tokens=3)
    assert len(sequence.input_ids_N) == 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", "not JSON"),
        ("[1, 2]", "holds a list, but a JSON object"),
        ('{"body": "x"}', "neither 'text' nor 'input_ids'; the item has 'body'"),
        ('{"text": 5}', r"field 'text' is 5 \(int\)"),
        ('{"input_ids": [1, 99999999]}', "token id 99999999 is not one of the vocabulary's"),
        ('{"input_ids": [1, -1]}', r"\[1\] is -1"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path: Path, line: str, message: str) -> None:
    path = _file(tmp_path, '{"text": "fine"}', line)
    with pytest.raises(InputError, match=rf"heldout\.jsonl:2: .*{message}"):
        read_heldout(path, TOKENIZER, window=8)


def test_a_missing_and_an_empty_file_are_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.jsonl: .* cannot be read: it does not exist \(.* heldout\.data; null"):
        read_heldout(tmp_path / "nowhere.jsonl", TOKENIZER, window=8)
    with pytest.raises(InputError, match="no row has the two tokens"):
        read_heldout(_file(tmp_path, ""), TOKENIZER, window=8)


def test_heldout_text_is_read_by_the_reader_of_training_text(tmp_path: Path) -> None:
    rows = [{"text": "abcdefgh"}, {"text": "xyz"}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    wanted = [s.input_ids_N.tolist() for s in read_heldout(_file(tmp_path, lines), TOKENIZER, window=4)]
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbf" + lines.replace("\n", "\r\n").encode())
    (tmp_path / "b").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "c").write_text(json.dumps(rows, indent=1))
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, tmp_path / "d")
    with pa.ipc.new_file(tmp_path / "e", table.schema) as file, pa.ipc.new_stream(tmp_path / "f", table.schema) as stream:
        file.write_table(table)
        stream.write_table(table)
    for name in "abcdef":
        assert [s.input_ids_N.tolist() for s in read_heldout(tmp_path / name, TOKENIZER, window=4)] == wanted, name
