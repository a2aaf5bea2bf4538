"""Small caches and records with known content, for the tests of every room. Imports numpy and kdcache's format and store alone.

Everything is a pure function of its arguments: two processes that ask for the same record get the same bytes.
Shape letters: N tokens, P positions, E entries, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kdcache.format.manifest import CodecInfo, Identity, Manifest, PlanInfo, SelectionInfo, TeacherIdentity, TokenizerIdentity
from kdcache.format.record import NO_TARGET, ROLES, Distributions, SequenceRecord, TokenSequence, sequence_key

VOCAB_SIZE = 97
K = 5


def make_sequence(
    seed: int,
    *,
    num_tokens: int = 12,
    vocab_size: int = VOCAB_SIZE,
    supervised: str = "all",
    is_chat: bool = False,
    source: str | None = None,
) -> TokenSequence:
    """A sequence of random ids.

    Args:
        supervised: `all` but the last position, `none`, `every` (the last one too), or `holes` (about half, at random).
        is_chat: with roles and several turns, else plain text.
    """
    rng = np.random.default_rng((seed, 1))
    input_ids_N = rng.integers(0, vocab_size, num_tokens, np.int32)
    supervised_N = np.full(num_tokens, supervised != "none")
    if supervised == "holes":
        supervised_N = rng.random(num_tokens) < 0.5
    elif supervised == "all":
        supervised_N[-1] = False
    roles_N, turn_starts = np.zeros(num_tokens, np.uint8), np.zeros(1, np.int32)
    if is_chat:
        turn_starts = np.arange(0, num_tokens, 4, np.int32)
        roles_N = (1 + np.arange(num_tokens) // 4 % (len(ROLES) - 1)).astype(np.uint8)
    return TokenSequence(
        input_ids_N, supervised_N, roles_N, turn_starts, source or f"made#{seed}", sequence_key(input_ids_N, supervised_N, "")
    )


def make_distributions(
    seed: int, sequence: TokenSequence, num_entries_P: NDArray[np.integer], *, vocab_size: int = VOCAB_SIZE
) -> Distributions:
    """What a teacher with random logits says at the sequence's positions: its num_entries_P[p] most probable tokens at p."""
    rng = np.random.default_rng((seed, 2))
    targets_P = sequence.target_ids_P
    token_ids, logprobs, tail_mass_P, outside = [], [], np.zeros(len(targets_P), np.float32), []
    for p, target in enumerate(targets_P):
        logits_V = rng.normal(0.0, 3.0, vocab_size)
        logprobs_V = (logits_V - np.log(np.exp(logits_V).sum())).astype(np.float32)
        support = np.argsort(-logprobs_V, kind="stable")[: num_entries_P[p]].astype(np.int32)
        token_ids.append(support)
        logprobs.append(logprobs_V[support])
        tail_mass_P[p] = np.clip(1.0 - np.exp(logprobs_V[support].astype(np.float64)).sum(), 0.0, 1.0)
        if target != NO_TARGET and target not in support:
            outside.append(logprobs_V[target])
    return Distributions(
        token_ids_E=np.concatenate([*token_ids, np.zeros(0, np.int32)], dtype=np.int32),
        logprobs_E=np.concatenate([*logprobs, np.zeros(0, np.float32)], dtype=np.float32),
        offsets_P1=np.concatenate([[0], np.cumsum(num_entries_P, dtype=np.int64)]).astype(np.int64),
        tail_mass_P=tail_mass_P,
        outside_target_logprobs=np.array(outside, np.float32),
    )


def make_record(
    seed: int,
    *,
    num_tokens: int = 12,
    vocab_size: int = VOCAB_SIZE,
    k: int = K,
    is_ragged: bool = False,
    supervised: str = "all",
    is_chat: bool = False,
) -> SequenceRecord:
    """A sequence with k entries at each position, or with 0 to k of them."""
    sequence = make_sequence(seed, num_tokens=num_tokens, vocab_size=vocab_size, supervised=supervised, is_chat=is_chat)
    num_positions = len(sequence.positions_P)
    counts_P = np.full(num_positions, k)
    if is_ragged:
        counts_P = np.random.default_rng((seed, 3)).integers(0, k + 1, num_positions)
    return SequenceRecord(sequence, make_distributions(seed, sequence, counts_P, vocab_size=vocab_size))


def make_unit(unit: int, *, num_sequences: int = 3, vocab_size: int = VOCAB_SIZE, k: int = K) -> list[SequenceRecord]:
    """The records of a unit: by turns plain text, a chat with holes in its mask, ragged supports, one token, no positions."""
    kinds = (
        {"num_tokens": 12},
        {"num_tokens": 17, "is_chat": True, "supervised": "holes"},
        {"num_tokens": 9, "is_ragged": True, "supervised": "every"},
        {"num_tokens": 1, "supervised": "every"},
        {"num_tokens": 5, "supervised": "none"},
    )
    seeds = range(unit * 1000, unit * 1000 + num_sequences)
    return [make_record(s, vocab_size=vocab_size, k=k, **kinds[(unit + i) % len(kinds)]) for i, s in enumerate(seeds)]


