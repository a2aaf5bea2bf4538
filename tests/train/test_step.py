"""What a run makes of a cache's entries: every selection, divergence and temperature, or one sentence why not."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from train_caches import VOCAB_SIZE, load_teacher_model, train_config, write_cache
from transformers import PreTrainedModel

from kdcache.config.load import convert_config
from kdcache.config.train import LossConfig
from kdcache.errors import ConfigError, LossError
from kdcache.format.manifest import SelectionInfo
from kdcache.format.soft_targets import SoftTargets
from kdcache.kernels.divergences import TailAwareKL
from kdcache.loader.torch_batches import TorchBatch
from kdcache.loss.prepare import LossSettings
from kdcache.loss.sparse_kd import sparse_kd_loss
from kdcache.train.step import check_loss, student_loss
from kdcache.train.terms.engine import LossTerms
from kdcache.train.trainer import train

T, K, NUM_EXACT = 12, 6, 4


def selection(kind: str) -> SelectionInfo:
    return SelectionInfo(kind=kind, params={}, temperatures=(0.5, 2.0))


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> PreTrainedModel:
    return load_teacher_model(tiny_model_dir)


@pytest.fixture(scope="module")
def batch() -> TorchBatch:
    """One row of one sequence; four exact entries at a position and two estimates, normalisers at 0.5 and 2."""
    generator = torch.Generator().manual_seed(0)
    teacher_PV = torch.randn(T, VOCAB_SIZE, generator=generator).mul(3).log_softmax(dim=1)
    top = teacher_PV.topk(K, dim=1)
    logprobs_PK = top.values.clone()
    logprobs_PK[:, NUM_EXACT:] = -3.0
    ids_1T = torch.randint(0, VOCAB_SIZE, (1, T), generator=generator)
    return TorchBatch(
        input_ids_BT=ids_1T,
        position_ids_BT=torch.arange(T)[None],
        segment_ids_BT=torch.ones(1, T, dtype=torch.int32),
        cu_seqlens_G1=torch.tensor([0, T]),
        target_ids_BT=torch.cat([ids_1T[:, 1:], torch.tensor([[-100]])], dim=1),
        flat_positions_P=torch.arange(T),
        teacher=SoftTargets(
            token_ids_PK=top.indices.int(),
            logprobs_PK=logprobs_PK,
            tail_mass_P=1 - logprobs_PK[:, :NUM_EXACT].exp().sum(dim=1),
            entries="mixed",
            num_exact_P=torch.full((T,), NUM_EXACT),
            log_z_PL=torch.stack([(teacher_PV / t).logsumexp(dim=1) for t in (0.5, 2.0)], dim=1),
            temperatures=(0.5, 2.0),
        ),
        weights_P=torch.ones(T),
        max_seqlen=T,
        num_sequences=1,
        num_masked=0,
    )


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ({}, {"settings": LossSettings("drop", "unbiased")}),
        ({"tail": "bucket"}, {"settings": LossSettings("bucket", "exact")}),
        ({"tail": "drop", "alpha": 0.4}, {"settings": LossSettings("drop", "unbiased"), "alpha": 0.4}),
        (
            {"divergence": "reverse_kl", "alpha": 0.5},
            {"divergence": "reverse_kl", "alpha": 0.5, "settings": LossSettings("bucket", "exact")},
        ),
        (
            {"divergence": "tail_aware_kl", "divergence_options": {"tail_weight": 3.0}},
            {"divergence": TailAwareKL(3.0), "settings": LossSettings("bucket", "unbiased")},
        ),
        ({"temperature": 2.0}, {"temperature": 2.0, "settings": LossSettings("bucket", "exact")}),
    ],
)
def test_the_step_computes_what_the_configuration_and_the_entries_say(
    loss: dict[str, Any], expected: dict[str, Any], model: PreTrainedModel, batch: TorchBatch, tmp_path: Path
) -> None:
    config = train_config(tmp_path / "cache", Path("none"), tmp_path / "run", loss=loss)
    got = student_loss(model, batch, config)
    logits_PV = model(batch.input_ids_BT).logits[0]
    of_batch = {"target_ids": batch.target_ids_P, "weights": batch.weights_P}
    wanted = sparse_kd_loss(logits_PV, batch.teacher, **of_batch, **expected)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def manifest(kind: str) -> Any:
    """As much of a cache's manifest as a loss is checked against."""
    return SimpleNamespace(identity=SimpleNamespace(selection=selection(kind)))


