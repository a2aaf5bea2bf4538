"""The parts of retention.py: the caches, the layers that students keep, and a student trained and scored.

A plan is the dict that retention.py makes of its options and keeps in the work folder.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fidelity_students import BUCKET_FALLS, DROP_RISES
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel

from kdcache.capture.estimate import estimate_capture
from kdcache.capture.executors.run import run_capture
from kdcache.config.capture import CaptureConfig
from kdcache.config.load import convert_config
from kdcache.config.train import TrainConfig
from kdcache.store.summary import summarize_cache
from kdcache.teacher import load_tokenizer
from kdcache.train.evaluation.evaluate import model_size
from kdcache.train.evaluation.heldout import HeldoutSequence, read_heldout
from kdcache.train.evaluation.scores import heldout_nats_per_token, score_models
from kdcache.train.evaluation.unigram import read_unigram
from kdcache.train.runs.run_folder import read_metrics
from kdcache.train.student import load_model
from kdcache.train.trainer import train

MAX_BYTES, MAX_SHARE = 24, 0.60
"""Of the cache per position; of the teacher's non-embedding parameters."""

COPIED, RANDOM = "copied", "random"
COSINE = {"term": "hidden_states", "weight": 1.0, "options": {"feature": "hidden_last", "layer": -1, "loss": "cosine"}}
SETTINGS: dict[str, dict[str, Any]] = {
    "KL, layers copied": {"init": COPIED, "cache": "record", "loss": {"alpha": 1.0}},
    "labels, layers copied": {"init": COPIED, "cache": "record", "loss": {"alpha": 0.0}},
    "KL, random weights": {"init": RANDOM, "cache": "record", "loss": {"alpha": 1.0}},
    "KL, three times as long": {"init": COPIED, "cache": "record", "loss": {"alpha": 1.0}, "times": 3},
    "labels, three times as long": {"init": COPIED, "cache": "record", "loss": {"alpha": 0.0}, "times": 3},
    "KL, the tail's weight rising": {"init": COPIED, "cache": "record", "loss": {"terms": [BUCKET_FALLS, DROP_RISES]}},
    "KL + cosine of last states": {"init": COPIED, "cache": "states", "loss": {"alpha": 1.0, "terms": [COSINE]}},
    "triple loss": {
        "init": COPIED,
        "cache": "states",
        "loss": {
            "terms": [
                {"term": "divergence", "weight": 5.0, "options": {"temperature": 2.0, "tail": "bucket"}},
                {"term": "cross_entropy", "weight": 2.0},
                COSINE,
            ]
        },
    },
    "exact KL from states": {
        "init": COPIED,
        "cache": "states",
        "loss": {
            "terms": [
                {"term": "exact_kl", "options": {"feature": "hidden_last"}},
                {"term": "cross_entropy", "weight": 0.0},
            ]
        },
    },
}
"""How a student begins, what it learns from, its loss, and how many times the steps of the others it trains.

The triple loss is DistilBERT's, with its weights: the teacher's soft distribution (of `threshold` the exact entries, since
drawn ones stand for temperature 1), the text, the last states.
"""

PROBED_TAUS = (0.3, 0.1, 0.03, 0.01)
SELECTED_TOKENS = 4096
"""Of text held back, on which layers are chosen."""


def teacher_model(plan: dict[str, Any]) -> PreTrainedModel:
    return load_model(plan["teacher"], field="--teacher", dtype=torch.float32, attn_implementation="sdpa").eval()


def capture_config(plan: dict[str, Any], cache: str, tau: float | None = None) -> CaptureConfig:
    """Of a cache: `record`, the entries alone, or `states`, which has the teacher's last hidden states too."""
    fields: dict[str, Any] = {
        "input": {"format": "jsonl", "paths": [f"{plan['teacher']}/text/heldback.jsonl"], "limit": plan["max_texts"],
                  "window": {"size": plan["seq_len"]}},
        "teacher": {"model": plan["teacher"], "backend": "transformers", "dtype": "float32", "tokens_per_forward": 4096,
                    "num_threads": 1},
        "selection": {"kind": "threshold", "tau": tau or plan["tau"]},
        "codec": {"id": "archive", "bits": 8},
        "out": str(Path(plan["work"]) / "caches" / cache),
    }  # fmt: skip
    if cache == "states":
        fields["selection"]["temperatures"] = [2.0]
        fields["features"] = [{"layer": -1, "dtype": "float16"}]
        fields["sidecars"] = ["output_projection"]
    return convert_config(fields, CaptureConfig)


def calibrate(plan: dict[str, Any]) -> float:
    """The tau at which a position takes MAX_BYTES, a little below: the sequences that are probed are not all of the text."""
    rates = [
        math.log(estimate_capture(capture_config(plan, "record", tau), probe=True).bytes_per_position) for tau in PROBED_TAUS
    ]
    return float(np.exp(np.interp(math.log(0.95 * MAX_BYTES), rates, np.log(PROBED_TAUS))))


def choose_layers(plan: dict[str, Any]) -> list[int]:
    """As many layers as MAX_SHARE allows: the one whose absence costs least is taken away, again and again.

    By the loss, untrained, on text held back from teacher and evaluation alike.
    """
    model, path = teacher_model(plan), f"{plan['teacher']}/text/heldback.jsonl"
    text = read_heldout(path, load_tokenizer(plan["teacher"]), window=plan["seq_len"], max_tokens=SELECTED_TOKENS)
    layers, kept = list(model.model.layers), list(range(len(model.model.layers)))

    def loss_of(numbers: list[int]) -> float:
        model.model.layers = nn.ModuleList(layers[i] for i in numbers)
        return heldout_nats_per_token(model, text)

    while len(kept) > math.floor(MAX_SHARE * len(layers)):
        left = {layer: loss_of([i for i in kept if i != layer]) for layer in kept}
        kept.remove(min(left, key=lambda layer: left[layer]))
    return kept


