"""Items become sequences through the tokenizer; what is left out is counted, what does not fit is named."""

import numpy as np
import pytest

from kdcache.capture.sequences import CutCounts, make_sequences
from kdcache.config.capture import InputConfig, WindowConfig
from kdcache.errors import InputError, MismatchError
from kdcache.format.record import ROLES
from kdcache.inputs.chat import Chat
from kdcache.inputs.content import Item, Start
from kdcache.teacher.fake import FakeTokenizer

TOKENIZER = FakeTokenizer()
BOS = 256


def make(content, vocab_size=1000, **fields):
    kind = {str: "text", list: "messages"}.get(type(content[0]), "ids")
    items = [
        Item(Chat(value) if isinstance(value, list) else value, f"x:{n}", Start(0, n, n)) for n, value in enumerate(content)
    ]
    input_format = "lines" if kind == "text" else "jsonl"
    config = InputConfig(format=input_format, paths=("x",), content=kind, **fields)
    return make_sequences(items, tokenizer=TOKENIZER, config=config, vocab_size=vocab_size)


def message(role, content):
    return {"role": role, "content": content}


def test_text_is_tokenised_with_or_without_special_tokens():
    (sequence,), counts = make(["ab"])
    assert sequence.input_ids_N.tolist() == [BOS, 97, 98]
    assert sequence.supervised_N.all()
    assert sequence.turn_starts.tolist() == [0]
    assert counts == CutCounts(num_sequences=1)
    (sequence,), _ = make(["ab"], add_special_tokens=False)
    assert sequence.input_ids_N.tolist() == [97, 98]


def test_empty_items_give_no_sequence_and_are_counted():
    sequences, counts = make(["a", "", "b"])
    assert [sequence.source for sequence in sequences] == ["x:0", "x:2"]
    assert counts.num_empty_items == 1


def test_assistant_positions_are_those_that_predict_the_assistants_tokens():
    chat = [message("user", "hi"), message("assistant", "yo"), message("user", "ok"), message("assistant", "")]
    (sequence,), _ = make([chat], supervise="assistant")
    predicted = [sequence.input_ids_N[t + 1] for t in sequence.positions_P]
    assert predicted == [ord("y"), ord("o"), 257, 257]  # 257 ends a turn
    assert not sequence.supervised_N[-1]
    (everything,), _ = make([chat])
    assert everything.supervised_N.all()
    assert ROLES[everything.roles_N[2]] == "user"
    assert everything.key != sequence.key


def test_windows_in_which_the_assistant_says_nothing_are_left_out_and_counted():
    chat = [message("user", "a" * 20), message("assistant", "yes")]
    sequences, counts = make([chat, chat[:1]], supervise="assistant", window=WindowConfig(size=10))
    assert sum(len(sequence.positions_P) for sequence in sequences) == 4
    assert counts.num_unsupervised == 2 + 3
    assert counts.num_sequences == len(sequences)


def test_truncated_tokens_are_counted():
    sequences, counts = make(["abcdef", "a"], window=WindowConfig(size=4, policy="truncate"))
    assert [sequence.num_tokens for sequence in sequences] == [4, 2]
    assert (counts.num_truncated_items, counts.num_truncated_tokens) == (1, 3)


def test_ids_are_taken_as_they_are_and_checked_against_the_vocabulary():
    (sequence,), _ = make([np.array([5, 999])])
    assert sequence.input_ids_N.tolist() == [5, 999]
    with pytest.raises(InputError, match="x:1: id 2 is 1000, outside the teacher's vocabulary of 1000"):
        make([np.array([1]), np.array([1, 2, 1000])])
    with pytest.raises(InputError, match="id 0 is -3"):
        make([np.array([-3])])


def test_a_tokenizer_that_is_not_the_teachers_is_named():
    with pytest.raises(MismatchError, match="tokenizer 'fake' gives the id 256, outside the teacher's vocabulary of 200"):
        make(["a"], vocab_size=200)


def test_accounts_add_up():
    account = CutCounts(1, 2, 3, 4, 5)
    account.add(CutCounts(10, 20, 30, 40, 50))
    assert account == CutCounts(11, 22, 33, 44, 55)