@pytest.mark.parametrize(
    ("loss", "kind", "error", "sentence"),
    [
        (
            {"tail": "bucket"},
            "sampled",
            LossError,
            "tail 'bucket' cannot be computed from the selection 'sampled'",
        ),
        ({"divergence": "hellinger"}, "sampled", LossError, "hellinger is not; use 'forward_kl' with tail 'drop'"),
        ({"divergence": "tail_aware_kl"}, "top_k", LossError, "which has no sample of the tail"),
        ({"divergence": "skew_kl", "divergence_options": {"beta": 1.0}}, "top_k", LossError, "skew_kl has no option 'beta'"),
        ({"temperature": 3.0}, "top_k", ConfigError, r"loss.temperature is 3.0, but the cache was captured for 0.5, 1.0, 2.0"),
    ],
)
def test_what_the_cache_is_not_enough_for_is_refused_in_one_sentence(loss, kind, error, sentence) -> None:
    with pytest.raises(error, match=sentence):
        check_loss(LossConfig(**loss), manifest(kind))


@pytest.mark.parametrize(
    ("kind", "params"),
    [
        ("sampled", {"num_draws": 20, "seed": 0}),
        ("threshold", {"tau": 0.02, "seed": 0}),
        ("top_k_sampled", {"k": 4, "num_draws": 9, "seed": 0}),
    ],
)
def test_a_student_trains_from_a_cache_of_every_random_selection(kind, params, tiny_model_dir: Path, tmp_path: Path) -> None:
    info = SelectionInfo(kind=kind, params=params)
    cache = write_cache(tmp_path / "cache", tiny_model_dir, num_sequences=6, selection=info)
    losses = [{"tail": "drop"}, {"tail": "drop", "alpha": 0.5}]
    losses += [] if kind == "sampled" else [{"divergence": "tail_aware_kl"}, {"divergence": "jensen_shannon"}]
    for number, loss in enumerate(losses):
        result = train(train_config(cache, tiny_model_dir, tmp_path / f"run{number}", loss=loss, steps=2), show_progress=False)
        assert result.num_steps == 2
    refused = train_config(cache, tiny_model_dir, tmp_path / "refused", loss={"divergence": "reverse_kl"}, steps=2)
    if kind == "sampled":
        with pytest.raises(LossError, match="reverse_kl is not; use 'forward_kl'"):
            train(refused, show_progress=False)
        assert not (tmp_path / "refused").exists()


def test_labels_alone_may_be_trained_from_any_selection() -> None:
    check_loss(LossConfig(alpha=0.0, divergence="reverse_kl"), manifest("sampled"))


@pytest.mark.parametrize(
    ("loss", "is_said"),
    [({}, False), ({"divergence": "reverse_kl"}, True), ({"divergence": "tail_aware_kl"}, False), ({"temperature": 2.0}, True)],
)
def test_random_entries_that_a_loss_does_not_read_are_said_once(loss: dict[str, Any], is_said: bool) -> None:
    shards = [SimpleNamespace(num_entries=100, num_exact_entries=20, tail_mass_sum=4.0, num_positions=10)] * 2
    cache = SimpleNamespace(identity=SimpleNamespace(selection=selection("threshold")), shards=shards)
    notes = LossTerms(convert_config(loss | {"alpha": 0.5}, LossConfig)).notes(cache)  # pyright: ignore[reportArgumentType]
    assert len(notes) == is_said
    for note in notes:
        assert "reads the exact entries of this 'threshold' cache alone, 20% of all with 60% of the mass" in note
