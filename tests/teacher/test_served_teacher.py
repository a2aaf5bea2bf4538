"""The served teacher against a small real HTTP server: every promise of a teacher, and each fault a server can have."""

from __future__ import annotations

import json
import threading
import time
import tracemalloc
from collections import deque
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from completions_server import VOCAB_SIZE, CompletionsServer, Manners
from contracts.teacher import PROMISES, TeacherCase, closing, make_sequence, random_sequences, score, top_k
from msgspec.structs import replace

from kdcache.errors import ConfigError, TeacherError
from kdcache.format.manifest import SelectionInfo
from kdcache.teacher.served import teacher as _served

pytest.importorskip("httpx2")


@pytest.fixture
def server() -> Iterator[CompletionsServer]:
    server = CompletionsServer()
    yield server
    server.close()


@pytest.fixture(scope="module", params=["prompt_logprobs", "echo"])
def case(request: pytest.FixtureRequest) -> Iterator[TeacherCase]:
    server = CompletionsServer(Manners(understands=(request.param,)))
    teacher = server.teacher()
    yield TeacherCase(teacher, server.model.dense_logprobs, 1e-6, lambda: server.teacher().identity)
    closing(TeacherCase(teacher, server.model.dense_logprobs, 1e-6))
    server.close()


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.__name__)
def test_the_served_teacher_keeps_every_promise(promise: Callable[[TeacherCase], None], case: TeacherCase):
    promise(case)


def case_of(server: CompletionsServer, /, **changes: object) -> TeacherCase:
    return TeacherCase(server.teacher(**changes), server.model.dense_logprobs, 1e-6)


def refused(server: CompletionsServer, error: type[Exception] = TeacherError, /, **changes: object) -> str:
    """What is said when the teacher cannot be had; nothing is left running."""
    before = num_clients()
    with pytest.raises(error) as caught:
        server.teacher(**changes)
    assert num_clients() == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def num_clients() -> int:
    return sum(thread.name == "kdcache-server-client" for thread in threading.enumerate())


def test_it_says_who_answers_and_what_is_not_known(server: CompletionsServer):
    identity = server.teacher().identity
    assert (identity.engine, identity.engine_version, identity.model) == ("served", "7.7", "fake")
    assert identity.engine_options == {"served_model": "served-fake", "system_fingerprint": "stub-1"}
    assert (identity.dtype, identity.weights_digest, identity.context_length) == ("unknown", None, 100)
    told = server.teacher(dtype="bfloat16", quantization="fp8").identity
    assert (told.dtype, told.quantization) == ("bfloat16", "fp8")


