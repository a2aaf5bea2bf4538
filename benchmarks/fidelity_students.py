"""The parts of fidelity.py: what is captured, what a student learns from, and how it is scored.

A plan is the dict that fidelity.py makes of its options and keeps in the work folder.

Shape letters: B rows, T tokens per row, P predicted positions, H hidden, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from kdcache.capture.estimate import estimate_capture
from kdcache.capture.executors.run import run_capture
from kdcache.config.capture import (
    CaptureConfig,
    CodecConfig,
    InputConfig,
    SelectionConfig,
    TeacherConfig,
    WindowConfig,
)
from kdcache.config.load import convert_config
from kdcache.config.loader import LoaderConfig
from kdcache.config.train import LossConfig, OptimizerConfig, StudentConfig, TrainConfig
from kdcache.loader.loader import Loader
from kdcache.loader.torch_batches import TorchBatch, to_torch
from kdcache.store.reader import open_reader
from kdcache.store.summary import summarize_cache
from kdcache.teacher import load_tokenizer
from kdcache.train.body import hidden_states, output_projection
from kdcache.train.evaluation.heldout import HeldoutSequence, read_heldout
from kdcache.train.evaluation.scores import score_models
from kdcache.train.packed import logits_head
from kdcache.train.schedule import learning_rate
from kdcache.train.step import BatchLoss, make_optimizer, optimize
from kdcache.train.student import build_student, load_model

ARCHIVE = {"id": "archive", "bits": 8}
CACHES: dict[str, dict[str, Any]] = {
    "top_k 16": {"kind": "top_k", "k": 16},
    "top_k 64": {"kind": "top_k", "k": 64},
    "top_k 16 archive": {"kind": "top_k", "k": 16, "codec": ARCHIVE},
    "top_p 0.95, 100": {"kind": "top_p_k", "p": 0.95, "k": 100},
    "sampled 50": {"kind": "sampled", "num_draws": 50},
    "top_k_sampled 4+16": {"kind": "top_k_sampled", "k": 4, "num_draws": 16, "codec": ARCHIVE},
    "threshold 8 B": {"kind": "threshold", "bytes": 8, "codec": ARCHIVE},
    "threshold 12 B": {"kind": "threshold", "bytes": 12, "codec": ARCHIVE},
    "threshold 24 B": {"kind": "threshold", "bytes": 24, "codec": ARCHIVE},
    "threshold 24 B packed": {"kind": "threshold", "bytes": 24, "codec": {"id": "packed"}},
    "whole": {"kind": "top_k", "k": 10**6, "codec": {"id": "raw"}},
}
"""What is captured; `bytes` stands for the tau that takes so many per position. Packed where no codec is named."""

DROP = {"tail": "drop"}
BUCKET_FALLS, DROP_RISES = (
    {"term": "divergence", "weight": {"schedule": "linear", "start": start, "end": 1 - start}, "options": {"tail": tail}}
    for start, tail in ((1.0, "bucket"), (0.0, "drop"))
)
"""Together a KL whose tail has the student's own shape at first (the bucket says its mass alone), and the drawn entries' at
last: with weight w the drawn entries' part of the gradient is w times as large, and so is its noise."""
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "labels": ("top_k 16", {"alpha": 0.0}),
    "live": ("top_k 16", {}),
    "top_k 16, bucket": ("top_k 16", {}),
    "top_k 16, renormalised": ("top_k 16", {"tail": "renormalize"}),
    "top_k 64, bucket": ("top_k 64", {}),
    "top_k 64, renormalised": ("top_k 64", {"tail": "renormalize"}),
    "top_k 16 archive, bucket": ("top_k 16 archive", {}),
    "top_p 0.95 of 100, bucket": ("top_p 0.95, 100", {}),
    "sampled 50": ("sampled 50", DROP),
    "top_k_sampled 4+16 archive": ("top_k_sampled 4+16", DROP),
    "threshold 8 B archive": ("threshold 8 B", DROP),
    "threshold 12 B archive": ("threshold 12 B", DROP),
    "threshold 24 B archive": ("threshold 24 B", DROP),
    "threshold 24 B packed": ("threshold 24 B packed", DROP),
    "threshold 24 B archive, tail-aware": ("threshold 24 B", {"divergence": "tail_aware_kl"}),
    "threshold 24 B archive, tail rising": ("threshold 24 B", {"terms": [BUCKET_FALLS, DROP_RISES]}),
}
"""Cache and loss of each kind of student. `labels` and `live` take nothing but the text from theirs."""
QUICK = {name: SETTINGS[name] for name in [*list(SETTINGS)[:4], "sampled 50", "threshold 24 B archive, tail-aware"]} | {
    "whole distribution, raw": ("whole", {})
}
PROBED_TAUS = (0.6, 0.3, 0.1, 0.03, 0.01)


