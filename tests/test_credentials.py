"""What counts as a secret, by name and by look, and that what is printed goes without."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcache.config.capture import CaptureConfig
from kdcache.config.load import convert_config
from kdcache.config.secrets import without_secrets
from kdcache.config.teacher import TeacherConfig
from kdcache.config.train import TrainConfig
from kdcache.credentials import MASK, find_secret, is_secret_name, masked, remember
from kdcache.errors import ConfigError
from kdcache.shown import as_printed, shown

SECRET_NAMES = """
token hf_token use_auth_token api_key apiKey API_KEY key secret aws_secret_access_key AWS_SESSION_TOKEN password
sas_token X-Amz-Signature X-Amz-Security-Token Signature sig account_key connection_string Authorization Cookie HF_TOKEN
OPENAI_API_KEY client_secret refresh_token access_token private_key auth credentials secret_key AccountKey access_key passphrase
http_proxy_password adlsSasToken Ocp-Apim-Subscription-Key"""
PLAIN_NAMES = """
tokenizer max_tokens token_ids pad_token eos_token_id bos_token api_key_env trust_remote_code tokenizer_mode keys
num_speculative_tokens kv_cache_dtype max_num_batched_tokens author tokens password_file credentials_path monkey compat path
SSH_AUTH_SOCK hf_overrides context_length add_special_tokens endpoint_url authors sasquatch signatures_per_row design"""
LOOKS = (
    "hf_" + "aB3" * 12, "sk-proj-" + "x" * 30, "AKIA" + "Z" * 16, "ghp_" + "a1" * 18, "github_pat_" + "b" * 30,
    "glpat-" + "c" * 20,
    "eyJhbGciOiJI.eyJzdWIiOiIx.c2ln", "-----BEGIN RSA PRIVATE KEY-----", "https://me:pw@host/x", "s3://key:secret@bucket/x",
    "https://b.s3.amazonaws.com/x?X-Amz-Expires=9&X-Amz-Signature=0a1b", "https://a.blob.core.windows.net/x?sv=2&sig=abc%3D",
    "http://host/v1?token=abc", "DefaultEndpointsProtocol=https;AccountKey=abcdefgh==;", "Authorization: Bearer abcdefgh",
)  # fmt: skip
PLAIN = (
    "Qwen/Qwen3-0.6B",
    "s3://bucket/a@b/c",
    "me@example.org",
    "hf_overrides",
    "sk-learn",
    "data/x=1?y",
    "https://host:8000/v1",
)


def test_names():
    assert [name for name in SECRET_NAMES.split() if not is_secret_name(name)] == []
    assert [name for name in PLAIN_NAMES.split() if is_secret_name(name)] == []


@pytest.mark.parametrize("text", LOOKS)
def test_what_looks_like_a_secret_is_masked_and_found_however_deep(text: str):
    assert MASK in masked(f"the store said {text!r}")
    assert masked(masked(text)) == masked(text)
    assert find_secret({"a": [{"b": text}]}) == "a[0].b"
    assert "a name in" in str(find_secret({"a": {text: 1}}))
    assert MASK in shown(text)
    assert MASK in as_printed(f'{{"a": "{text}"}}')


@pytest.mark.parametrize("text", PLAIN)
def test_what_is_none_stays(text: str):
    assert masked(text) == text
    assert find_secret({"a": text}) is None


def test_by_name_any_text_below_it_is_a_secret_and_no_switch():
    assert find_secret({"hub_kwargs": {"token": "x"}}, path="engine_options") == "engine_options.hub_kwargs.token"
    assert find_secret({"headers": {"auth": {"user": "me"}}}) == "headers.auth.user"
    assert find_secret({"use_auth_token": True, "token": None, "secret": "", "pad_token": "<pad>"}) is None


def test_what_is_remembered_and_what_the_environment_holds_is_masked(monkeypatch: pytest.MonkeyPatch):
    remember({"client_kwargs": {"aws_secret": "Tr0ub4dor"}, "endpoint_url": "http://plain.example"})
    monkeypatch.setenv("SOME_API_KEY", "c0rrect-horse")
    assert shown("said Tr0ub4dor, c0rrect-horse, http://plain.example") == f"said {MASK}, {MASK}, http://plain.example"


@pytest.mark.parametrize(
    "text", ["secret='{}'", "secret={}", "{{'secret': '{}'}}", '{{"token": "{}"}}', "argument 'secret:{}'"]
)
def test_pairs_that_a_library_repeats_are_masked(text: str):
    assert shown(text.format(SECRET)) == text.format(MASK)
    assert find_secret({"options": {f"secret:{SECRET}": None}}) is not None


@pytest.mark.parametrize("piece", ["x", "eyJ", "a.", "?a", "://", "key:", "-----BEGIN A", "sk-"])
def test_a_long_text_takes_no_long_time(piece: str):
    started = time.process_time()
    shown(piece * (10**6 // len(piece)))
    assert time.process_time() - started < 2


def test_a_partition_s_name_is_no_secret():
    assert find_secret({"paths": ["data/key=abcdefgh/part-0.parquet"]}) is None


@given(st.text(max_size=60))
def test_masking_is_done_once(text: str):
    assert masked(masked(text)) == masked(text)


CAPTURE = {
    "input": {"format": "lines", "paths": ["a.txt"]},
    "teacher": {"model": "fake", "backend": "fake"},
    "out": "cache",
}
TRAIN = {"cache": "cache", "out": "run", "steps": 1, "student": {"model": "x"}}
SECRET = "S3CRET-of-mine"


@pytest.mark.parametrize(
    ("where", "fields"),
    [
        ("teacher.engine_options.use_auth_token", {"teacher": {"model": "x", "engine_options": {"use_auth_token": SECRET}}}),
        ("engine_options.hub_kwargs.token", {"teacher": {"model": "x", "engine_options": {"hub_kwargs": {"token": SECRET}}}}),
        ("engine_options.api_key", {"teacher": {"model": "x", "engine_options": {"api_key": SECRET}}}),
        ("engine_options.env.AWS_SECRET", {"teacher": {"model": "x", "engine_options": {"env": {"AWS_SECRET": SECRET}}}}),
        ("teacher.model", {"teacher": {"model": f"https://u:{SECRET}@host/m", "backend": "fake"}}),
        ("teacher.server.url", {"teacher": {"model": "x", "backend": "served", "server": {"url": f"http://u:{SECRET}@h/v1"}}}),
        ("input.paths[0]", {"input": {"format": "lines", "paths": [f"https://h/x?X-Amz-Signature={SECRET}"]}}),
        ("input.dataset", {"input": {"format": "dataset", "dataset": f"https://h/x?sig={SECRET}"}}),
        ("out", {"out": f"s3://key:{SECRET}@bucket/x"}),
    ],
)
def test_a_capture_s_config_with_a_secret_is_refused_without_showing_it(where: str, fields: dict):
    with pytest.raises(ConfigError, match="looks like a secret, by name or value") as caught:
        convert_config(CAPTURE | fields, CaptureConfig, where="c.yaml")
    assert where.removeprefix("teacher.") in str(caught.value)
    assert SECRET not in str(caught.value)


def test_how_a_store_is_reached_may_hold_secrets_which_no_record_keeps():
    remote = {"options": {"key": "AKIDEXAMPLE", "secret": SECRET, "endpoint_url": "http://h"}}
    convert_config(CAPTURE | {"remote": remote}, CaptureConfig)
    convert_config(TRAIN | {"remote": remote}, TrainConfig)
    assert without_secrets(remote) == {"options": {"key": MASK, "secret": MASK, "endpoint_url": "http://h"}}
    with pytest.raises(ConfigError, match="cache looks like a secret"):
        convert_config(TRAIN | {"cache": f"s3://key:{SECRET}@bucket/x"}, TrainConfig)


def test_no_message_on_a_field_shows_a_secret():
    with pytest.raises(ConfigError) as caught:
        convert_config({"model": "x", "engine_options": {"token": [SECRET]}}, TeacherConfig)
    assert SECRET not in str(caught.value)


def test_the_working_directory_is_no_secret_though_the_shell_calls_it_pwd(monkeypatch):
    monkeypatch.setenv("PWD", "/home/someone/a/project")
    monkeypatch.setenv("DB_PWD", "a/password/of/someone")
    assert masked("in /home/someone/a/project") == "in /home/someone/a/project"
    assert masked("with a/password/of/someone") == f"with {MASK}"