def test_prompts_are_sent_as_ids_and_nothing_of_the_servers_defaults_is_left_in_force(server: CompletionsServer):
    score(case_of(server), [make_sequence([5, 6, 7])])
    body = server.bodies[-1]
    assert body["prompt"] == [5, 6, 7]
    sent = {name: body[name] for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens")}
    assert sent == {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "max_tokens": 1}


def test_many_requests_are_in_flight_but_not_more_than_may_be_and_answers_keep_their_order(server: CompletionsServer):
    case = case_of(server, server={"concurrency": 3})
    server.manners.wait_seconds = 0.02
    sequences = random_sequences(case, [3, 30, 1, 17, 8, 2, 25, 9, 4, 60, 5, 6])
    for sequence, answer in zip(sequences, score(case, sequences), strict=True):
        dense_NV = case.dense(sequence)
        rows_E = np.repeat(np.arange(answer.num_positions), answer.num_entries_P)
        np.testing.assert_allclose(answer.logprobs_E, dense_NV[rows_E, answer.token_ids_E], atol=1e-6)
    assert server.most_in_flight == 3


def test_what_may_pass_is_asked_again(server: CompletionsServer):
    case = case_of(server)
    sequences = random_sequences(case, [12, 3, 40, 7, 9, 22, 31, 5])
    expected = score(case, sequences)
    asked = len(server.bodies)
    server.manners.faults.extend(["reset", "cut", "500", "502", "503", "429", "408", "wait 0"])
    for answer, before in zip(score(case, sequences), expected, strict=True):
        np.testing.assert_array_equal(answer.logprobs_E, before.logprobs_E)
    assert len(server.bodies) == asked + 2 * len(sequences)


def test_a_silent_server_is_asked_again(server: CompletionsServer):
    case = case_of(server, server={"timeout_seconds": 0.3})
    score(case, random_sequences(case, [5]))
    asked = len(server.bodies)
    server.manners.faults.append("hang")
    score(case, random_sequences(case, [5]))
    assert len(server.bodies) == asked + 2


def test_a_wait_that_the_server_asks_for_is_kept(server: CompletionsServer):
    case = case_of(server)
    score(case, random_sequences(case, [5]))
    started = time.monotonic()
    server.manners.faults.append("wait 1")
    score(case, random_sequences(case, [5]))
    assert time.monotonic() - started >= 1.0


def test_a_wait_past_the_deadline_ends_it_at_once(server: CompletionsServer):
    case = case_of(server, server={"deadline_seconds": 2.0})
    score(case, random_sequences(case, [5]))
    server.manners.faults.append("wait 3600")
    with pytest.raises(TeacherError, match=r"3600 seconds later, past teacher\.server\.deadline_seconds, 2.*Too Many Requests"):
        score(case, random_sequences(case, [5]))


def test_a_server_that_stays_broken_is_given_up_in_one_sentence_and_must_be_found_again(server: CompletionsServer):
    case = case_of(server, server={"retries": 1})
    score(case, random_sequences(case, [5]))
    server.manners.faults.extend(["503"] * 2)
    sentence = r"was asked 2 times .*server\.retries is 1.*status 503: Service Unavailable"
    with pytest.raises(TeacherError, match=sentence) as caught:
        score(case, random_sequences(case, [5]))
    assert "\n" not in str(caught.value)
    with pytest.raises(TeacherError, match="is closed"):
        score(case, random_sequences(case, [5]))
    score(case_of(server), random_sequences(case, [5]))


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("endless", "an answer of more than 4,"),
        ("endless nothing", "an answer of more than 4,"),
        ("bomb", "an answer of more than 4,"),
        ("bomb in a bomb", "compresses its answers with 'gzip, gzip'"),
        ("other compression", "compresses its answers with 'zstd'"),
        ("deep", "not a completion with logprobs"),
        ("deep and ignored", "nested too deep"),
        ("drip", "no answer before the deadline"),
        ("long header", "the last time"),
        ("many headers", "the last time"),
    ],
)
def test_an_answer_without_end_is_refused_after_as_many_bytes_as_were_asked_for(
    server: CompletionsServer, fault: str, sentence: str
):
    case = case_of(server, server={"retries": 0, "deadline_seconds": 1.0 if fault == "drip" else 60.0})
    score(case, random_sequences(case, [5]))
    server.manners.faults.append(fault)
    peak = tracemalloc_peak(lambda: score(case, random_sequences(case, [5])), sentence)
    assert peak < 40e6


def tracemalloc_peak(run: Callable[[], object], sentence: str) -> int:
    """Bytes that were held at most while something ended in a TeacherError that says this."""
    tracemalloc.start()
    try:
        with pytest.raises(TeacherError, match=sentence) as caught:
            run()
        assert len(str(caught.value)) < 500
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "choice",
    [
        {"logprobs": {"tokens": ["token_id:1"] * 9, "top_logprobs": []}},
        {"logprobs": {"tokens": [f"token_id:{'9' * 5000}"] * 9, "top_logprobs": [None]}},
        {"prompt_logprobs": [None] + [{}] * 7, "logprobs": {"tokens": ["token_id:1"], "top_logprobs": [{}]}},
        {"prompt_logprobs": [None] + [{str(2**40): {"logprob": -1.0}}] * 7},
        {"prompt_logprobs": []},
    ],
)
def test_answers_of_odd_rows_are_one_sentence(server: CompletionsServer, choice: dict[str, object]):
    for api in ("prompt_logprobs", "echo"):
        server.manners.faults = deque(["answers " + json.dumps({"choices": [choice]})] * 5)
        refused(server, server={"api": api})


