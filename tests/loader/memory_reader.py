"""A small cache in memory whose token ids say where they come from, and comparisons of batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import msgspec
import numpy as np

from kdcache.errors import ConfigError
from kdcache.format.manifest import (
    CodecInfo,
    Identity,
    Manifest,
    PlanInfo,
    SelectionInfo,
    ShardInfo,
    TeacherIdentity,
    TokenizerIdentity,
)
from kdcache.format.record import NO_TARGET, ROLES, Distributions, SequenceRecord, TokenSequence, sequence_key
from kdcache.format.soft_targets import SoftTargets
from kdcache.loader.batches.batch import Batch

STRIDE = 1000
"""Token t of sequence i has the id i * STRIDE + t + 1, so that a batch can be checked without the code that made it."""


def token_id(sequence: int, t: int) -> int:
    return sequence * STRIDE + t + 1


def make_record(
    number: int, length: int, *, k: int, supervised: str = "random", ragged: bool = False, chat: bool = False
) -> SequenceRecord:
    """Deterministic; `supervised` is `all`, `none` or `random`, `ragged` gives 0..k entries, `chat` roles and turns."""
    rng = np.random.default_rng([number, length])
    ids_N = np.array([token_id(number, t) for t in range(length)], np.int32)
    masks = {"all": np.ones(length, bool), "none": np.zeros(length, bool), "random": rng.random(length) < 0.7}
    supervised_N = masks[supervised]
    turn_starts = np.flatnonzero(rng.random(length) < 0.4) if chat else np.zeros(1)
    roles_N = np.zeros(length, np.uint8)
    for start in turn_starts.astype(int) if chat else ():
        roles_N[start:] = rng.integers(0, len(ROLES))
    sequence = TokenSequence(
        input_ids_N=ids_N,
        supervised_N=supervised_N,
        roles_N=roles_N,
        turn_starts=turn_starts.astype(np.int32),
        source=f"memory#{number}",
        key=sequence_key(ids_N, supervised_N, ""),
    )
    return SequenceRecord(sequence, _distributions(sequence, k, ragged, rng))


def _distributions(sequence: TokenSequence, k: int, ragged: bool, rng: np.random.Generator) -> Distributions:
    num_positions = len(sequence.positions_P)
    counts_P = rng.integers(0, k + 1, num_positions) if ragged else np.full(num_positions, k)
    logprobs = [np.sort(np.log(rng.random(n) / (k + 1)))[::-1] for n in counts_P]
    ids = [rng.choice(100_000, n, replace=False) for n in counts_P]
    return Distributions(
        token_ids_E=np.concatenate([*ids, np.zeros(0)]).astype(np.int32),
        logprobs_E=np.concatenate([*logprobs, np.zeros(0)]).astype(np.float32),
        offsets_P1=np.append(0, np.cumsum(counts_P)).astype(np.int64),
        tail_mass_P=rng.random(num_positions).astype(np.float32),
        # No id of a support is a target's: those are made of STRIDE, and none of these tests asks for the NLL.
        outside_target_logprobs=np.full(int((sequence.target_ids_P != NO_TARGET).sum()), -9.0, np.float32),
    )


def make_shards(sizes: Sequence[int]) -> tuple[ShardInfo, ...]:
    """Shards that only their numbers of sequences are looked at."""
    names = [
        f.name for f in msgspec.structs.fields(ShardInfo) if f.required and f.name.startswith(("num_", "entropy_", "tail_"))
    ]
    zeros: dict[str, Any] = {"target_logprob_sum": 0.0, "column_bytes": {}} | dict.fromkeys(names, 0)
    return tuple(ShardInfo(**zeros | {"unit": u, "name": "", "sha256": "", "num_sequences": n}) for u, n in enumerate(sizes))


def make_manifest(
    num_sequences: int,
    *,
    k: int,
    kind: str = "top_k",
    shards: Sequence[int] = (),
    tokenizer: str = "0",
    vocab_size: int = 2**20,
    num_units: int = 1,
) -> Manifest:
    teacher = TeacherIdentity(
        model="memory",
        architecture="None",
        vocab_size=vocab_size,
        dtype="float32",
        engine="fake",
        engine_version="0",
        context_length=999,
    )
    identity = Identity(
        teacher=teacher,
        tokenizer=TokenizerIdentity(name="memory", fingerprint=tokenizer, vocab_size=vocab_size),
        selection=SelectionInfo(kind=kind, params={"k": k} if kind == "top_k" else {"p": 1.0, "k": k}),
        codec=CodecInfo(codec_id="raw", params={"vocab_size": 2**20}),
        input_fingerprint=str(num_sequences),
    )
    plan = PlanInfo(fingerprint="0", num_units=num_units)
    return Manifest(number=0, parent=None, identity=identity, plan=plan, shards=make_shards(shards))


class MemoryReader:
    """Obeys `kdcache.loader.base.Reader`; can be pickled. `reads` lists the sequences that were asked for."""

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        k: int = 3,
        first: int = 0,
        identity: dict[str, Any] | None = None,
        **record_options: Any,
    ) -> None:
        """`first` is what the first sequence's ids are made of, so that those of several caches differ."""
        self.manifest = make_manifest(len(lengths), k=k, **(identity or {}))
        self.snapshot = self.manifest.digest
        self.records = [make_record(first + i, n, k=k, **record_options) for i, n in enumerate(lengths)]
        self.groups_S = None
        self.num_tokens_S = np.array(lengths, np.uint32)
        self.num_positions_S = np.array([r.distributions.num_positions for r in self.records], np.uint32)
        self.reads: list[int] = []

    ahead = None

    def sidecar(self, name: str) -> dict[str, Any]:
        raise ConfigError(f"a cache in memory has no sidecar {name!r}")

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int, /) -> SequenceRecord:
        self.reads.append(index)
        return self.records[index]

    def encoded(self, index: int, /) -> SequenceRecord:
        return self[index]

    def mapped(self, indices: Any, /) -> None:
        return None

    def close(self) -> None:
        pass


def assert_same(left: Batch, right: Batch) -> None:
    """Every field equal: shape, dtype and each element."""
    for name, a, b in parts_of_both(left, right):
        np.testing.assert_array_equal(a, b, err_msg=name, strict=isinstance(a, np.ndarray))


def parts_of_both(left: Batch, right: Batch) -> list[tuple[str, Any, Any]]:
    """Name and value of each field of both, those of the soft targets among them; what an assembled batch lacks is left out."""
    missing = {"sequence_indices_S"} if left.sequence_indices_S is None or right.sequence_indices_S is None else set()
    named = [(field.name, left, right) for field in fields(Batch) if field.name not in {"teacher", *missing}]
    named += [(field.name, left.teacher, right.teacher) for field in fields(SoftTargets)]
    return [(name, getattr(a, name), getattr(b, name)) for name, a, b in named]


def assert_same_stream(left: Sequence[Batch], right: Sequence[Batch]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert_same(a, b)


def sequences_of(batch: Batch) -> list[int]:
    """The sequences in a batch, row after row, read from their first tokens."""
    firsts = (batch.segment_ids_BT > 0) & (batch.position_ids_BT == 0)
    return [int(token) // STRIDE for token in batch.input_ids_BT[firsts]]
