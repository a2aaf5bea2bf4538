"""A cache of ours asked by its own teacher: `kdcache verify --deep`.

Stored entries that are exact are compared; estimates (random selections) are not: a single draw says nothing of one position.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.codec import get_codec
from kdcache.errors import InputError, MismatchError
from kdcache.foreign.blocks import SHIFTS
from kdcache.foreign.judge.compare import Supports, divergence, fit_line, supports_of
from kdcache.foreign.judge.live import concatenated, live_selection, live_supports, paired
from kdcache.foreign.judge.neighbours import (
    FULL_PRECISION,
    FULL_PRECISION_NATS,
    AskedTwice,
    ask_twice,
    rounding_nats,
    what_moved,
)
from kdcache.format.manifest import Identity
from kdcache.format.record import NO_TARGET, Distributions, SequenceRecord, TokenSequence, sequence_key
from kdcache.store.reader import CacheReader
from kdcache.teacher.base import Teacher

CONTROL_FACTOR = 10.0
"""The cache may differ from the live teacher this many times as much as the live teacher from itself in another batch, as far
as rounding explains that."""

SAME_ENGINE_NATS, OTHER_ENGINE_NATS = 1e-4, 5e-3
"""What is allowed besides: kernels chosen by shape, when engine, version and dtype are the capture's own; another engine's
arithmetic, when they are not."""


@dataclass(frozen=True, kw_only=True)
class DeepConfig:
    """How much to ask again.

    Attributes:
        num_sequences: in the sample.
        seed: of the choice.
        tolerance_nats: mean KL that is allowed; None for what the control, the codec and the engine explain.
    """

    num_sequences: int = 16
    seed: int = 0
    tolerance_nats: float | None = None


@dataclass(frozen=True)
class DeepReport:
    """The cache compared with its teacher, over a sample.

    Attributes:
        sequences: their indices in the cache.
        num_positions: compared: positions with exact entries.
        kl_mean, kl_p99, kl_max: KL(live || cached) in nats per position; NaN where the cache holds no exact entry.
        control_mean, control_p99, control_max: KL(live || live) of the same sequences, one at a time and in a batch;
            more than rounding explains is a problem of its own.
        allowed: mean KL up to which the cache is the teacher's.
        shift_kl: mean KL when the cached positions are moved by each of SHIFTS.
        max_difference: greatest |cached - live| of a logprob, in nats.
        slope: of cached on live logprobs: 1 unless a temperature was applied.
        cached_nll, live_nll: nats per target that has a finite stored logprob.
        nll_difference: greatest |cached - live| of a target's logprob.
        kept_mass, dropped_mass: means of the stored and of the tail mass.
        renormalisation_cost: mean of -log(kept mass): the KL that a student pays who takes the support for the whole.
        codec_bound: most nats that the codec can have moved a compared logprob, in the mean.
        problems: a sentence each; empty where the cache is what the teacher says.
    """

    sequences: tuple[int, ...]
    num_positions: int
    kl_mean: float
    kl_p99: float
    kl_max: float
    control_mean: float
    control_p99: float
    control_max: float
    allowed: float
    shift_kl: tuple[float, ...]
    max_difference: float
    slope: float
    cached_nll: float
    live_nll: float
    nll_difference: float
    kept_mass: float
    dropped_mass: float
    renormalisation_cost: float
    codec_bound: float
    problems: tuple[str, ...]

    @property
    def is_sound(self) -> bool:
        """Whether the cache is what the teacher says."""
        return not self.problems

    def to_builtins(self) -> dict[str, Any]:
        """Convert to what JSON can hold: what is not finite becomes null."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {"sound": self.is_sound, "shifts": SHIFTS} | {name: _plain(value) for name, value in fields.items()}


def verify_deep(reader: CacheReader, teacher: Teacher, config: DeepConfig) -> DeepReport:
    """Ask the teacher again about a random sample of the cache's sequences.

    Raises:
        MismatchError: the teacher is not the one that the manifest names.
        InputError: the cache is empty, or holds the distributions of a sampler's filters.
        CorruptCacheError: a sampled record is damaged. TeacherError: the teacher fails.
    """
    check_teacher(reader.manifest.identity, teacher)
    indices = choose(reader.num_positions_S, config)
    records = [reader[index] for index in indices]
    asked = [_everywhere(record.sequence) for record in records]
    widest = max(1, *(int(exact_counts(record.distributions).max(initial=1)) for record in records))
    selection = live_selection(widest, teacher.identity.vocab_size)
    # The cache is compared with what the teacher says of each text alone: the capture's own batches would repeat its faults.
    return _report(reader, teacher, indices, records, ask_twice(teacher, asked, selection), config)


