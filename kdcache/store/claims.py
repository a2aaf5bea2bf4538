"""What a manifest claims of a shard, recomputed from the shard's decoded records and compared within the codec's bound.

Counts, keys and bytes of columns are compared exactly. Sums of logprobs, masses and entropies were taken before the codec
rounded, so each comes with the most that the rounding can have moved it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

import msgspec
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kdcache.codec import get_codec
from kdcache.codec.base import Codec
from kdcache.errors import CorruptCacheError
from kdcache.format.manifest import LineageInfo, Manifest, ParentInfo, ShardInfo
from kdcache.format.record import SequenceRecord, sequence_key
from kdcache.format.record_checks import MASS_TOLERANCE
from kdcache.store.writing.statistics import ShardStatistics

_COUNTS = ("num_sequences", "num_tokens", "num_positions", "num_entries", "num_targets", "num_exact_entries")
_SUMS = ("tail_mass_sum", "entropy_floor_sum", "entropy_ceiling_sum")
_HALF_MOST = 65504.0
"""The greatest float16: a logprob below its negative is stored as -inf."""

_SLACK = 1e-6
"""Per position or target: float32's own rounding, and the last bits of another processor's logarithms."""


@dataclass
class ShardClaims:
    """The totals of one shard, as its records say; the most that a codec can have moved each sum.

    Attributes:
        codec: of the cache.
        lossy: the codecs that its masses went through: its own, and those of the caches that it was made of.
        templates: fingerprints of chat templates that may be in its sequences' keys.
        statistics: recomputed as the writer computed them.
        bounds: sum's name -> nats, or mass.
        faults: the first sequence whose masses do not sum to 1: no damage to others, which are still counted.
    """

    codec: Codec
    lossy: Collection[Codec]
    templates: Collection[str]
    statistics: ShardStatistics
    bounds: dict[str, float] = field(default_factory=lambda: dict.fromkeys((*_SUMS, "target_logprob_sum"), 0.0))
    faults: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, manifest: Manifest) -> ShardClaims:
        """Empty totals for a shard of this cache; raises UnsupportedVersionError where a parent's codec is unknown."""
        identity = manifest.identity
        sources = [identity, *_parents(manifest.lineage)]
        codecs = [get_codec(s.codec.codec_id, s.codec.params, s.selection) for s in sources]
        templates = {source.tokenizer.chat_template_fingerprint for source in sources}
        if len(sources) > 1 or "converted_from" in manifest.notes:
            templates.add("")  # converted sequences have no template, whatever tokenizer they are said to be of
        return cls(codecs[0], codecs, templates, ShardStatistics(identity.teacher.vocab_size))

    def add(self, record: SequenceRecord, target_logprobs_P: NDArray[np.float32]) -> None:
        """Count one sequence.

        Raises:
            CorruptCacheError: a key that is not of the sequence, or features that are not finite.
        """
        self._check_key(record)
        for name, values in record.distributions.features.items():
            if not np.isfinite(values).all():
                raise CorruptCacheError(f"feature {name!r} is not finite")
        self.statistics.add(record, target_logprobs_P)
        self._add_bounds(record, target_logprobs_P)

    def add_column_bytes(self, batch: pa.RecordBatch) -> None:
        """Count a record batch's buffers."""
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            self.statistics.add_column_bytes(name, column.nbytes)

    def problems(self, shard: ShardInfo) -> Iterator[str]:
        """A sentence for each fault, and for each claim of the shard that its records do not bear out."""
        yield from self.faults
        found = self.statistics
        for name in _COUNTS:
            if getattr(found, name) != getattr(shard, name):
                yield f"{name} is {_said(getattr(found, name))}, the manifest says {_said(getattr(shard, name))}"
        if (found.num_finished or {}) != (shard.num_finished or {}):
            yield f"answers ended by {_said(found.num_finished)}, the manifest says {_said(shard.num_finished)}"
        yield from _differing_bytes(found.column_bytes, shard.column_bytes)
        for name in _SUMS:
            value, claimed, bound = getattr(found, name), getattr(shard, name), self.bounds[name]
            bound += _SLACK * found.num_positions + 1e-9 * abs(value)
            if not abs(value - claimed) <= bound:
                yield f"{name} is {value:.6g}, the manifest says {claimed:.6g}; the codec's bound is {bound:.3g}"
        yield from self._nll_problems(shard)

    def nll_bound(self) -> float:
        """The most that the codec can have moved the sum of the targets' logprobs, in nats."""
        num_targets = self.statistics.num_targets
        return self.bounds["target_logprob_sum"] + _SLACK * num_targets + 1e-12 * abs(self.statistics.target_logprob_sum)

    def _nll_problems(self, shard: ShardInfo) -> Iterator[str]:
        found, claimed = self.statistics, shard.target_logprob_sum
        num_more = found.num_impossible_targets - shard.num_impossible_targets
        ends_at_half = bool(np.isinf(self.codec.max_error_nats(np.array([-1e5]))).all())
        if num_more < 0 or (num_more and not ends_at_half):
            yield (
                f"{found.num_impossible_targets} targets have probability 0, the manifest says {shard.num_impossible_targets}"
            )
            return
        # Those that the codec made impossible were below what it can say; how far, nobody knows.
        most = found.target_logprob_sum + self.nll_bound() - num_more * _HALF_MOST
        least = -math.inf if num_more else found.target_logprob_sum - self.nll_bound()
        if not least <= claimed <= most:
            num_possible = max(found.num_targets - found.num_impossible_targets, 1)
            yield (
                f"the teacher's NLL recomputed from the cache is {-found.target_logprob_sum / num_possible:.6f} nats per "
                f"target, the teacher's own was {-claimed / num_possible:.6f}, more apart than the codec's bound of "
                f"{self.nll_bound() / num_possible:.6f}: logprobs do not belong to their text"
            )

    def _check_key(self, record: SequenceRecord) -> None:
        sequence = record.sequence
        keys = (sequence_key(sequence.input_ids_N, sequence.supervised_N, template) for template in self.templates)
        if sequence.key not in keys:
            raise CorruptCacheError(f"key {sequence.key.hex()} is not that of the sequence's tokens, mask and chat template")

    def _add_bounds(self, record: SequenceRecord, target_logprobs_P: NDArray[np.float32]) -> None:
        d = record.distributions
        possible = target_logprobs_P[np.isfinite(target_logprobs_P)]
        self.bounds["target_logprob_sum"] += float(self.codec.max_error_nats(possible).sum())
        exact_positions = np.repeat(np.arange(d.num_positions), d.num_entries_P if d.num_exact_P is None else d.num_exact_P)
        exact_logprobs = (d.logprobs_E if d.num_exact_P is None else d.logprobs_E[d.is_exact_E]).astype(np.float64)
        tail_P = d.tail_mass_P.astype(np.float64)
        with np.errstate(divide="ignore"):
            log_tail_P = np.log(tail_P)
        exact_errors, tail_errors_P = _errors(self.lossy, exact_logprobs), _errors(self.lossy, log_tail_P)
        total_P = np.bincount(exact_positions, exact_errors.probability, d.num_positions) + tail_P
        self._check_mass(total_P, tail_errors_P.mass + np.bincount(exact_positions, exact_errors.mass, d.num_positions))
        self.bounds["tail_mass_sum"] += float(tail_errors_P.mass.sum())
        if d.entropy_P is not None:
            self._add_entropy_bound(d.entropy_P)
            return
        # A bound of the terms -p log p, the tail's among them, and of the tail's share of the ceiling.
        terms = float(exact_errors.term.sum() + tail_errors_P.term.sum())
        self.bounds["entropy_floor_sum"] += terms
        self.bounds["entropy_ceiling_sum"] += terms + float(tail_errors_P.mass.sum()) * math.log(self.statistics.vocab_size)

    def _check_mass(self, total_P: NDArray[np.float64], off_P: NDArray[np.float64]) -> None:
        wrong_P = ~(np.abs(total_P - 1) <= MASS_TOLERANCE + off_P)
        if wrong_P.any() and not self.faults:
            p = int(np.argmax(wrong_P))
            self.faults.append(
                f"sequence {self.statistics.num_sequences - 1} of the shard, record {p}: exact entries and tail_mass sum to "
                f"{total_P[p]:.4f}, expected 1 within the codec's bound of {MASS_TOLERANCE + off_P[p]:.4f}"
            )

    def _add_entropy_bound(self, entropy_P: NDArray[np.float32]) -> None:
        most = math.log(self.statistics.vocab_size)
        if (entropy_P > most * (1 + 2.0**-9) + 1e-2).any():
            raise CorruptCacheError(f"an entropy of {entropy_P.max():.4f} nats is more than log(vocab_size), {most:.4f}")
        types = {f.name: f.type for f in self.codec.fields()}
        if types["entropy"] == pa.list_(pa.float16()):
            off = float(np.maximum(entropy_P.astype(np.float64) * 2.0**-11, 2.0**-25).sum())
            self.bounds["entropy_floor_sum"] += off
            self.bounds["entropy_ceiling_sum"] += off


