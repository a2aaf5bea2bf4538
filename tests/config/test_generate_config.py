"""The section `generate`: absent, or complete by its defaults; what does not fit together is refused in words."""

import pytest
import yaml

from kdcache.config.capture import CaptureConfig, GenerateConfig
from kdcache.config.describe import describe_fields
from kdcache.config.load import apply_override, convert_config
from kdcache.errors import ConfigError

FIELDS = {
    "input": {"format": "lines", "paths": ["a.txt"]},
    "teacher": {"model": "fake", "backend": "fake"},
    "out": "cache",
}


def config(**sections):
    return convert_config(FIELDS | sections, CaptureConfig)


def test_without_the_section_the_teacher_reads_and_with_an_empty_one_it_answers():
    assert config().generate is None
    assert config(generate=None).generate is None
    assert config(generate={}).generate == GenerateConfig()


def test_one_field_can_be_set_on_the_command_line_though_the_file_has_no_section():
    fields = dict(FIELDS)
    apply_override(fields, CaptureConfig, "generate.temperature=0.7")
    assert convert_config(fields, CaptureConfig).generate == GenerateConfig(temperature=0.7)
    with pytest.raises(ConfigError, match=r"generate\.temprature: no such field; did you mean generate\.temperature"):
        apply_override(fields, CaptureConfig, "generate.temprature=1")


def test_its_fields_are_described():
    described = {field.path: field for field in describe_fields(CaptureConfig) if field.path.startswith("generate.")}
    assert set(described) == {f"generate.{name}" for name in GenerateConfig.__struct_fields__}
    assert described["generate.top_p"].default == "1.0"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("generate: {temperature: -1}", r"generate\.temperature"),
        ("generate: {top_p: 0}", r"generate\.top_p"),
        ("generate: {stop: ['']}", r"generate\.stop"),
        ("generate: {temperature: 0, n: 2}", "at temperature 0 all answers to a prompt are the same"),
        ("generate: {temperature: 0, capture_filtered: true}", "nothing is drawn"),
        (
            "generate: {max_tokens: 1024}",
            "max_tokens is 1024, but prompt and answer together must fit into input.window.size, 1024",
        ),
        ("{generate: {}, input: {format: lines, paths: [a], window: {policy: truncate}}}", "prompts are not cut"),
        ("{generate: {}, input: {format: lines, paths: [a], window: {overlap: 4}}}", "prompts are not cut"),
    ],
)
def test_what_cannot_be_is_refused_in_words(text, sentence):
    with pytest.raises(ConfigError, match=sentence):
        config(**yaml.safe_load(text))
