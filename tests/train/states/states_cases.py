"""Tiny Llama models, packed batches, and a teacher's features of them as a cache would hold them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from kdcache.format.feature_vectors import FeatureVectors
from kdcache.format.identity import FeatureInfo
from kdcache.format.manifest import CodecInfo, Identity, Manifest, PlanInfo, SelectionInfo, TeacherIdentity, TokenizerIdentity
from kdcache.format.record import NO_TARGET
from kdcache.format.soft_targets import SoftTargets
from kdcache.loader.torch_batches import TorchBatch
from kdcache.loss.fused import Projection
from kdcache.teacher.hf.attention_calls import seen_calls
from kdcache.teacher.hf.heads import seen_heads
from kdcache.train.terms.base import Setting, StudentStates, Term

VOCAB = 40


def tiny(seed: int, *, hidden: int = 32, heads: int = 4, kv_heads: int = 2, layers: int = 2) -> Any:
    """A Llama whose layers do something: its weights are not as small as at the start of a training."""
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=hidden, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.normal_(0.0, 1.5 * weight.shape[1] ** -0.5, generator=generator)
    return model


def batch_of(rows: Sequence[Sequence[int]], *, length: int = 24, masked: Sequence[int] = ()) -> TorchBatch:
    """Packed rows of documents of these lengths; every position is supervised.

    Args:
        rows: lengths of each row's documents.
        length: T.
        masked: of all positions in order, those that a mask leaves out.
    """
    generator = np.random.default_rng(len(rows))
    shape = len(rows), length
    arrays = {name: np.zeros(shape, np.int32) for name in ("input_ids_BT", "position_ids_BT", "segment_ids_BT")}
    targets, starts, slots = np.full(shape, NO_TARGET, np.int32), [], []
    for b, lengths in enumerate(rows):
        t = 0
        for segment, size in enumerate(lengths, 1):
            ids, some = generator.integers(0, VOCAB, size + 1), slice(t, t + size)
            arrays["input_ids_BT"][b, some], arrays["position_ids_BT"][b, some] = ids[:-1], np.arange(size)
            arrays["segment_ids_BT"][b, some], targets[b, some] = segment, ids[1:]
            starts.append(b * length + t)
            slots += range(b * length + t, b * length + t + size)
            t += size
        if t < length:
            starts.append(b * length + t)
    kept = np.delete(np.array(slots, np.int64), list(masked))
    bounds = np.array([*starts, len(rows) * length], np.int32)
    num_sequences = sum(map(len, rows))
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return TorchBatch(
        **tensors,
        cu_seqlens_G1=torch.from_numpy(bounds),
        target_ids_BT=torch.from_numpy(targets),
        flat_positions_P=torch.from_numpy(kept),
        teacher=SoftTargets.of(
            torch.zeros(len(kept), 1).int(), torch.zeros(len(kept), 1), torch.zeros(len(kept)), entries="exact"
        ),
        weights_P=torch.linspace(0.5, 1.5, len(kept)),
        max_seqlen=int(np.diff(bounds).max()),
        num_sequences=num_sequences,
        num_masked=len(masked),
        sequence_indices_S=torch.arange(num_sequences),
    )


def info_of(name: str, model: Any, **fields: Any) -> FeatureInfo:
    """What a cache would say of a feature of this teacher."""
    config, kind = model.config, fields.get("kind", "hidden")
    fields = {"layer": -1 if kind == "hidden" else config.num_hidden_layers, "num_layers": config.num_hidden_layers} | fields
    if kind != "hidden":
        fields["num_heads"] = config.num_key_value_heads if kind in ("keys", "values") else config.num_attention_heads
        fields["head_dim"] = config.head_dim
    size = config.hidden_size if kind == "hidden" else fields["num_heads"] * (fields.get("top_keys") or fields["head_dim"])
    return FeatureInfo(name=name, **{"size": size} | fields)


@torch.no_grad()
def with_features(batch: TorchBatch, model: Any, *infos: FeatureInfo) -> TorchBatch:
    """The batch with the teacher's features, float16 or int8 with a scale per vector."""
    student, made = states_of(model, batch, *map(read_of, infos)), {}
    supervised, tokens = batch.flat_positions_P, (batch.segment_ids_BT.flatten() > 0).nonzero().flatten()
    for info in infos:
        slots = tokens if info.positions == "all" else supervised
        if info.kind == "attention":
            made[info.name] = _top_keys(student.attention(info.layer), batch, info, slots)
            continue
        states = student._read(*read_of(info)).flatten(0, 1).flatten(1)[slots]
        if info.pooling != "none":
            sequences = torch.bucketize(slots, batch.cu_seqlens_G1[1:].long(), right=True)
            groups = [states[sequences == s] for s in sequences.unique()]
            states = torch.stack([group.mean(0) if info.pooling == "mean" else group[-1] for group in groups])
            slots = torch.arange(len(states))
        made[info.name] = _stored(info, states, slots)
    return replace(batch, features=made)