def test_lists_of_models_that_are_none_are_one_sentence(server: CompletionsServer):
    server.manners.models = ({"id": "x" * 5000}, *({"id": f"m{number}"} for number in range(1000)))
    assert len(refused(server, ConfigError)) < 1000


def test_a_server_that_is_gone_is_one_sentence(server: CompletionsServer):
    case = case_of(server, server={"retries": 1})
    server.stop()
    with pytest.raises(TeacherError, match=rf"the server {server.url} was asked 2 times.*the last time: .*onnect"):
        score(case, random_sequences(case, [5]))
    assert "was asked 1 time " in refused(server, server={"retries": 0})


def test_a_refused_request_is_not_sent_again_and_spares_the_teacher(server: CompletionsServer):
    case = case_of(server)
    score(case, random_sequences(case, [5]))
    asked = len(server.bodies)
    server.manners.faults.append("422")
    with pytest.raises(TeacherError, match=r"test#9: the server .* refused it, status 422: so it is"):
        score(case, random_sequences(case, [9]))
    assert len(server.bodies) == asked + 1
    score(case, random_sequences(case, [9]))


def test_a_k_beyond_the_servers_limit_is_refused_before_anything_is_computed(server: CompletionsServer):
    server.manners.max_logprobs = 20
    case = case_of(server)
    sentence = r"selection\.k is 64, .*greater than max allowed: 20; set selection\.k to 20 or less, .*--max-logprobs 64"
    with pytest.raises(ConfigError, match=sentence):
        case.teacher.score(random_sequences(case, [5]), top_k(64))
    assert score(case, random_sequences(case, [5]), 20)[0].num_entries == 5 * 20


def test_a_server_that_gives_fewer_entries_without_a_word_is_refused(server: CompletionsServer):
    server.manners.max_logprobs, server.manners.caps = 5, True
    case = case_of(server)
    for k in (6, 7, 8, 100):  # one too many looks right wherever the token that came is outside
        with pytest.raises(ConfigError, match=r"gives fewer: .*; set selection\.k to 5 or less"):
            case.teacher.score(random_sequences(case, [40]), top_k(k))
    assert score(case, random_sequences(case, [5]), 5)[0].num_entries == 25


def test_advice_about_k_is_proven_before_it_is_given(server: CompletionsServer, monkeypatch: pytest.MonkeyPatch):
    server.manners.max_logprobs = 20
    case = case_of(server)
    monkeypatch.setattr(_served, "limit_in", lambda sentence: 30)  # as of a sentence about something else
    with pytest.raises(ConfigError, match=r"max allowed: 20; set a smaller selection\.k, or start"):
        case.teacher.score(random_sequences(case, [5]), top_k(64))


