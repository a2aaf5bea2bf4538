"""The doors for other packages: names, and what is said where one leads nowhere. Each kind has a test file of its own."""

from __future__ import annotations

import pytest
from installed_package import install

from kdcache import extensions
from kdcache.errors import ConfigError


def test_names_are_ours_and_then_those_of_installed_packages(toys):
    assert extensions.names("codecs") == ["raw", "packed", "quantized", "archive", "broken", "toy"]


def test_a_name_that_nobody_brings_is_refused_with_those_there_are(toys):
    with pytest.raises(ConfigError, match=r"brings 'zip' to kdcache.codecs; known are raw, .*, toy$"):
        extensions.find("codecs", "zip")


def test_a_package_that_cannot_be_imported_is_named(toys):
    with pytest.raises(ConfigError, match=r"^toys 1.0 brings 'broken' .*ModuleNotFoundError: No module named 'toy_that"):
        extensions.find("codecs", "broken")


def test_two_packages_with_one_name_are_refused_by_both_names(toys, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(install(tmp_path, "[kdcache.codecs]\ntoy = other:Codec\n", "rivals")))
    with pytest.raises(ConfigError, match=r"rivals 1.0 and toys 1.0 all bring 'toy'"):
        extensions.find("codecs", "toy")


def test_a_name_of_ours_cannot_be_taken(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(install(tmp_path, "[kdcache.codecs]\npacked = other:Codec\n")))
    assert extensions.find("codecs", "packed").__module__ == "kdcache.codec.packed"
    assert extensions.names("codecs").count("packed") == 1
