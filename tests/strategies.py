"""Hypothesis strategies: anything that a record may be, its awkward corners drawn often.

Shape letters: N tokens, P positions, E entries, K entries of one position, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from kdcache.format.record import NO_TARGET, ROLES, Distributions, SequenceRecord, TokenSequence, sequence_key

# Corners of float32 and float16: 0 and the nearest to it, the edges of float16's normal, subnormal and finite numbers, -inf.
LOGPROB_CORNERS = (0.0, -(2.0**-149), -(2.0**-24), -(2.0**-14), -1.0, -2.0, -65504.0, -65520.0, -1e30, -np.inf)
TAIL_CORNERS = (0.0, 1.0, 0.5, 2.0**-149, 1e-30, 1.0 - 2.0**-24)

vocab_sizes = st.one_of(st.sampled_from([1, 2, 3, 64, 65, 128256, 2**31 - 1, 2**31]), st.integers(1, 2**31))
"""V, from 1 to 2^31."""


def logprobs() -> st.SearchStrategy[float]:
    """A float32 logprob in nats, <= 0, -inf included."""
    return st.one_of(
        st.floats(-40.0, -0.0, width=32),
        st.sampled_from(LOGPROB_CORNERS),
        st.floats(max_value=-0.0, width=32, allow_nan=False),
    )


def tail_masses() -> st.SearchStrategy[float]:
    """A float32 tail mass in [0, 1]."""
    return st.one_of(st.sampled_from(TAIL_CORNERS), st.floats(0.0, 1.0, width=32))


def token_ids(vocab_size: int) -> st.SearchStrategy[int]:
    """An id in [0, V), the first and the last often."""
    return st.one_of(st.integers(0, vocab_size - 1), st.sampled_from([0, vocab_size - 1]))


def supports(vocab_size: int, *, max_entries: int = 6) -> st.SearchStrategy[list[int]]:
    """Distinct ids of one position: none, some, or (a small V) all."""
    most = min(vocab_size, max_entries)
    some = st.lists(token_ids(vocab_size), max_size=most, unique=True)
    return st.one_of(some, st.permutations(range(vocab_size))) if vocab_size <= max_entries else some


@st.composite
def token_sequences(draw: st.DrawFn, *, vocab_size: int = 97, max_tokens: int = 12) -> TokenSequence:
    """Text or chat; the mask empty, full or with holes; the last position supervised or not."""
    input_ids_N = np.array(draw(st.lists(token_ids(vocab_size), min_size=1, max_size=max_tokens)), np.int32)
    num_tokens = len(input_ids_N)
    flags = st.lists(st.booleans(), min_size=num_tokens, max_size=num_tokens)
    supervised_N = np.array(draw(st.one_of(st.just([False] * num_tokens), st.just([True] * num_tokens), flags)), bool)
    roles_N, turn_starts = np.zeros(num_tokens, np.uint8), np.zeros(1, np.int32)
    if draw(st.booleans()):
        codes = st.lists(st.integers(0, len(ROLES) - 1), min_size=num_tokens, max_size=num_tokens)
        roles_N = np.array(draw(codes), np.uint8)
        turn_starts = np.array(sorted(draw(st.sets(st.integers(0, num_tokens - 1)))), np.int32)
    source = draw(st.text(st.characters(exclude_categories=["Cs"]), max_size=8))
    return TokenSequence(input_ids_N, supervised_N, roles_N, turn_starts, source, sequence_key(input_ids_N, supervised_N, ""))


@st.composite
def distributions(draw: st.DrawFn, *, vocab_size: int, target_ids_P: NDArray[np.int32], max_entries: int = 6) -> Distributions:
    """Supports of any size, in the record's order, with the outside targets that target_ids_P implies.

    The numbers need not be a normalised distribution: the format does not care, and corners come up more often so.
    """
    all_ids, all_logprobs, counts, outside = [], [], [], []
    for target in target_ids_P:
        support = draw(supports(vocab_size, max_entries=max_entries))
        values = draw(st.lists(logprobs(), min_size=len(support), max_size=len(support)))
        pairs = sorted(zip(support, values, strict=True), key=lambda pair: (-pair[1], pair[0]))
        all_ids += [pair[0] for pair in pairs]
        all_logprobs += [pair[1] for pair in pairs]
        counts.append(len(pairs))
        if target != NO_TARGET and target not in support:
            outside.append(draw(logprobs()))
    num_positions = len(target_ids_P)
    return Distributions(
        token_ids_E=np.array(all_ids, np.int32),
        logprobs_E=np.array(all_logprobs, np.float32),
        offsets_P1=np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64),
        tail_mass_P=np.array(draw(st.lists(tail_masses(), min_size=num_positions, max_size=num_positions)), np.float32),
        outside_target_logprobs=np.array(outside, np.float32),
    )


@st.composite
def sequence_records(draw: st.DrawFn, *, vocab_size: int = 97, max_tokens: int = 12, max_entries: int = 6) -> SequenceRecord:
    """A sequence and what a teacher might have said of it: its probabilities sum to 1."""
    sequence = draw(token_sequences(vocab_size=vocab_size, max_tokens=max_tokens))
    answer = distributions(vocab_size=vocab_size, target_ids_P=sequence.target_ids_P, max_entries=max_entries)
    return SequenceRecord(sequence, with_whole_mass(draw(answer)))


def with_whole_mass(d: Distributions) -> Distributions:
    """The same with supports and tails that sum to 1, as a teacher's do: too likely entries shifted down together."""
    rows_E = np.repeat(np.arange(d.num_positions), d.num_entries_P)
    over_P = np.log(np.maximum(np.bincount(rows_E, np.exp(d.logprobs_E.astype(np.float64)), d.num_positions), 1.0))
    logprobs_E = (d.logprobs_E - over_P[rows_E]).astype(np.float32)
    kept_P = np.bincount(rows_E, np.exp(logprobs_E.astype(np.float64)), d.num_positions)
    return replace(d, logprobs_E=logprobs_E, tail_mass_P=np.clip(1.0 - kept_P, 0.0, 1.0).astype(np.float32))
