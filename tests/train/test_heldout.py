from pathlib import Path

import pytest

from kdcache.errors import InputError
from kdcache.teacher import load_tokenizer
from kdcache.train.heldout import read_heldout

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
        ("not json", "expected a JSON object"),
        ("[1, 2]", "expected a JSON object"),
        ('{"body": "x"}', r"found the keys \['body'\]"),
        ('{"text": 5}', "expected a string `text`"),
        ('{"input_ids": [1, 99999999]}', "a list of ids below"),
        ('{"input_ids": [1, -1]}', "a list of ids below"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path: Path, line: str, message: str) -> None:
    path = _file(tmp_path, '{"text": "fine"}', line)
    with pytest.raises(InputError, match=rf"heldout\.jsonl:2: .*{message}"):
        read_heldout(path, TOKENIZER, window=8)


def test_a_missing_and_an_empty_file_are_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.jsonl: held-out data cannot be read: No such file"):
        read_heldout(tmp_path / "nowhere.jsonl", TOKENIZER, window=8)
    with pytest.raises(InputError, match="no line has the two tokens"):
        read_heldout(_file(tmp_path, ""), TOKENIZER, window=8)
