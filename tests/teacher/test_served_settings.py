from __future__ import annotations

import pytest

from kdcache.config.capture import CaptureConfig, TeacherConfig
from kdcache.config.load import convert_config
from kdcache.config.server import ServerConfig
from kdcache.errors import ConfigError
from kdcache.teacher.served.settings import name_for_identity, refuse_settings, vocab_size_of


def config(url: str = "http://127.0.0.1:8000/v1", **changes: object) -> TeacherConfig:
    settings: dict[str, object] = {"model": "m", "backend": "served", "server": ServerConfig(url=url)}
    return TeacherConfig(**(settings | changes))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("url", ["http://h:8000/v1", "https://api.example.org/v1", "http://[::1]:8000", "http://h/v1/"])
def test_addresses_that_are_fine(url: str):
    refuse_settings(config(url))


@pytest.mark.parametrize("url", ["", "h:8000/v1", "ftp://h/v1", "http://", "http://h:port/v1", "http://h:99999/v1", "/v1"])
def test_what_is_no_address_is_refused(url: str):
    with pytest.raises(ConfigError, match=r"teacher\.server\.url is .*expected one such as http://host:8000/v1"):
        refuse_settings(config(url))


@pytest.mark.parametrize("url", ["http://me:secret@h/v1", "http://h/v1?api_key=secret", "http://h/v1#secret"])
def test_secrets_in_an_address_are_refused_and_not_repeated(url: str):
    with pytest.raises(ConfigError, match=r"named by teacher\.server\.api_key_env") as caught:
        refuse_settings(config(url))
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "setting",
    [{"engine_options": {"enforce_eager": True}}, {"num_threads": 3}],
)
def test_settings_of_an_engine_that_is_not_ours_are_refused(setting: dict[str, object]):
    (name,) = setting
    with pytest.raises(ConfigError, match=rf"teacher\.{name} is .*, but it cannot be set on a server"):
        refuse_settings(config(**setting))


def test_a_server_without_an_address_and_settings_of_another_backend_are_refused():
    sections = {"input": {"format": "lines", "paths": ["a"]}, "out": "c"}
    for teacher, sentence in [
        ({"backend": "served"}, r"backend 'served' needs server\.url"),
        ({"server": {"url": "http://h/v1"}}, r"server is for backend 'served' only, not for 'auto'"),
        ({"backend": "transformers", "vllm": {"route": "worker"}}, r"vllm is for backend 'vllm' only, not for 'transformers'"),
        ({"fake": {"seed": 1}}, r"fake is for backend 'fake' only, not for 'auto'"),
    ]:
        with pytest.raises(ConfigError, match=sentence):
            convert_config(sections | {"teacher": {"model": "m"} | teacher}, CaptureConfig)


def test_the_vocabulary_is_the_models_unless_it_is_stated():
    assert vocab_size_of(config(), {"vocab_size": 7}) == 7
    assert vocab_size_of(config(), {"text_config": {"vocab_size": 8}, "vocab_size": 7}) == 8
    assert vocab_size_of(config(server=ServerConfig(url="u", vocab_size=9)), {"vocab_size": 7}) == 9
    with pytest.raises(ConfigError, match=r"teacher\.server\.vocab_size is not given, and no config\.json of 'm'"):
        vocab_size_of(config(), {})


def test_a_path_is_no_part_of_a_models_name():
    assert name_for_identity("/srv/models/Qwen3-0.6B/") == "Qwen3-0.6B"
    assert name_for_identity("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
