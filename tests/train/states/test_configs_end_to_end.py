"""A real teacher's states captured as `capture-states.yaml` asks, and students trained from them as each config says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import kdcache
from kdcache.capture.executors.run import run_capture
from kdcache.config.capture import CaptureConfig
from kdcache.config.load import convert_config
from kdcache.config.loader import LoaderConfig
from kdcache.config.train import LossConfig, TrainConfig
from kdcache.loader.torch_batches import to_torch
from kdcache.loss.states.relations import relation_kl
from kdcache.teacher.hf.heads import seen_heads
from kdcache.train.adapters import BatchStream, StudentLoss
from kdcache.train.terms.crd import CrdTerm
from kdcache.train.trainer import train

CONFIGS = Path(__file__).parents[3] / "configs"
TERMS = {
    "hidden": "hidden_states", "relations": "relations", "attention": "attention", "rkd": "rkd", "crd": "crd",
}  # fmt: skip
"""Name of a config -> its term."""

NUM_STEPS = 4

FURTHER = [
    {"name": "pca", "layer": -1, "dtype": "int8", "projection": {"kind": "pca", "size": 24}},
    {"name": "inner", "layer": 1, "dtype": "int8", "scale": "channel", "stride": 2},
    {"name": "drawn", "layer": -1, "pooling": "mean", "projection": {"kind": "random", "size": 48}},
]
"""Features of other forms: fewer numbers, some of the positions, a scale per channel."""


@pytest.fixture(scope="module")
def cache(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of a teacher of two layers, two heads and one head of keys."""
    folder = tmp_path_factory.mktemp("states")
    texts = [f"def function_{i}(x):\n    return x * {i} + {i * i}\n" * (1 + i % 3) for i in range(12)]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    fields = yaml.safe_load((CONFIGS / "capture-states.yaml").read_text())
    for feature in fields["features"]:
        feature["layer"] = 2 if feature["layer"] > 0 else feature["layer"]
    fields["features"] += FURTHER
    fields["input"] = {"format": "jsonl", "paths": [str(folder / "texts.jsonl")], "window": {"size": 96}}
    fields["teacher"] = {"model": str(tiny_model_dir), "backend": "transformers", "dtype": "float32"}
    fields |= {"out": str(folder / "cache"), "selection": {"kind": "top_k", "k": 16}}
    run_capture(convert_config(fields, CaptureConfig))
    return folder / "cache"


def config_of(name: str, cache: Path, teacher: Path, out: Path, **changes: Any) -> TrainConfig:
    """The config in `configs/`, on the tiny teacher's cache: fewer steps of a smaller student."""
    fields = yaml.safe_load((CONFIGS / f"train-{name}.yaml").read_text())
    overrides = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    fields |= {
        "cache": str(cache), "out": str(out), "steps": NUM_STEPS, "num_threads": 1, "checkpoint_every_steps": 2,
        "student": {"model": str(teacher), "overrides": overrides}, "loader": {"seq_len": 96, "batch_rows": 4},
    } | changes  # fmt: skip
    return convert_config(fields, TrainConfig)


