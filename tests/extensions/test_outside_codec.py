"""A codec that another package brings: the contract of every codec, and a cache from capture to verified reading."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from contracts import codec as contract

import kdcache
from kdcache.cli.main import main
from kdcache.codec import get_codec
from kdcache.errors import FormatError


@pytest.mark.parametrize("check", contract.CHECKS, ids=lambda check: check.__name__)
def test_it_keeps_the_contract(toys, check):
    check(lambda vocab_size: get_codec("toy", {"vocab_size": vocab_size}))


def test_it_keeps_every_selection_and_refuses_unfit_parameters(toys):
    contract.check_selections("toy")
    contract.check_unfit_parameters("toy")


def captured(folder, *settings: str) -> str:
    """A cache of the fake teacher, written by the command line."""
    (folder / "text.txt").write_text("a teacher speaks once, and students listen\n" * 40)
    config = {
        "input": {"format": "lines", "paths": [str(folder / "text.txt")]},
        "teacher": {"model": "fake", "backend": "fake"},
        "out": str(folder / "cache"),
    }
    (folder / "c.yaml").write_text(json.dumps(config))
    overrides = [part for setting in settings for part in ("--set", setting)]
    assert main(["capture", str(folder / "c.yaml"), *overrides]) == 0
    return config["out"]


@pytest.mark.parametrize("kind", ["top_k", "threshold"])
def test_a_cache_is_captured_verified_derived_and_loaded_with_it(toys, tmp_path, capsys, kind):
    cache = captured(tmp_path, "codec.id=toy", f"selection.kind={kind}")
    assert main(["verify", cache]) == 0
    assert main(["info", cache]) == 0
    assert "toy" in capsys.readouterr().out
    assert main(["derive", cache, "--out", str(tmp_path / "raw"), "--codec", "raw"]) == 0
    with kdcache.open(cache) as ours, kdcache.open(tmp_path / "raw") as raw:
        assert np.array_equal(ours[0].distributions.logprobs_E, raw[0].distributions.logprobs_E)
        config = kdcache.LoaderConfig(seq_len=64, batch_rows=2, num_threads=1)
        batches = [next(iter(kdcache.Loader(c, config))) for c in (ours, raw)]
    assert np.array_equal(*(batch.input_ids_BT for batch in batches))


def test_its_parameters_are_its_own_and_a_wrong_one_is_refused(toys, tmp_path, capsys):
    with pytest.raises(AssertionError):
        captured(tmp_path, "codec.id=toy", "codec.params.width=3")
    assert "codec: codec 'toy' does not take the parameters" in capsys.readouterr().err


def test_without_its_package_the_cache_says_what_is_missing(toys, tmp_path, capsys, monkeypatch):
    cache = captured(tmp_path, "codec.id=toy")
    monkeypatch.setattr("sys.path", [path for path in sys.path if path != str(toys)])
    with pytest.raises(FormatError, match=r"codec 'toy' is unknown here: .*install the package that brings the codec"):
        kdcache.open(cache)[0]
    assert main(["verify", cache]) == 2