def _stored(info: FeatureInfo, states: Tensor, slots: Tensor) -> FeatureVectors[Tensor]:
    if info.dtype == "int8":
        scale = states.abs().amax(dim=1).clamp_min(1e-12) / 127
        return FeatureVectors(info, (states / scale[:, None]).round().to(torch.int8), slots, scale_F=scale)
    return FeatureVectors(info, states.to(getattr(torch, info.dtype)), slots)


def _top_keys(call: Any, batch: TorchBatch, info: FeatureInfo, slots: Tensor) -> FeatureVectors[Tensor]:
    length = batch.input_ids_BT.shape[1]
    rows = [call.top_keys(b, slots[slots // length == b] % length, info.top_keys) for b in range(len(batch.input_ids_BT))]
    masses, distances = (torch.cat(parts) for parts in zip(*rows, strict=True))
    return FeatureVectors(info, masses.to(getattr(torch, info.dtype)), slots, distances_FH=distances)


def read_of(info: FeatureInfo) -> Any:
    """What is read off a model for a feature."""
    return info.kind, info.layer


def states_of(model: Any, batch: TorchBatch, *reads: Any) -> StudentStates:
    """What a term gets of a student, with gradients."""
    layers = sorted({layer for kind, layer in reads if kind == "attention"})
    heads = [read for read in reads if read[0] not in ("attention", "hidden")]
    with seen_heads(model, heads) as found, seen_calls(model, layers) as calls:
        output = model.model(batch.input_ids_BT, position_ids=batch.position_ids_BT, use_cache=False, output_hidden_states=True)
    last_BTH = output.last_hidden_state
    inner: dict[Any, Any] = {**found, **{("attention", layer): call for layer, call in calls.items()}, ("hidden", -1): last_BTH}
    inner |= {("hidden", i): output.hidden_states[i] for i in range(model.config.num_hidden_layers)}
    return StudentStates(
        hidden_PH=last_BTH.flatten(0, 1)[batch.flat_positions_P],
        projection=Projection(model.lm_head.weight),
        flat_positions_P=batch.flat_positions_P,
        inner=inner,
    )


def manifest_of(*infos: FeatureInfo) -> Manifest:
    """A manifest of a cache with these features."""
    teacher = TeacherIdentity(
        model="tiny", architecture="LlamaForCausalLM", vocab_size=VOCAB, dtype="float32", engine="transformers",
        engine_version="test", context_length=64,
    )  # fmt: skip
    identity = Identity(
        teacher=teacher,
        tokenizer=TokenizerIdentity(name="tiny", fingerprint="test", vocab_size=VOCAB),
        selection=SelectionInfo(kind="top_k", params={"k": 1}),
        codec=CodecInfo(codec_id="raw", params={"vocab_size": VOCAB}),
        input_fingerprint="test",
        features=infos,
    )
    return Manifest(number=0, parent=None, identity=identity, plan=PlanInfo(fingerprint="test", num_units=1))


def setting_of(student: Any, *infos: FeatureInfo, **fields: Any) -> Setting:
    """What a term is told of a student and of a cache with these features."""
    config = student.config
    return Setting(
        **{
            "manifest": manifest_of(*infos), "sidecar": dict, "hidden_size": config.hidden_size,
            "num_layers": config.num_hidden_layers, "num_heads": config.num_attention_heads,
            "num_kv_heads": config.num_key_value_heads, "head_dim": config.head_dim, "vocab_size": VOCAB, "num_sequences": 9,
            "seed": 0, "device": torch.device("cpu"), "pooled_features": None, "student": student, **fields,
        }
    )  # fmt: skip


def set_up(term: Term, student: Any, *infos: FeatureInfo, **fields: Any) -> Term:
    """The term, checked and set up."""
    term.check(manifest_of(*infos))
    term.set_up(setting_of(student, *infos, **fields))
    return term


def value_of(term: Term, student: Any, batch: TorchBatch, weights_P: Tensor | None = None) -> Tensor:
    """What the term adds to a loss: its sum over its count."""
    weights_P = batch.weights_P if weights_P is None else weights_P
    return term(states_of(student, batch, *term.needs().reads), batch, weights_P) / term.count(batch, weights_P)
