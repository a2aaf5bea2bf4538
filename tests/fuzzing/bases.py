"""Sound caches of every codec, over the selections that it stores in its own way: what the fuzzers spoil."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from cache_making import make_identity, make_manifest, make_sequence
from feature_making import features_with, fitted

from kdcache.format.manifest import CodecInfo, FeatureInfo, GenerationInfo, Manifest, ProjectionInfo, SelectionInfo
from kdcache.format.record import SequenceRecord
from kdcache.store.writing.writer import CacheWriter
from kdcache.teacher.base import no_positions
from kdcache.teacher.select.reference import select_reference
from kdcache.teacher.select.uniforms import position_states

VOCAB_SIZE = 97

TOP_K = SelectionInfo(kind="top_k", params={"k": 5})
TOP_P = SelectionInfo(kind="top_p_k", params={"p": 0.8, "k": 6}, entropy=True)
THRESHOLD = SelectionInfo(kind="threshold", params={"tau": 0.05, "seed": 0}, temperatures=(2.0, 0.5), entropy=True)
SAMPLED = SelectionInfo(kind="sampled", params={"num_draws": 12, "seed": 0}, temperatures=(2.0,))
BOTH = SelectionInfo(kind="top_k_sampled", params={"k": 3, "num_draws": 300, "seed": 0})

FEATURES = (
    FeatureInfo(name="last", layer=2, size=6, dtype="int8"),
    FeatureInfo(name="mid", layer=1, size=5, pooling="mean"),
    FeatureInfo(name="all", layer=-1, size=4, num_layers=2, positions="all", stride=2, dtype="bfloat16"),
    FeatureInfo(name="top", kind="attention", layer=2, size=4, num_layers=2, num_heads=2, top_keys=2, max_positions=6),
    FeatureInfo(
        name="fitted", layer=1, size=3, num_layers=2, dtype="int8", scale="channel",
        projection=ProjectionInfo(kind="pca", full_size=8),
    ),
)  # fmt: skip
FITS = fitted(FEATURES)
GENERATION = GenerationInfo(
    temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, n=1, max_tokens=8, stop=(), stop_token_ids=(), ignore_eos=False,
    long_prompts="error", last_answer="error",
)  # fmt: skip
KINDS: Sequence[dict[str, Any]] = (
    {"num_tokens": 12},
    {"num_tokens": 17, "is_chat": True, "supervised": "holes"},
    {"num_tokens": 9, "supervised": "every"},
    {"num_tokens": 1, "supervised": "every"},
    {"num_tokens": 5, "supervised": "none"},
    {"num_tokens": 40},
)


@dataclass(frozen=True)
class Base:
    """What decides a cache's columns."""

    codec: str
    selection: SelectionInfo
    bits: int | None = None
    everything: bool = False

    def write(self, path: Path, *, num_units: int = 2, num_sequences: int = 4) -> Path:
        """The cache, whole, with several record batches in each shard."""
        sidecars = [sidecar for fit in FITS for sidecar in fit.sidecars] if self.everything else []
        writer = CacheWriter.open(str(path), self.first_manifest(num_units), record_batch_bytes=700, sidecars=sidecars)
        for unit in range(num_units):
            writer.write_unit(unit, [self.record(100 * unit + number) for number in range(num_sequences)])
        writer.fold()
        return path

    def first_manifest(self, num_units: int) -> Manifest:
        """Number 0; with `everything`, of a capture that kept features, domains, groups and how answers ended."""
        bits = {} if self.bits is None else {"bits": self.bits}
        identity = msgspec.structs.replace(
            make_identity(vocab_size=VOCAB_SIZE, selection=self.selection),
            codec=CodecInfo(codec_id=self.codec, params={"vocab_size": VOCAB_SIZE, **bits}),
            features=tuple(fit.info for fit in FITS) if self.everything else (),
            generation=GENERATION if self.everything else None,
            domains=self.everything,
            groups=self.everything,
        )
        return make_manifest(num_units, identity)

    def record(self, seed: int) -> SequenceRecord:
        """Chats, plain text, one token, no positions: by turns."""
        sequence = make_sequence(seed, vocab_size=VOCAB_SIZE, **KINDS[seed % len(KINDS)])
        rng, num_positions = np.random.default_rng(seed), len(sequence.positions_P)
        distributions = no_positions(self.selection)
        if num_positions:
            states = position_states(0, b"k" * 16, np.arange(num_positions))
            logits_PV = rng.normal(0.0, 3.0, (num_positions, VOCAB_SIZE))
            distributions = select_reference(logits_PV, sequence.target_ids_P, self.selection, states)
        if self.everything:
            distributions = replace(distributions, features=features_with(seed, SequenceRecord(sequence, distributions), FITS))
            sequence = replace(sequence, finish=("stop", "length")[seed % 2], domain=("wiki", "code")[seed % 2])
            sequence = replace(sequence, group=bytes([seed // 2 % 256]) * 16, preference=("chosen", "rejected")[seed % 2])
            sequence = replace(sequence, group=b"", preference="") if not any(sequence.group) else sequence
        return SequenceRecord(sequence, distributions)


BASES = {
    "raw top_k": Base("raw", TOP_K),
    "raw everything": Base("raw", TOP_K, everything=True),
    "packed top_k": Base("packed", TOP_K),
    "packed top_p_k": Base("packed", TOP_P),
    "packed threshold": Base("packed", THRESHOLD),
    "packed sampled": Base("packed", SAMPLED),
    "packed top_k_sampled": Base("packed", BOTH),
    "packed everything": Base("packed", TOP_K, everything=True),
    "quantized 4 top_k_sampled": Base("quantized", BOTH, 4),
    "quantized 5 top_p_k": Base("quantized", TOP_P, 5),
    "quantized 8 threshold": Base("quantized", THRESHOLD, 8),
    "archive 4 top_k": Base("archive", TOP_K, 4),
    "archive 8 sampled": Base("archive", SAMPLED, 8),
    "archive 16 top_p_k": Base("archive", TOP_P, 16),
    "archive 6 threshold": Base("archive", THRESHOLD, 6),
    "archive 16 top_k_sampled": Base("archive", BOTH, 16),
}
