"""Small caches and training configs for the tests of this room."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from kdcache.config.load import convert_config
from kdcache.config.train import TrainConfig
from kdcache.format.manifest import CodecInfo, Identity, Manifest, PlanInfo, SelectionInfo, TeacherIdentity
from kdcache.format.record import NO_TARGET, SequenceRecord, TokenSequence, distributions_from_dense, sequence_key
from kdcache.store.writing.writer import CacheWriter
from kdcache.teacher import load_tokenizer
from kdcache.teacher.select.reference import select_reference
from kdcache.teacher.select.uniforms import position_states

VOCAB_SIZE = 520


def load_teacher_model(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def write_cache(
    path: Path,
    teacher_dir: Path,
    *,
    k: int = 0,
    num_sequences: int,
    longest: int = 40,
    num_units: int = 1,
    selection: SelectionInfo | None = None,
) -> Path:
    """Random token sequences of 5..longest tokens, every position supervised, captured with the teacher's dense logprobs.

    The top k, or what another selection keeps. All are in unit 0; with num_units above 1 the cache is not complete.
    """
    teacher = load_teacher_model(teacher_dir)
    identity = Identity(
        teacher=TeacherIdentity(
            model=teacher_dir.name,
            architecture="LlamaForCausalLM",
            vocab_size=VOCAB_SIZE,
            dtype="float32",
            engine="transformers",
            engine_version="test",
            context_length=256,
        ),
        tokenizer=load_tokenizer(str(teacher_dir)).identity,
        selection=selection or SelectionInfo(kind="top_k", params={"k": k}),
        codec=CodecInfo(codec_id="raw", params={"vocab_size": VOCAB_SIZE}),
        input_fingerprint="test",
    )
    manifest = Manifest(number=0, parent=None, identity=identity, plan=PlanInfo(fingerprint="test", num_units=num_units))
    writer = CacheWriter.open(path, manifest)
    records = _records(teacher, k or VOCAB_SIZE, num_sequences, longest)
    writer.write_unit(0, records if selection is None else (_selected(record, selection) for record in records))
    writer.fold()
    return path


def _records(teacher: PreTrainedModel, k: int, num_sequences: int, longest: int) -> Iterator[SequenceRecord]:
    generator = np.random.Generator(np.random.Philox(key=7))
    for number in range(num_sequences):
        ids_N = generator.integers(0, 512, size=int(generator.integers(5, longest + 1))).astype(np.int32)
        supervised_N = np.ones(len(ids_N), bool)
        sequence = TokenSequence(
            input_ids_N=ids_N,
            supervised_N=supervised_N,
            roles_N=np.zeros(len(ids_N), np.uint8),
            turn_starts=np.zeros(1, np.int32),
            source=f"random#{number}",
            key=sequence_key(ids_N, supervised_N, ""),
        )
        with torch.no_grad():
            logits_NV = teacher(torch.from_numpy(ids_N).long()[None]).logits[0]
        logprobs_NV = torch.log_softmax(logits_NV.double(), dim=-1)
        top = logprobs_NV.topk(k)
        targets_N = sequence.target_ids_P
        target_logprobs_N = logprobs_NV.gather(
            1, torch.from_numpy(np.where(targets_N == NO_TARGET, 0, targets_N)).long()[:, None]
        )
        distributions = distributions_from_dense(
            top.indices.numpy(), top.values.numpy(), targets_N, target_logprobs_N[:, 0].numpy()
        )
        yield SequenceRecord(sequence, distributions)


def _selected(record: SequenceRecord, selection: SelectionInfo) -> SequenceRecord:
    """A record with the whole vocabulary as support, as another selection would have made it."""
    dense, num_positions = record.distributions, record.distributions.num_positions
    logprobs_PV = np.empty((num_positions, VOCAB_SIZE))
    logprobs_PV[np.repeat(np.arange(num_positions), VOCAB_SIZE), dense.token_ids_E] = dense.logprobs_E
    states_P = position_states(0, record.sequence.key, np.arange(num_positions))
    distributions = select_reference(logprobs_PV, record.sequence.target_ids_P, selection, states_P)
    return SequenceRecord(record.sequence, distributions)


def train_config(cache: Path, teacher_dir: Path, out: Path, **changes: Any) -> TrainConfig:
    """A student of one layer on rows of 64 tokens; `changes` replaces whole sections or single settings, as in steps=3."""
    fields: dict[str, Any] = {
        "cache": str(cache),
        "out": str(out),
        "student": {
            "model": str(teacher_dir),
            "overrides": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1},
        },
        "loader": {"seq_len": 64, "batch_rows": 2, "num_threads": 1, "seed": 3},
        "optimizer": {"lr": 1e-2, "warmup_fraction": 0.2},
        "steps": 8,
        "num_threads": 1,
        "checkpoint_every_steps": 3,
    }
    return convert_config(fields | changes, TrainConfig)
