"""Terms that read features or sidecars, and caches of several teachers."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

pytest.importorskip("transformers")

from states.states_cases import manifest_of
from test_exact_from_capture import capture, student_of
from tiny_model import build_tiny_model

import kdcache
from kdcache.config.load import convert_config
from kdcache.config.train import LossConfig
from kdcache.errors import ConfigError
from kdcache.format.manifest import Manifest
from kdcache.format.sidecar_claims import SidecarInfo
from kdcache.train.terms.engine import LossTerms
from kdcache.train.terms.setting import check_teachers, set_up_terms, setting_of


def terms_of(term: str, **options: Any) -> LossTerms:
    fields = {"terms": [{"term": term, "options": options}, {"term": "cross_entropy", "weight": 0.0}]}
    return LossTerms(convert_config(fields, LossConfig))


def manifest_by(**teacher: Any) -> Manifest:
    manifest = manifest_of()
    identity = msgspec.structs.replace(manifest.identity, teacher=msgspec.structs.replace(manifest.identity.teacher, **teacher))
    return msgspec.structs.replace(manifest, identity=identity)


@pytest.mark.slow
def test_the_output_projection_of_one_teacher_is_not_used_for_anothers_states(tmp_path: Path) -> None:
    one, two = build_tiny_model(tmp_path / "one" / "tiny"), tmp_path / "two" / "tiny"
    moved = student_of(one)
    moved.save_pretrained(two)
    for file in one.iterdir():
        if not (two / file.name).exists():
            (two / file.name).write_bytes(file.read_bytes())
    first, again, other = (capture(tmp_path / name, model) for name, model in (("a", one), ("b", one), ("c", two)))
    for caches, is_refused in (([first, again], False), ([first, other], True)):
        with kdcache.Loader(caches) as loader:
            for term in ("exact_kl", "dual_space"):
                if is_refused:
                    with pytest.raises(ConfigError, match="sidecar 'output_projection' differs between the caches"):
                        set_up_terms(terms_of(term), moved, loader.caches, seed=0)
                else:
                    set_up_terms(terms_of(term), moved, loader.caches, seed=0)


def test_a_sidecar_that_differs_or_that_one_cache_lacks_is_refused(tiny_model_dir: Path) -> None:
    def with_sidecar(digit: str) -> Manifest:
        sidecar = SidecarInfo(name="output_projection", sha256=digit * 64, num_bytes=1, tensors={})
        return msgspec.structs.replace(manifest_of(), sidecars=(sidecar,))

    def read(*manifests: Manifest) -> None:
        caches: Any = [_Cache(manifest) for manifest in manifests]
        setting_of(student_of(tiny_model_dir), caches, seed=0).sidecar("output_projection")

    with pytest.raises(ConfigError, match="cache 0 lacks the sidecar 'output_projection', which another of the caches has"):
        read(manifest_of(), with_sidecar("0"))
    with pytest.raises(ConfigError, match="sidecar 'output_projection' differs between the caches, which are of different"):
        read(with_sidecar("0"), with_sidecar("1"))


class _Cache(SimpleNamespace):
    def __init__(self, manifest: Manifest) -> None:
        super().__init__(manifest=manifest)

    def __len__(self) -> int:
        return 1


@pytest.mark.parametrize("term", ["rkd", "crd"])
def test_sequences_of_different_teachers_are_not_compared(term: str) -> None:
    with pytest.raises(ConfigError, match=f"loss term '{term}' compares sequences .* different teachers \\('a' and 'b'\\)"):
        check_teachers(terms_of(term, feature="f"), [manifest_by(model="a"), manifest_by(model="b")])
    check_teachers(terms_of(term, feature="f"), [manifest_by(model="a", weights_digest="1")] * 2)


def test_one_projector_of_two_spaces_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    def warned(terms: LossTerms, *manifests: Manifest) -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            check_teachers(terms, manifests)
        return caplog.messages

    one, copy = manifest_by(model="a", weights_digest="1"), manifest_by(model="moved", weights_digest="1")
    other = manifest_by(model="a", weights_digest="2")
    states = terms_of("hidden_states", feature="f")
    assert warned(states, one, copy) == []
    (line,) = warned(states, one, other, other)
    assert "features of different teachers ('a' in two versions)" in line
    assert "'hidden_states'" in line
    assert warned(terms_of("relations", queries="q"), one, other) == []
    assert warned(terms_of("cross_entropy"), one, other) == []