def capture_config(plan: dict[str, Any], cache: str, **selection: Any) -> CaptureConfig:
    """Of a cache; `selection` replaces what CACHES says, where tau is not known yet."""
    stated = {"tau": plan["taus"][cache]} if cache in plan.get("taus", {}) else {}
    fields = {k: v for k, v in CACHES[cache].items() if k not in ("codec", "bytes")} | stated | selection
    if cache == "whole":
        fields["k"] = load_tokenizer(plan["teacher"]).identity.vocab_size
    return CaptureConfig(
        input=InputConfig(format="jsonl", paths=(f"{plan['teacher']}/text/heldback.jsonl",), limit=plan["max_texts"],
                          window=WindowConfig(size=plan["seq_len"])),
        teacher=TeacherConfig(model=plan["teacher"], backend="transformers", dtype="float32", tokens_per_forward=4096,
                              num_threads=1),
        selection=SelectionConfig(**fields),
        codec=CodecConfig(**CACHES[cache].get("codec", {})),
        out=str(Path(plan.get("caches", Path(plan["work"]) / "caches")) / cache.replace(" ", "-")),
    )  # fmt: skip


def calibrate(plan: dict[str, Any], caches: list[str]) -> dict[str, float]:
    """The tau of each cache that is given in bytes: measured at PROBED_TAUS on a few sequences, between them log-linear.

    A little below it: the sequences that are probed are not all of the text.
    """
    taus, curves = {}, {}
    for cache in (cache for cache in caches if "bytes" in CACHES[cache]):
        codec = str(CACHES[cache]["codec"])
        if codec not in curves:
            configs = [capture_config(plan, cache, tau=tau) for tau in PROBED_TAUS]
            curves[codec] = [math.log(estimate_capture(config, probe=True).bytes_per_position) for config in configs]
        taus[cache] = float(np.exp(np.interp(math.log(0.97 * CACHES[cache]["bytes"]), curves[codec], np.log(PROBED_TAUS))))
    return taus


def capture(plan: dict[str, Any], cache: str, deadline: float) -> str | None:
    """Capture what is not captured yet; None where the time is over."""
    if time.time() > deadline:
        return None
    torch.set_num_threads(1)
    run_capture(capture_config(plan, cache))
    return f"{cache}: {cost(plan, cache)['bytes']:.1f} bytes per position"


def cost(plan: dict[str, Any], cache: str) -> dict[str, float]:
    """Bytes per position of a cache, in three parts; nothing where it is not there."""
    path = Path(capture_config(plan, cache).out)
    if not path.exists():
        return {}
    summary = summarize_cache(path)
    columns = dict(summary.column_bytes_per_position)
    text = sum(columns.pop(name, 0.0) for name in ("key", "source", "input_ids", "supervised", "roles", "turn_starts"))
    framing = columns.pop("framing") + columns.pop("digest", 0.0)
    return {"bytes": sum(columns.values()), "text": text, "framing": framing, "entries": summary.entries_per_position,
            "positions": summary.num_positions}  # fmt: skip


def logits_PV(model: PreTrainedModel, batch: TorchBatch) -> Tensor:
    hidden_BTH = hidden_states(model, batch.input_ids_BT, batch.position_ids_BT)
    return output_projection(model)(hidden_BTH.flatten(0, 1)[batch.flat_positions_P]).float()