@dataclass(frozen=True)
class _Errors:
    """For each logprob x: its probability p, and the most that p and -p x can be off."""

    probability: NDArray[np.float64]
    mass: NDArray[np.float64]
    term: NDArray[np.float64]


def _errors(codecs: Collection[Codec], logprobs: NDArray[np.float64]) -> _Errors:
    """By the mean value theorem: with y up to err from x, |e^y - e^x| <= p (e^err - 1), and the slope of y e^y, (1 + y) e^y, is
    at most (|1 + x| + err) p e^err."""
    probability = np.exp(logprobs)
    with np.errstate(invalid="ignore"):
        err = np.sum([codec.max_error_nats(logprobs) for codec in codecs], axis=0)
        err = np.where(probability > 0, err, 0.0)
    if not err.any():
        zeros = np.zeros_like(probability)
        return _Errors(probability, zeros, zeros)
    most = probability * np.exp(err)
    size = np.abs(1.0 + np.where(probability > 0, logprobs, 0.0))
    return _Errors(probability, most - probability, most * (size + err) * err)


def _parents(lineage: LineageInfo | msgspec.UnsetType) -> Iterator[ParentInfo]:
    if not isinstance(lineage, msgspec.UnsetType):
        for parent in lineage.parents:
            yield parent
            yield from _parents(parent.lineage)


def _differing_bytes(found: Mapping[str, int], claimed: Mapping[str, int]) -> Iterator[str]:
    for name in sorted({*found, *claimed}):
        if found.get(name, 0) != claimed.get(name, 0):
            yield f"column {name[:80]!r} has {found.get(name, 0)} bytes, the manifest says {claimed.get(name, 0)}"
            return


def _said(value: object) -> object:
    return "nothing" if isinstance(value, msgspec.UnsetType) else value