def capture(plan: dict[str, Any], cache: str) -> dict[str, float]:
    """Capture what is not captured yet; bytes per position: entries and scalars, vectors, text and framing apart."""
    config = capture_config(plan, cache)
    run_capture(config)
    summary = summarize_cache(config.out)
    columns = dict(summary.column_bytes_per_position)
    text = sum(columns.pop(name, 0.0) for name in ("key", "source", "input_ids", "supervised", "roles", "turn_starts"))
    framing = columns.pop("framing") + columns.pop("digest", 0.0)
    vectors = sum(size for name, size in columns.items() if name.startswith("feature"))
    return {"bytes": sum(columns.values()) - vectors, "vectors": vectors, "text": text, "framing": framing,
            "entries": summary.entries_per_position, "positions": summary.num_positions}  # fmt: skip


def train_config(plan: dict[str, Any], name: str, seed: int) -> TrainConfig:
    setting = SETTINGS[name]
    steps = plan["steps"] * setting.get("times", 1)
    student: dict[str, Any] = {
        "model": plan["teacher"],
        "init": "random",
        "overrides": {"num_hidden_layers": len(plan["layers"])},
    }
    if setting["init"] == COPIED:
        student = {"model": plan["teacher"], "init": "from_teacher", "layers": {"keep": plan["layers"]}}
    fields: dict[str, Any] = {
        "cache": capture_config(plan, setting["cache"]).out,
        "out": str(run_folder(plan, name, seed)),
        "student": {"model": plan["teacher"], **student},
        "loader": {"seq_len": plan["seq_len"], "batch_rows": plan["batch_rows"], "seed": seed},
        "loss": setting["loss"],
        "optimizer": {"lr": plan["lr"] if setting["init"] == COPIED else plan["random_lr"], "betas": [0.9, plan["beta2"]],
                      "final_fraction": 0.02},
        "steps": steps,
        "seed": seed,
        "device": plan["device"],
        "dtype": plan["dtype"],
        "checkpoint_every_steps": 250,
        "heldout": {"data": f"{plan['teacher']}/text/heldout.jsonl", "every_steps": max(1, steps // 4),
                    "max_tokens": 2500, "window": plan["seq_len"]},
    }  # fmt: skip
    return convert_config(fields, TrainConfig)


def run_folder(plan: dict[str, Any], name: str, seed: int) -> Path:
    return Path(plan["work"]) / "students" / f"{''.join(c if c.isalnum() else '-' for c in name)}-seed{seed}"


def result_path(plan: dict[str, Any], name: str, seed: int) -> Path:
    folder = run_folder(plan, name, seed)
    return folder.with_name(f"{folder.name}.json")


def heldout_text(plan: dict[str, Any]) -> list[HeldoutSequence]:
    path = f"{plan['teacher']}/text/heldout.jsonl"
    return read_heldout(path, load_tokenizer(plan["teacher"]), window=plan["seq_len"], max_tokens=plan["heldout_tokens"])


def by_text(values_S: NDArray[np.float64], text: list[HeldoutSequence]) -> list[float]:
    """Sums over the sequences of each text."""
    _, text_S = np.unique([sequence.text for sequence in text], return_inverse=True)
    return np.bincount(text_S, weights=np.asarray(values_S, np.float64)).tolist()


def score(plan: dict[str, Any], student: PreTrainedModel) -> dict[str, Any]:
    """Sums per held-out text of a student, of its teacher and of the unigram of the cache's text."""
    text, tokenizer, teacher = heldout_text(plan), load_tokenizer(plan["teacher"]), teacher_model(plan)
    unigram = read_unigram(capture_config(plan, "record").out, tokenizer, vocab_size=tokenizer.identity.vocab_size)
    scores = score_models(teacher, {"student": student}, text)
    sums = {"tokens": by_text(np.array([s.num_targets for s in text]), text), "unigram": by_text(unigram.nll_S(text), text)}
    for name, of in scores.items():
        sums |= {f"{name} {field}": by_text(getattr(of, f"{field}_S"), text) for field in ("nll", "kl", "agreement", "correct")}
    return {"sums": sums, "size": {"student": model_size(student), "teacher": model_size(teacher)}}


def train_and_score(plan: dict[str, Any], name: str, seed: int, deadline: float) -> str | None:
    """One student, into its file; what to say of it, or None where the time is over."""
    if time.time() > deadline:
        return None
    torch.set_num_threads(1)
    path, config = result_path(plan, name, seed), train_config(plan, name, seed)
    started = time.process_time()
    run = train(config, show_progress=False)
    seconds = time.process_time() - started
    student = load_model(str(run.model), field="student", dtype=torch.float32, attn_implementation="sdpa").eval()
    curve = [
        (line["tokens"], line["heldout_nats_per_token"])
        for line in read_metrics(config.out)
        if "heldout_nats_per_token" in line
    ]
    result = {**score(plan, student), "curve": curve, "tokens": run.num_tokens, "train_cpu_seconds": seconds}
    path.with_suffix(".partial").write_text(json.dumps(result) + "\n")
    path.with_suffix(".partial").replace(path)
    sums = {key: sum(values) for key, values in result["sums"].items()}
    kept = (sums["unigram"] - sums["student nll"]) / (sums["unigram"] - sums["teacher nll"])
    accuracy = sums["student correct"] / sums["teacher correct"]
    return f"{name}, seed {seed}: keeps {kept:.1%} of the nats, {accuracy:.1%} of the accuracy; {seconds:.0f} CPU s"