def metrics_of(config: TrainConfig) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (Path(config.out) / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


@pytest.mark.parametrize("name", TERMS)
def test_a_student_trains_as_the_config_says(name, cache, tiny_model_dir, tmp_path):
    config = config_of(name, cache, tiny_model_dir, tmp_path / "run")
    assert train(config, show_progress=False).num_steps == NUM_STEPS
    values = [line["terms"][TERMS[name]] for line in metrics_of(config)]
    assert len(values) == NUM_STEPS, values
    assert all(value > 1e-4 for value in values)


@pytest.mark.parametrize(
    "term",
    [
        {"term": "hidden_states", "options": {"feature": "pca", "loss": "mse"}},
        {"term": "hidden_states", "options": {"feature": "inner", "layer": 1, "loss": "relative_mse"}},
        {"term": "rkd", "options": {"feature": "drawn"}},
        {"term": "crd", "options": {"feature": "drawn", "negatives": 8}},
    ],
    ids=lambda term: f"{term['term']}-{term['options']['feature']}",
)
def test_features_of_every_form_are_learned_from(term, cache, tiny_model_dir, tmp_path):
    config = config_of(
        "hidden", cache, tiny_model_dir, tmp_path / "run", loss={"terms": [term], "projector_lr": 0.02}, steps=30
    )
    train(config, show_progress=False)
    values = [line["terms"][term["term"]] for line in metrics_of(config)]
    assert sum(values[-5:]) < 0.9 * sum(values[:5])


@pytest.mark.parametrize("name", ["hidden", "relations", "attention", "rkd"])
def test_the_teacher_as_a_student_has_nothing_to_learn_but_what_was_rounded(name, cache, tiny_model_dir, tmp_path):
    student = {"model": str(tiny_model_dir), "init": "pretrained"}
    config = config_of(name, cache, tiny_model_dir, tmp_path / "run", student=student, steps=1)
    train(config, show_progress=False)
    other = config_of(name, cache, tiny_model_dir, tmp_path / "other", steps=1)
    train(other, show_progress=False)
    own, others = (metrics_of(each)[0]["terms"][TERMS[name]] for each in (config, other))
    assert own < 1e-3 * others


def test_relations_from_the_cache_are_those_of_the_live_teacher(cache, tiny_model_dir):
    teacher = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()
    kinds = ("queries", "keys", "values")
    with kdcache.open(cache) as opened:
        batch = to_torch(next(iter(kdcache.Loader(opened, LoaderConfig(seq_len=96, batch_rows=2, features=kinds)))))
    for name in kinds:
        vectors, checked = batch.features[name], 0
        for start, stop in zip(batch.cu_seqlens_G1[:-1].tolist(), batch.cu_seqlens_G1[1:].tolist(), strict=True):
            if not batch.segment_ids_BT.flatten()[start]:
                continue
            ids_1N = batch.input_ids_BT.flatten()[start:stop][None].long()
            with seen_heads(teacher, [(name, 2)]) as found, torch.no_grad():
                teacher(input_ids=ids_1N, use_cache=False)
            live = found[name, 2][0].flatten(1)
            stored = vectors.at((vectors.slots_F >= start) & (vectors.slots_F < stop)).float32()
            # Off by at most 1/254 of the vector's largest magnitude.
            assert ((stored - live).abs() <= live.abs().amax(dim=1, keepdim=True) / 254 + 1e-5).all()
            kl = relation_kl((live, live), (stored, stored), num_heads=2) / len(live)
            against = relation_kl((live.flip(0), live.flip(0)), (stored, stored), num_heads=2) / len(live)
            assert 0 <= float(kl) < 1e-4 < 1e-2 * float(against)
            checked += 1
        assert checked > 1


def test_crd_resumes_exactly_in_the_trainer(cache, tiny_model_dir, tmp_path, monkeypatch):
    whole, part = (config_of("crd", cache, tiny_model_dir, tmp_path / name) for name in ("whole", "part"))
    train(whole, show_progress=False)
    with monkeypatch.context() as patch:
        steps, forward = iter(range(NUM_STEPS)), CrdTerm.forward

        def interrupted(*args):
            if next(steps) == NUM_STEPS - 1:
                raise KeyboardInterrupt
            return forward(*args)

        patch.setattr(CrdTerm, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(part, show_progress=False)
    assert train(part, show_progress=False).num_resumed == NUM_STEPS - 2
    losses = [[line["loss"] for line in metrics_of(config)] for config in (whole, part)]
    assert losses[0] == losses[1]
    weights = [load_file(Path(config.out) / "model" / "model.safetensors") for config in (whole, part)]
    assert all(torch.equal(weight, weights[1][key]) for key, weight in weights[0].items())
    assert not any("terms" in key or "bank" in key for key in weights[0])


ALL_TERMS = [
    {"term": "divergence"},
    {"term": "hidden_states", "balance": "equal", "options": {"feature": "hidden", "projector": "linear"}},
    {"term": "relations", "options": {"queries": "queries", "keys": "keys", "values": "values"}},
    {"term": "attention", "options": {"feature": "attention"}},
    {"term": "rkd", "weight": 0.02, "options": {"feature": "text"}},
    {"term": "crd", "options": {"feature": "text", "negatives": 16}},
]


def one_step(cache: Path, teacher: Path, how: str) -> tuple[float, float]:
    """The loss of all terms together in a loop of one's own, and the size of the students' gradients."""
    config = AutoConfig.from_pretrained(teacher, num_hidden_layers=1, hidden_size=32, intermediate_size=48, head_dim=16)
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config).train()
    if how == "checkpointed":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if how == "lora":
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "k_proj", "v_proj"], r=4))
    with kdcache.Loader(str(cache), LoaderConfig(seq_len=96, batch_rows=4)) as loader:
        stream = BatchStream(loader)
        loss_of = StudentLoss(model, loader, convert_config({"terms": ALL_TERMS}, LossConfig))
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            loss = loss_of(model, stream[0])
        loss.backward()
        stream.pause()
    assert {each["term"] for each in ALL_TERMS} <= set(loss_of.report())
    return float(loss.detach()), sum(float(p.grad.abs().sum()) for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("how", ["checkpointed", "autocast", "lora"])
def test_all_terms_together_in_a_loop_of_ones_own(how, cache, tiny_model_dir):
    expected, found = one_step(cache, tiny_model_dir, ""), one_step(cache, tiny_model_dir, how)
    assert found[0] == pytest.approx(expected[0], rel={"autocast": 1e-2}.get(how, 1e-6))
    if how == "lora":
        assert found[1] > 0
    else:
        assert found[1] == pytest.approx(expected[1], rel={"autocast": 5e-2}.get(how, 1e-5))