def check_teacher(identity: Identity, teacher: Teacher) -> None:
    """Raise MismatchError unless weights and vocabulary are the capture's; InputError where distributions were filtered."""
    theirs, ours = identity.teacher, teacher.identity
    pairs: dict[str, tuple[object, object]] = {"vocab_size": (theirs.vocab_size, ours.vocab_size)}
    if theirs.weights_digest and ours.weights_digest:
        pairs["weights_digest"] = (theirs.weights_digest, ours.weights_digest)
    differences = [
        f"{name}: {cached!r} in the cache, {live!r} here" for name, (cached, live) in pairs.items() if cached != live
    ]
    if differences:
        raise MismatchError(
            f"the teacher {ours.model!r} is not the one that was captured, {theirs.model!r}: {'; '.join(differences)}"
        )
    if identity.selection.filters:
        raise InputError(
            f"the cache holds what was drawn from, after the sampler's filters {identity.selection.filters}: the teacher's own "
            "distributions cannot be compared with it"
        )


def choose(num_positions_S: NDArray[np.integer], config: DeepConfig) -> tuple[int, ...]:
    """The numbers of the sampled sequences, ascending; those without positions are passed over.

    Raises:
        InputError: no sequence has positions.
    """
    candidates = np.flatnonzero(num_positions_S > 0)
    if not len(candidates):
        raise InputError("the cache has no sequence with a recorded position; there is nothing to ask the teacher about")
    rng = np.random.default_rng((config.seed, 0xDEE9))
    size = min(max(config.num_sequences, 1), len(candidates))
    return tuple(sorted(rng.choice(candidates, size, replace=False).tolist()))


def exact_counts(distributions: Distributions) -> NDArray[np.int64]:
    """(P,) entries of each position that are exact."""
    return distributions.num_entries_P if distributions.num_exact_P is None else distributions.num_exact_P


def exact_supports(distributions: Distributions) -> Supports:
    """The exact entries, position p for the p-th supervised position."""
    counts_P = distributions.num_entries_P
    rank_E = np.arange(distributions.num_entries) - np.repeat(distributions.offsets_P1[:-1], counts_P)
    kept_E = rank_E < np.repeat(exact_counts(distributions), counts_P)
    return supports_of(exact_counts(distributions), distributions.token_ids_E[kept_E], distributions.logprobs_E[kept_E])


def _everywhere(sequence: TokenSequence) -> TokenSequence:
    """Supervise every position of a text: shifted positions need neighbours that the cache may not hold."""
    supervised_N = np.ones(sequence.num_tokens, np.bool_)
    return TokenSequence(
        input_ids_N=sequence.input_ids_N,
        supervised_N=supervised_N,
        roles_N=sequence.roles_N,
        turn_starts=sequence.turn_starts,
        source=sequence.source,
        key=sequence_key(sequence.input_ids_N, supervised_N, ""),
    )


def _report(
    reader: CacheReader, teacher: Teacher, indices: tuple[int, ...], records: Sequence[SequenceRecord],
    asked: AskedTwice, config: DeepConfig,
) -> DeepReport:  # fmt: skip
    stored = [exact_supports(record.distributions) for record in records]
    positions = [record.sequence.positions_P for record in records]
    live = asked.alone
    answers = [live_supports(answer) for answer in live]
    at = {
        shift: [paired(s, a, p + shift) for s, a, p in zip(stored, answers, positions, strict=True)] for shift in SHIFTS
    }  # fmt: skip
    joined = {shift: tuple(concatenated([pair[side] for pair in pairs]) for side in (0, 1)) for shift, pairs in at.items()}
    moved = asked.movement(positions)
    kl_P, control_P = divergence(*joined[0]), np.concatenate(moved)
    line = fit_line(joined[0][1], joined[0][0])
    bound = _codec_bound(reader, joined[0][1])
    control_mean = float(control_P.mean())
    allowed = config.tolerance_nats
    if allowed is None:
        control = min(control_mean, rounding_nats(teacher.identity))
        allowed = CONTROL_FACTOR * control + bound + _engine_allowance(reader.manifest.identity, teacher)
    shift_kl = tuple(_mean(divergence(*joined[shift])) for shift in SHIFTS)
    nll = _nll(records, live)
    tails = np.concatenate([record.distributions.tail_mass_P for record in records]).astype(np.float64)
    worst = max(map(_mean, (divergence(*pair) for pair in at[0] if pair[0].num_positions)), default=math.nan)
    figures = {"kl": _mean(kl_P), "worst": worst, "allowed": allowed, "shift_kl": shift_kl, "nll": nll, "slope": line.slope}
    return DeepReport(
        indices, len(kl_P), *_spread(kl_P), *_spread(control_P), allowed, shift_kl, line.max_difference, line.slope,
        *nll, float(1 - tails.mean()), float(tails.mean()), float(-np.log(np.maximum(1 - tails, 1e-12)).mean()), bound,
        tuple(filter(None, [what_moved(moved, teacher.identity), *_problems(figures)])),
    )  # fmt: skip


