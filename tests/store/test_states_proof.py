"""States of the wrong position are found without a teacher, by the output projection that the cache has."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np
import pytest
from cache_making import VOCAB_SIZE, make_identity, make_manifest, make_sequence

from kdcache.cli.main import main
from kdcache.format.manifest import FeatureInfo
from kdcache.format.output_projection import OUTPUT_PROJECTION, OutputProjection
from kdcache.format.record import SequenceRecord, distributions_from_dense
from kdcache.format.sidecar import make_sidecar
from kdcache.store import states_proof
from kdcache.store.verify import VerifyReport, verify_cache
from kdcache.store.writing.writer import CacheWriter

H = 16
WEIGHT_VH = np.random.default_rng(5).normal(0, 0.8, (VOCAB_SIZE, H)).astype(np.float32)


def record_of(seed: int, shift: int) -> SequenceRecord:
    """A teacher whose logits are WEIGHT_VH times random states; the states stored are those `shift` positions away."""
    sequence = make_sequence(seed)
    states_PH = np.random.default_rng(seed).normal(0, 1, (len(sequence.positions_P), H)).astype(np.float32)
    logits_PV = states_PH @ WEIGHT_VH.T
    logprobs_PV = logits_PV - np.log(np.exp(logits_PV.astype(np.float64)).sum(axis=1, keepdims=True))
    ids_PK = np.argsort(-logprobs_PV, axis=1)[:, :5].astype(np.int32)
    targets_P = sequence.target_ids_P
    of_target_P = np.take_along_axis(logprobs_PV, np.maximum(targets_P, 0)[:, None], axis=1)[:, 0]
    d = distributions_from_dense(ids_PK, np.take_along_axis(logprobs_PV, ids_PK, axis=1), targets_P, of_target_P)
    return SequenceRecord(sequence, replace(d, features={"states": np.roll(states_PH, shift, axis=0)}))


def verified(path, *, shift: int = 0, dtype: str = "int8", **fields) -> VerifyReport:
    feature = FeatureInfo(**{"name": "states", "layer": -1, "size": H, "num_layers": 4, "dtype": dtype} | fields)
    identity = msgspec.structs.replace(make_identity("packed"), features=(feature,))
    arrays = OutputProjection(WEIGHT_VH).arrays()
    writer = CacheWriter.open(path, make_manifest(1, identity), sidecars=[make_sidecar(OUTPUT_PROJECTION, arrays)])
    writer.write_unit(0, [record_of(seed, shift) for seed in range(6)])
    writer.fold()
    return verify_cache(path)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_states_give_the_logprobs_within_the_rounding_of_their_dtype(tmp_path, capsys, monkeypatch, dtype):
    monkeypatch.setattr(states_proof, "_CHUNK", 10)  # parts of the vocabulary, the last one shorter
    report = verified(tmp_path / "c", dtype=dtype)
    assert report.problems == []
    assert report.states is not None
    assert report.states.difference < {"float16": 2e-3, "bfloat16": 1e-2, "int8": 3e-2}[dtype]
    assert report.states.moved > 1
    assert report.states.num_positions > 30
    assert main(["verify", str(tmp_path / "c")]) == 0
    assert "states  states through the output projection gives logprobs 0.0" in capsys.readouterr().out


@pytest.mark.parametrize("shift", [1, -1])
def test_states_of_another_position_are_a_problem(tmp_path, capsys, shift):
    (problem,) = verified(tmp_path / "c", shift=shift).problems
    assert "feature 'states'" in problem
    assert "they do not belong to them" in problem
    assert main(["verify", str(tmp_path / "c")]) == 1
    assert "do not belong" in capsys.readouterr().err


@pytest.mark.parametrize("fields", [{"layer": 4}, {"stride": 40, "offset": 39}])
def test_nothing_is_said_where_there_is_nothing_to_compare(tmp_path, fields):
    with pytest.MonkeyPatch.context() as patch:
        if "stride" in fields:
            patch.setattr("test_states_proof.record_of", lambda seed, shift: without_states(seed))
        report = verified(tmp_path / "c", **fields)
    assert (report.problems, report.states) == ([], None)


_record_of = record_of


def without_states(seed: int) -> SequenceRecord:
    record = _record_of(seed, 0)
    return SequenceRecord(record.sequence, replace(record.distributions, features={"states": np.zeros((0, H), np.float32)}))


def test_a_projection_of_another_shape_is_a_problem_in_words(tmp_path):
    identity = msgspec.structs.replace(
        make_identity("packed"), features=(FeatureInfo(name="states", layer=-1, size=H, num_layers=4),)
    )
    sidecar = make_sidecar(OUTPUT_PROJECTION, OutputProjection(WEIGHT_VH[:, :9]).arrays())
    writer = CacheWriter.open(tmp_path, make_manifest(1, identity), sidecars=[sidecar])
    writer.write_unit(0, [record_of(1, 0)])
    writer.fold()
    assert verify_cache(tmp_path).problems == [
        "sidecar 'output_projection': its weight has the shape (97, 9), expected (97, 16)"
    ]
