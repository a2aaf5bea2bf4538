"""DistilBERT's triple loss as a config of three terms: its own training step's numbers on a toy."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kdcache.config.load import load_config
from kdcache.config.train import TrainConfig
from kdcache.format.feature_vectors import FeatureVectors
from kdcache.format.manifest import FeatureInfo
from kdcache.format.soft_targets import SoftTargets
from kdcache.loss.fused import Projection
from kdcache.train.terms.base import StudentStates
from kdcache.train.terms.engine import LossTerms

sys.path.insert(0, str(Path(__file__).parent / "oracles"))
from distilbert import positions, toy

# `python tests/train/oracles/distilbert.py`: per position, before the weights 5 (with T^2), 2 and 1, and norms of gradients.
DISTILBERT = {
    "divergence": 3.905787299880988, "cross_entropy": 3.4046365982610594, "hidden_states": 1.0914614597890733,
    "loss": 27.429671155716136, "states_gradient": 5.2217876431299715, "head_gradient": 5.885736635344453,
}  # fmt: skip
CONFIG = Path(__file__).parents[2] / "configs" / "train-distilbert.yaml"


def batch_and_student() -> tuple[Any, StudentStates]:
    numbers = toy()
    slots_P = positions().flatten().nonzero()[:, 0]
    teacher_PH = numbers["teacher_states"].flatten(0, 1)[slots_P]
    logprobs_PV = (teacher_PH @ numbers["teacher_head"].T).log_softmax(dim=1)
    ids_PV = torch.arange(9).expand(len(slots_P), 9)
    log_z_P = (logprobs_PV / 2).logsumexp(dim=1)
    teacher = SoftTargets.of(
        ids_PV, logprobs_PV, torch.zeros(len(slots_P)), entries="exact", vocab_size=9, log_z=(2.0, log_z_P)
    )
    info = FeatureInfo(name="hidden_last", layer=-1, size=4, num_layers=2)
    targets_P = numbers["ids"].roll(-1, dims=1).flatten()[slots_P]
    batch = SimpleNamespace(
        teacher=teacher, flat_positions_P=slots_P, target_ids_P=targets_P, weights_P=torch.ones(len(slots_P)),
        input_ids_BT=numbers["ids"], num_sequences=2, features={"hidden_last": FeatureVectors(info, teacher_PH, slots_P)},
    )  # fmt: skip
    states_BTH, head_VH = numbers["student_states"].requires_grad_(), numbers["student_head"].requires_grad_()
    states = StudentStates(states_BTH.flatten(0, 1)[slots_P], Projection(head_VH), slots_P, {("hidden", -1): states_BTH})
    batch.leaves = states_BTH, head_VH
    return batch, states


def test_the_config_gives_distilberts_own_numbers() -> None:
    batch, student = batch_and_student()
    terms = LossTerms(load_config(CONFIG, TrainConfig).loss)
    for term in terms.members():
        term.set_up(SimpleNamespace(hidden_size=4, device=torch.device("cpu"), manifest=manifest_of(batch), seed=0))
    loss = terms(student, batch)
    report = terms.report()
    for name in ("divergence", "cross_entropy", "hidden_states"):
        assert report[name] == pytest.approx(DISTILBERT[name], rel=1e-6)
    assert loss.item() == pytest.approx(DISTILBERT["loss"], rel=1e-6)
    loss.backward()
    norms = [leaf.grad.norm().item() for leaf in batch.leaves]
    assert norms == pytest.approx([DISTILBERT["states_gradient"], DISTILBERT["head_gradient"]], rel=1e-6)


def manifest_of(batch: Any) -> Any:
    return SimpleNamespace(identity=SimpleNamespace(features=(batch.features["hidden_last"].info,)))