def live_step(
    model: PreTrainedModel, teacher: PreTrainedModel, optimizer: torch.optim.Optimizer, batch: TorchBatch, config: TrainConfig
) -> None:
    """A step as `optimize` takes it, towards the teacher's whole softmax; the learning rate is set already."""
    with torch.no_grad():
        teacher_PV = logits_PV(teacher, batch).log_softmax(-1)
    loss = functional.kl_div(logits_PV(model, batch).log_softmax(-1), teacher_PV, reduction="batchmean", log_target=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.grad_clip or math.inf)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def train_student(config: TrainConfig, teacher: PreTrainedModel | None) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A student after all steps, from the cache or, with a teacher, from that; and a digest of the ids that it has read."""
    model = build_student(config.student, seed=config.seed).to(config.device).train()  # pyright: ignore[reportArgumentType]
    optimizer, digest, done, started = make_optimizer(model, config.optimizer), hashlib.sha256(), 0, time.process_time()
    steps, loss_of = config.steps or 0, BatchLoss(config.loss, logits_head(model))
    with open_reader(config.cache) as reader, Loader(reader, config.loader) as loader:
        while done < steps:  # each loop is an epoch
            for arrays in loader:
                digest.update(arrays.input_ids_BT.tobytes())
                batch, rate = to_torch(arrays).to(config.device), learning_rate(done, steps, config.optimizer)
                if teacher is None:
                    optimize(model, optimizer, batch, config, rate, loss_of, (done, steps))
                else:
                    for group in optimizer.param_groups:
                        group["lr"] = rate
                    live_step(model, teacher, optimizer, batch, config)
                done += 1
                if done == steps:
                    break
    return model.eval(), {"text_digest": digest.hexdigest()[:16], "train_cpu_seconds": time.process_time() - started}


def result_path(plan: dict[str, Any], setting: str, seed: int) -> Path:
    """Of a student's scores."""
    name = "".join(c if c.isalnum() else "-" for c in setting)
    return Path(plan["work"]) / "students" / f"{name}-seed{seed}.json"


def train_and_score(plan: dict[str, Any], setting: str, seed: int, deadline: float) -> str | None:
    """One student, into its file; what to say of it, or None where the time is over."""
    path = result_path(plan, setting, seed)
    if time.time() > deadline:
        return None
    torch.set_num_threads(1)
    cache, loss = (SETTINGS | QUICK)[setting]
    folder, hidden = plan["teacher"], plan["hidden_size"]
    overrides = {"hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": plan["num_layers"],
                 "num_attention_heads": hidden // 64}  # fmt: skip
    config = TrainConfig(
        cache=capture_config(plan, cache).out, out="", seed=seed, steps=plan["steps"], device=plan["device"],
        student=StudentConfig(model=folder, overrides=overrides), loss=convert_config(loss, LossConfig),
        loader=LoaderConfig(seq_len=plan["seq_len"], batch_rows=plan["batch_rows"], seed=seed, num_threads=1),
        optimizer=OptimizerConfig(lr=plan["lr"], betas=(0.9, plan["beta2"]), final_fraction=0.05),
    )  # fmt: skip
    teacher = load_model(folder, field="--teacher", dtype=torch.float32, attn_implementation="sdpa").eval()
    teacher.to(config.device)  # pyright: ignore[reportArgumentType]
    model, trained = train_student(config, teacher if setting == "live" else None)
    text = read_heldout(f"{folder}/text/heldout.jsonl", load_tokenizer(folder), window=plan["seq_len"],
                        max_tokens=plan["heldout_tokens"])  # fmt: skip
    scores, count = score_models(teacher, {"student": model}, text)["student"], sum(s.num_targets for s in text)
    result = {"loss": scores.nll_S.sum() / count, "kl": scores.kl_S.sum() / count,
              "agreement": scores.agreement_S.sum() / count, "ece": calibration_error(*confidences(model, text)),
              **trained}  # fmt: skip
    path.parent.mkdir(exist_ok=True, parents=True)
    path.with_suffix(".partial").write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".partial").replace(path)
    return f"{setting}, seed {seed}: loss {result['loss']:.4f}, KL {result['kl']:.4f}, {trained['train_cpu_seconds']:.0f} CPU s"


@torch.no_grad()
def confidences(model: PreTrainedModel, text: list[HeldoutSequence]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """At each predicted token the probability of the likeliest one, and whether that came."""
    highest, came = [], []
    for sequence in text:
        ids_T = torch.from_numpy(sequence.input_ids_N).to(model.device)
        confidence_P, best_P = model(input_ids=ids_T[None, :-1], use_cache=False).logits[0].float().softmax(-1).max(-1)
        highest.append(confidence_P.double().cpu().numpy())
        came.append((best_P == ids_T[1:]).cpu().numpy())
    return np.concatenate(highest), np.concatenate(came)


def calibration_error(confidence_P: NDArray[np.float64], correct_P: NDArray[np.bool_], bins: int = 15) -> float:
    """The ECE of above; a bin holds confidences of (i / bins, (i + 1) / bins]."""
    bin_P = np.clip(np.ceil(confidence_P * bins).astype(int) - 1, 0, bins - 1)
    gaps = np.bincount(bin_P, weights=correct_P - confidence_P, minlength=bins)
    return float(np.abs(gaps).sum() / len(confidence_P))