def test_the_servers_own_words_are_shown_whatever_status_it_gives_them(server: CompletionsServer):
    case = case_of(server, server={"retries": 1})
    sequences = random_sequences(case, [9])
    expected = score(case, sequences)
    page = "<!DOCTYPE html><html><head><title>Sign in</title><style>b {}</style></head><b>to go &amp; on</b></html>"
    error = json.dumps({"error": {"message": "upstream timeout"}})
    server.manners.faults.extend([f"answers {error}", "", f"answers {page}", ""])
    for _ in range(2):  # which may pass
        np.testing.assert_array_equal(score(case, sequences)[0].logprobs_E, expected[0].logprobs_E)
    for body, sentence in (
        ({"error": {"message": "The prompt is too long", "code": 400}}, "status 200 with an error: The prompt is too long"),
        ({"object": "error", "message": "no such model", "code": 404}, "status 200 with an error: no such model"),
    ):
        server.manners.faults.append("answers " + json.dumps(body))
        with pytest.raises(TeacherError, match=sentence):
            score(case, sequences)
    server.manners.faults.append("moved https://elsewhere.example/v1/completions")
    with pytest.raises(TeacherError, match=r"status 307 \(it redirects to https://elsewhere\.example/v1/completions: set"):
        score(case, sequences)
    server.manners.faults.extend([f"answers {page}"] * 2)
    with pytest.raises(TeacherError, match="the last time: an answer that is not JSON: Sign in to go & on"):
        score(case, sequences)


def test_only_top_k_can_be_had(server: CompletionsServer):
    case = case_of(server)
    asked = len(server.bodies)
    sequences = random_sequences(case, [5])
    sampled = SelectionInfo(kind="sampled", params={"num_draws": 5, "seed": 0})
    for selection in (sampled, replace(top_k(5), temperatures=(2.0,)), replace(top_k(5), entropy=True)):
        with pytest.raises(ConfigError, match="the served teacher gives only the k most probable tokens"):
            case.teacher.score(sequences, selection)
    assert len(server.bodies) == asked


def test_a_server_without_logprobs_of_prompts_is_refused(server: CompletionsServer):
    server.manners.understands = ()
    assert "gives no logprobs of a prompt, asked by prompt_logprobs and by echo" in refused(server)
    server.manners.understands = ("echo",)
    assert "asked by prompt_logprobs;" in refused(server, server={"api": "prompt_logprobs"})


@pytest.mark.parametrize("api", ["prompt_logprobs", "echo"])
def test_a_server_that_names_tokens_by_their_text_is_refused(server: CompletionsServer, api: str):
    server.manners.names_ids = False
    assert "names tokens by their text" in refused(server, server={"api": api})


def test_a_temperature_in_the_prompts_logprobs_is_found_and_refused(server: CompletionsServer):
    server.manners.temperature_in = ("prompt", "generated")
    assert "logprobs of a prompt change by" in refused(server)


def test_a_temperature_in_the_generated_row_alone_is_harmless_as_1_is_sent(server: CompletionsServer):
    server.manners.temperature_in = ("generated",)
    case = case_of(server)
    (sequence,) = random_sequences(case, [9])
    (answer,) = score(case, [sequence], VOCAB_SIZE)
    ids_PK, logprobs_PK = answer.padded()
    np.testing.assert_allclose(logprobs_PK, np.take_along_axis(case.dense(sequence), ids_PK.astype(int), axis=-1), atol=1e-6)


def test_a_generated_row_of_another_temperature_is_found_and_refused(server: CompletionsServer):
    server.manners.sharpens = 1.3
    assert "a sequence's last position would be wrong; start vLLM with --logprobs-mode raw_logprobs" in refused(server)


def test_numbers_that_are_no_logprobs_are_refused(server: CompletionsServer):
    case = case_of(server)
    server.manners.sharpens = 0.2  # of a model whose logits are flat
    with pytest.raises(TeacherError, match=r"test#9: the server's numbers are not logprobs .* sum to"):
        score(case, random_sequences(case, [9]), 64)


def test_another_tokenizer_is_refused_and_an_unknown_one_warned_of(server: CompletionsServer, caplog: pytest.LogCaptureFixture):
    server.manners.tokenizes = "otherwise"
    assert "has another tokenizer than 'fake': token 3 of the same text is 7 there and" in refused(server)
    for manner, sentence in (
        ("no", "does not say how it tokenizes (/tokenize, as in vLLM), so whether it is as 'fake' does is not known"),
        ("special otherwise", "reads special tokens differently from 'fake' (token 3 of the same text is 7 there"),
    ):
        server.manners.tokenizes = manner
        caplog.clear()
        case_of(server)
        assert sentence in caplog.text
        assert "teacher.strict forbids continuing" in refused(server, strict=True)


