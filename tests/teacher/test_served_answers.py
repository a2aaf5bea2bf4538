"""What a server's answer means, from its bytes to rows: as vLLM 0.32 writes it, and as it should not be."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import numpy as np
import pytest
from contracts.teacher import make_sequence

from kdcache.errors import TeacherError
from kdcache.teacher.served.answers import (
    check_normalised,
    completion_request,
    read_answer,
    read_completion,
    speaks,
    split_entries,
)

PROMPT = [5, 6, 7]
ROWS = [{6: -10.02, 15: -2.29, 405: -2.59}, {7: -0.3, 411: -1.5}]
"""k = 2: token 6 came and is not among the two most probable; token 7 is."""
LAST = {253: -3.5, 411: -0.43, 278: -2.58}


def entries(row: dict[int, float]) -> dict[str, Any]:
    return {str(token): {"logprob": nats, "rank": 3, "decoded_token": "x"} for token, nats in row.items()}


def older(rows: list[dict[int, float] | None], tokens: list[int]) -> dict[str, Any]:
    tops = [None if row is None else {f"token_id:{token}": nats for token, nats in row.items()} for row in rows]
    return {"tokens": [f"token_id:{token}" for token in tokens], "token_logprobs": [], "text_offset": [], "top_logprobs": tops}


def answer_of(api: str, rows: list[dict[int, float]] = ROWS, last: dict[int, float] = LAST, **more: Any) -> bytes:
    if api == "prompt_logprobs":
        choice = {"prompt_logprobs": [None, *map(entries, rows)], "logprobs": older([last], [253])}
    else:
        choice = {"logprobs": older([None, *rows, last], [*PROMPT, 253]), "prompt_logprobs": None}
    return json.dumps(
        {"id": "cmpl-1", "model": "m", "choices": [{"index": 0, "text": "?"} | choice | more], "usage": {}}
    ).encode()


def read(data: bytes, api: str, k: int = 2) -> Any:
    return read_answer(read_completion(data), api, make_sequence(PROMPT), k)


@pytest.mark.parametrize("api", ["prompt_logprobs", "echo"])
def test_the_token_that_came_is_taken_out_where_it_is_one_too_many(api: str):
    answer = read(answer_of(api), api)
    assert answer.token_ids_E.reshape(3, 2).tolist() == [[15, 405], [7, 411], [411, 278]]
    np.testing.assert_allclose(answer.logprobs_E, [-2.29, -2.59, -0.3, -1.5, -0.43, -2.58])
    np.testing.assert_allclose(answer.outside_target_logprobs, [-10.02], rtol=1e-6)


def test_what_servers_write_for_minus_infinity_is_read_as_that():
    answer = read(answer_of("echo", [{6: -9999.0, 15: 0.0, 405: -9999.0}, {7: -0.3, 411: -1.5}]), "echo")
    assert answer.logprobs_E[:2].tolist() == [0.0, -np.inf]
    assert answer.outside_target_logprobs.tolist() == [-np.inf]


def test_a_whole_vocabulary_has_no_entry_too_many():
    assert split_entries({1: -1.0, 2: -2.0, 3: -3.0}, came=3, k=3) == ({1: -1.0, 2: -2.0, 3: -3.0}, -3.0)


def test_rows_that_are_not_the_most_probable_and_the_one_that_came_are_refused():
    with pytest.raises(TeacherError, match="token 9 came, and is not among them"):
        split_entries({1: -1.0, 2: -2.0}, came=9, k=2)
    with pytest.raises(TeacherError, match=r"gives 3 tokens at a position, .* where selection\.k asks for 4"):
        split_entries({1: -1.0, 2: -2.0, 3: -3.0}, came=3, k=4)
    with pytest.raises(TeacherError, match="are not the 2 most probable"):
        split_entries({1: -1.0, 2: -2.0, 3: -0.5}, came=3, k=2)
    with pytest.raises(TeacherError, match="4 tokens at a position, which are not the 2"):
        split_entries({1: -1.0, 2: -2.0, 3: -3.0, 4: -4.0}, came=4, k=2)
    # A tie for the last place is the engine's to decide.
    assert split_entries({1: -1.0, 2: -2.0, 3: -2.0}, came=3, k=2) == ({1: -1.0, 2: -2.0}, -2.0)


@pytest.mark.parametrize("api", ["prompt_logprobs", "echo"])
def test_answers_that_belong_to_another_text_are_refused(api: str):
    with pytest.raises(TeacherError, match="gave logprobs of 5 positions for the 3 tokens"):
        read(answer_of(api, ROWS * 2), api)
    with pytest.raises(TeacherError, match="token 6 came"):
        read(answer_of(api, [{15: -2.29, 405: -2.59}, {7: -0.3, 411: -1.5}]), api)


def test_an_echo_of_other_tokens_is_refused():
    data = answer_of("echo").replace(b'"token_id:5"', b'"token_id:8"')
    with pytest.raises(TeacherError, match=r"the server read \[8, 6, 7\], and not the prompt \[5, 6, 7\]"):
        read(data, "echo")


def test_tokens_named_by_their_text_are_refused():
    data = answer_of("echo").replace(b"token_id:405", b"token")
    with pytest.raises(TeacherError, match="names tokens by their text"):
        read(data, "echo")


def test_a_position_without_logprobs_is_refused():
    data = answer_of("prompt_logprobs", prompt_logprobs=[None, None, entries(ROWS[1])])
    with pytest.raises(TeacherError, match="no logprobs for position 0"):
        read(data, "prompt_logprobs")


def test_answers_cut_off_and_answers_of_another_kind_are_told_apart():
    data = answer_of("echo")
    for length in (0, 1, 20, len(data) - 1):
        with pytest.raises(msgspec.DecodeError):
            read_completion(data[:length])
    for other in (b"[]", b'{"error": {"message": "no"}}', answer_of("echo").replace(b"-2.29", b"null")):
        with pytest.raises(TeacherError, match="not a completion with logprobs"):
            read_completion(other)


def test_what_a_server_passes_over_is_seen():
    plain = read_completion(b'{"choices": [{"text": "?", "logprobs": {"tokens": ["a"], "top_logprobs": [{"a": -1}]}}]}')
    assert not speaks(plain, "prompt_logprobs")
    assert not speaks(plain, "echo")
    assert not speaks(read_completion(b'{"choices": []}'), "echo")
    assert speaks(read_completion(answer_of("echo")), "echo")


def test_numbers_that_cannot_be_part_of_a_distribution_are_refused():
    check_normalised(np.log(np.array([[0.5, 0.5], [1.0, 0.0005]], np.float32)))
    check_normalised(np.empty((0, 2), np.float32))
    for bad in ([[-0.1, -0.1]], [[500.0, 1e30]], [[0.01, -9.0]]):
        with pytest.raises(TeacherError, match="are not logprobs over the vocabulary"):
            check_normalised(np.array(bad, np.float32))


def test_the_older_api_is_sent_nothing_that_it_does_not_know():
    known = {"model", "prompt", "max_tokens", "logprobs", "temperature", "top_p", "echo", "return_tokens_as_token_ids"}
    assert set(completion_request("echo", "m", [1, 2], 5)) == known


def test_no_seed_is_sent_for_it_would_end_a_vllm_on_cpus():
    for api in ("prompt_logprobs", "echo"):
        assert "seed" not in completion_request(api, "m", [1, 2], 5)


@pytest.mark.parametrize("token", [-1, -(2**63), 2**31, 2**40])
def test_an_id_that_no_vocabulary_has_is_refused(token: int):
    rows = [{6: -0.1, token: -3.0}, {7: -0.3, 411: -1.5}]
    with pytest.raises(TeacherError, match=f"names token {token}, an id that no vocabulary has"):
        read(answer_of("prompt_logprobs", rows, {253: -0.5, 411: -1.0}), "prompt_logprobs")