def _codec_bound(reader: CacheReader, stored: Supports) -> float:
    """Most that the codec can have added to the mean KL: each logprob of live weight p is at most its error off."""
    identity = reader.manifest.identity
    codec = get_codec(identity.codec.codec_id, identity.codec.params, identity.selection)
    errors_E = codec.max_error_nats(stored.logprobs_E)
    finite_E = np.where(np.isfinite(errors_E), errors_E, 0.0)
    return float((np.exp(stored.logprobs_E) * finite_E).sum() / max(stored.num_positions, 1))


def _engine_allowance(identity: Identity, teacher: Teacher) -> float:
    theirs, ours = identity.teacher, teacher.identity
    same = (theirs.engine, theirs.engine_version, theirs.dtype) == (ours.engine, ours.engine_version, ours.dtype)
    if same and ours.dtype in FULL_PRECISION:
        return FULL_PRECISION_NATS
    return SAME_ENGINE_NATS if same else OTHER_ENGINE_NATS


def _nll(records: Sequence[SequenceRecord], live: Sequence[Distributions]) -> tuple[float, float, float]:
    """Cached and live NLL per target, and the greatest difference; over targets that both give a finite logprob."""
    cached_parts, live_parts = [], []
    for record, answer in zip(records, live, strict=True):
        targets_P = record.sequence.target_ids_P
        everywhere_N = answer.target_logprobs(np.append(record.sequence.input_ids_N[1:], NO_TARGET).astype(np.int32))
        has_P = targets_P != NO_TARGET
        cached_parts.append(record.distributions.target_logprobs(targets_P)[has_P].astype(np.float64))
        live_parts.append(everywhere_N[record.sequence.positions_P][has_P].astype(np.float64))
    cached, found = np.concatenate(cached_parts), np.concatenate(live_parts)
    both = np.isfinite(cached) & np.isfinite(found)
    if not both.any():
        return math.nan, math.nan, math.nan
    cached, found = cached[both], found[both]
    return float(-cached.mean()), float(-found.mean()), float(np.abs(cached - found).max())


def _problems(figures: dict[str, Any]) -> list[str]:
    kl, allowed, shift_kl = figures["kl"], figures["allowed"], figures["shift_kl"]
    cached_nll, live_nll, _ = figures["nll"]
    problems = []
    best = SHIFTS[int(np.nanargmin(shift_kl))] if not all(map(math.isnan, shift_kl)) else 0
    if best:
        problems.append(
            f"positions moved by {best:+d} are nearer to the teacher (KL {min(shift_kl):.3g} nats) than as "
            f"they stand ({kl:.3g}): they are shifted"
        )
    if kl > allowed:
        problems.append(
            f"KL(live || cached) is {kl:.3g} nats per position in the mean, more than the {allowed:.3g} that the control, the "
            "codec and the engine explain: the cache is not what this teacher says (cached logprobs are "
            f"{figures['slope']:.4g} times the live)"
        )
    elif figures["worst"] > allowed:
        problems.append(
            f"KL(live || cached) is {figures['worst']:.3g} nats per position in the mean of one of the texts, more than the "
            f"{allowed:.3g} that the control, the codec and the engine explain, where the mean of all is {kl:.3g}: it was "
            "captured in a batch that moved it, or is not what this teacher says"
        )
    # To second order a KL of k goes with differences of logprobs of size sqrt(2 k).
    if abs(cached_nll - live_nll) > max(math.sqrt(2 * allowed), 0.01):
        problems.append(
            f"the NLL of the text is {cached_nll:.4f} nats per target from the cache, {live_nll:.4f} from the teacher"
        )
    return problems


def _spread(values: NDArray[np.float64]) -> tuple[float, float, float]:
    if not len(values):
        return math.nan, math.nan, math.nan
    return float(values.mean()), float(np.quantile(values, 0.99)), float(values.max())


def _mean(values: NDArray[np.float64]) -> float:
    return float(values.mean()) if len(values) else math.nan


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return [_plain(part) for part in value] if isinstance(value, tuple) else value
