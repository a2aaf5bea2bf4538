"""The documentation of the config fields is complete, since help texts are made from it."""

from typing import Literal

import pytest

from kdcache.config.capture import CaptureConfig
from kdcache.config.describe import choices_of, describe_fields, nearest, section_fields, type_at


def test_every_field_is_described_with_type_default_and_text():
    described = {field.path: field for field in describe_fields(CaptureConfig)}
    assert [path for path, field in described.items() if not field.text] == []
    assert described["input.window.size"].default == "1024"
    assert described["teacher.model"].default is None
    assert described["input.content"].type == "text | messages | ids"
    assert described["input.limit"].type == "whole number | null"


def test_the_nearest_name_is_found_and_a_far_one_is_not():
    assert nearest("windw", ["window", "limit"]) == "window"
    assert nearest("zzz", ["window", "limit"]) is None


@pytest.mark.parametrize(("path", "choices"), [("input.content", ("text", "messages", "ids")), ("input.limit", ())])
def test_choices_of_a_field(path, choices):
    assert choices_of(type_at(CaptureConfig, path.split("."))) == choices


def test_only_structs_are_sections():
    policy = Literal["split", "truncate", "error"]
    window = section_fields(type_at(CaptureConfig, ["input", "window"]))
    assert window == {"size": int, "policy": policy, "overlap": int}
    assert "temperature" in (section_fields(type_at(CaptureConfig, ["generate"])) or {})  # a section that may be absent
    assert section_fields(int) is None