def make_identity(
    codec_id: str = "raw",
    *,
    vocab_size: int = VOCAB_SIZE,
    k: int = K,
    model: str = "made-up",
    selection: SelectionInfo | None = None,
) -> Identity:
    """An identity as a capture by the fake teacher would give; without a selection, of top_k."""
    from kdcache.codec import get_codec

    teacher = TeacherIdentity(
        model=model,
        architecture="Made",
        vocab_size=vocab_size,
        dtype="float32",
        engine="fake",
        engine_version="1",
        context_length=4096,
    )
    return Identity(
        teacher=teacher,
        tokenizer=TokenizerIdentity(name="made", fingerprint="f" * 64, vocab_size=vocab_size),
        selection=selection or SelectionInfo(kind="top_k", params={"k": k}),
        codec=CodecInfo(codec_id=codec_id, params=get_codec(codec_id, {"vocab_size": vocab_size}).params()),
        input_fingerprint="0" * 64,
    )


def make_manifest(num_units: int, identity: Identity | None = None) -> Manifest:
    """Manifest 0 of a cache of so many units."""
    plan = PlanInfo(fingerprint="p" * 64, num_units=num_units)
    return Manifest(number=0, parent=None, identity=identity or make_identity(), plan=plan, versions={"kdcache": "0"})


def make_cache(
    path: Path,
    codec_id: str = "raw",
    *,
    units: Iterable[Sequence[SequenceRecord]] | None = None,
    num_units: int = 3,
    num_sequences: int = 3,
    vocab_size: int = VOCAB_SIZE,
    k: int = K,
    record_batch_bytes: int = 1,
    selection: SelectionInfo | None = None,
) -> Path:
    """Write a complete cache and give its path back.

    Args:
        units: the records of each unit; by default `make_unit` of each number below num_units.
        record_batch_bytes: 1 gives each sequence a record batch of its own.
    """
    from kdcache.store.writing.writer import CacheWriter

    if units is None:
        units = [make_unit(u, num_sequences=num_sequences, vocab_size=vocab_size, k=k) for u in range(num_units)]
    units = list(units)
    manifest = make_manifest(len(units), make_identity(codec_id, vocab_size=vocab_size, k=k, selection=selection))
    writer = CacheWriter.open(path, manifest, record_batch_bytes=record_batch_bytes)
    for unit, records in enumerate(units):
        writer.write_unit(unit, records)
    writer.fold()
    return path


@dataclass(frozen=True)
class Content:
    """What a cache means, whatever way it came to be: equal for a resumed and an undisturbed run."""

    shards: list[dict[str, object]]
    index: tuple[str, str] | None
    files: dict[str, bytes]


def content_of(path: Path) -> Content:
    """The newest manifest's shards and index, and the bytes of the files that they name."""
    import msgspec

    from kdcache.store.chain import newest_manifest

    manifest = newest_manifest(path)
    names = [shard.name for shard in manifest.shards] + ([manifest.index.name] if manifest.index else [])
    return Content(
        shards=[msgspec.to_builtins(shard) for shard in manifest.shards],
        index=(manifest.index.name, manifest.index.sha256) if manifest.index else None,
        files={name: (path / name).read_bytes() for name in names},
    )


def assert_same_sequence(found: TokenSequence, expected: TokenSequence) -> None:
    """Equal in every field."""
    for name in ("input_ids_N", "supervised_N", "roles_N", "turn_starts"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name, strict=True)
    assert (found.source, found.key) == (expected.source, expected.key)


def assert_same_record(found: SequenceRecord, expected: SequenceRecord, *, is_exact: bool = True) -> None:
    """Equal in every field; `is_exact=False` allows numbers the rounding of float16."""
    assert_same_sequence(found.sequence, expected.sequence)
    ours, theirs = found.distributions, expected.distributions
    np.testing.assert_array_equal(ours.offsets_P1, theirs.offsets_P1, strict=True)
    np.testing.assert_array_equal(ours.token_ids_E, theirs.token_ids_E, strict=True)
    tolerance = {"rtol": 0, "atol": 0} if is_exact else {"rtol": 2.0**-11, "atol": 2.0**-24}
    for name in ("logprobs_E", "outside_target_logprobs"):
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), err_msg=name, **tolerance)
    tail_tolerance = tolerance if is_exact else {"rtol": 0.02, "atol": 1e-6}
    np.testing.assert_allclose(ours.tail_mass_P, theirs.tail_mass_P, **tail_tolerance)