def test_the_key_comes_from_the_environment_and_is_in_no_message(
    server: CompletionsServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    server.manners.key = "sk-right"
    assert "api_key_env names the environment variable" in refused(server, ConfigError)
    assert "'MY_KEY' is not set" in refused(server, ConfigError, server={"api_key_env": "MY_KEY"})
    monkeypatch.setenv("MY_KEY", "sk-wrong")
    with caplog.at_level("DEBUG"):
        sentence = refused(server, ConfigError, server={"api_key_env": "MY_KEY"})
        assert "status 401: Unauthorized: 'Bearer ***'" in sentence  # this server repeats what it was sent
        monkeypatch.setenv("MY_KEY", "sk-right")
        case = case_of(server, server={"api_key_env": "MY_KEY"})
        score(case, random_sequences(case, [5]))
    assert "sk-" not in caplog.text
    assert "sk-" not in repr(case.teacher.identity)


def test_the_model_is_found_by_its_name(server: CompletionsServer):
    other = {"id": "/srv/models/other", "max_model_len": 50}
    server.manners.models = (*server.manners.models, other)
    assert "serves 'served-fake', '/srv/models/other'; name the teacher" in refused(server, ConfigError)
    assert "model is 'mine', but the server" in refused(server, ConfigError, server={"model": "mine"})
    identity = server.teacher(server={"model": "/srv/models/other"}).identity
    assert (identity.engine_options["served_model"], identity.context_length) == ("other", 49)
    server.manners.models = ()
    assert "serves no model" in refused(server, ConfigError)
    server.manners.models = ({"id": "silent"},)
    assert "teacher.server.context_length is not given" in refused(server, ConfigError)
    assert server.teacher(server={"context_length": 64}).identity.context_length == 64


def test_a_server_that_becomes_another_is_noticed_in_the_middle(server: CompletionsServer):
    case = case_of(server)
    answers = case.teacher.score(random_sequences(case, [5] * 60), top_k(4))
    next(answers)
    server.manners.fingerprint = "stub-2"
    with pytest.raises(TeacherError, match=r"'stub-2'.* now, and was .*'stub-1'.* at the start"):
        list(answers)


def test_an_iterator_that_is_dropped_takes_its_requests_with_it(server: CompletionsServer):
    case = case_of(server, server={"concurrency": 1, "timeout_seconds": 60.0})
    score(case, random_sequences(case, [5]))
    server.manners.faults = deque(["", "hang"])
    answers = case.teacher.score(random_sequences(case, [5] * 30), top_k(8))
    next(answers)
    while server.in_flight == 0:  # the one that hangs for half a minute
        time.sleep(0.01)
    asked, started = len(server.bodies), time.monotonic()
    del answers
    score(case, random_sequences(case, [5]))  # through the only slot
    assert time.monotonic() - started < 20
    assert len(server.bodies) == asked + 1


def test_closing_does_not_wait_for_the_server(server: CompletionsServer):
    case = case_of(server, server={"timeout_seconds": 60.0})
    score(case, random_sequences(case, [5]))
    server.manners.faults.extend(["", "hang", "hang"])
    answers = case.teacher.score(random_sequences(case, [5] * 3), top_k(8))
    next(answers)
    started = time.monotonic()
    case.teacher.close()
    assert time.monotonic() - started < 20


def test_a_teacher_closed_in_the_middle_says_so(server: CompletionsServer):
    case = case_of(server, server={"concurrency": 1})
    answers = case.teacher.score(random_sequences(case, [5] * 9), top_k(4))
    next(answers)
    case.teacher.close()
    with pytest.raises(TeacherError, match="was closed while it was being asked"):
        list(answers)
