"""From totals to sentences: what is wrong with a foreign cache, how bad it is, and what mends it.

Order of the sentences: values, normalisation, fitted tails, ids, extra entries, alignment, temperature.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from kdcache.foreign.base import Finding, ForeignCache, ValueKind
from kdcache.foreign.judge.alignment import judge
from kdcache.foreign.judge.text_findings import (
    MANY,
    MOST,
    alignment_findings,
    evidence_of,
    extra_entries,
    other_logarithms,
    temperature,
)
from kdcache.foreign.probes import ROUNDING, ProbeCounts

MIN_TESTABLE_POSITIONS = 16
ROUNDED_MASS = 1.05
"""A normaliser rounded to bfloat16 moves every probability of its position by up to 4%: 2^-8 of a logarithm near 10."""

RISING_SHARE, SEAM_SHARE = 0.02, 0.25
RISING_HARM = 2e-3
"""Mean probability times nats by which fitted values rise: a sound fit of degree 8 wavers by 1e-4 and costs a KL of 1e-4; the
budget config in DistillKit's README rises by 2e-2 and costs 1e-1."""

MAX_DRAWS, DRAW_SLACK = 500, 4e-3
"""More draws than this are no longer told from any numbers; half precision rounds counts by this share."""

PADDED_MASS = 0.1
"""Share of all probability that ids of padding may hold: a trained teacher gives them nothing, a random one their number."""


def all_findings(cache: ForeignCache, counts: ProbeCounts) -> list[Finding]:
    """Everything that is to be said, from the layout and from the values."""
    num_positions = counts.num_positions - counts.num_missing_positions
    if not num_positions:
        named = cache.findings or (Finding("no_positions", "fatal", "there is not one position with an entry in it"),)
        return list(named)
    found = [*cache.findings, *_missing(counts), *_position_counts(counts), *_not_finite(counts, num_positions)]
    kind = list(_kind(cache.values, counts, num_positions))
    found += kind
    # What is no logprob has no mass to be tested, and the text says nothing of a temperature there; nor where the text itself
    # has chosen an entry.
    are_logprobs = all(finding.severity == "note" for finding in kind)
    found += _renormalised(counts) if are_logprobs else ()
    found += [*_tails(cache, counts, num_positions), *_ids(counts), *_entries(counts, num_positions), *counts.runs.findings()]
    if counts.num_tokens:
        alignment = judge(counts)
        extra = list(extra_entries(counts, alignment))
        are_normal = are_logprobs and not any(finding.name in ("renormalised", "sampled_counts") for finding in found)
        tempered = list(temperature(counts, alignment)) if are_logprobs and not extra else []
        evidence = evidence_of(counts, alignment) if are_normal else None
        if evidence is not None and not tempered and not extra:
            tempered = list(other_logarithms(counts, alignment, evidence))
        found += [*extra, *alignment_findings(alignment, evidence, is_tempered=bool(tempered)), *tempered]
    names = set()
    return [finding for finding in found if not (finding.name in names or names.add(finding.name))]


def _missing(counts: ProbeCounts) -> Iterator[Finding]:
    if counts.num_missing_positions:
        sentence = (
            f"{counts.num_missing_positions:,} of {counts.num_positions:,} positions are null, empty, or -inf "
            "alone; they are left out"
        )
        yield Finding("missing_positions", "note", sentence)


def _position_counts(counts: ProbeCounts) -> Iterator[Finding]:
    if counts.num_sequences_without_positions:
        sentence = (
            f"{counts.num_sequences_without_positions:,} of {counts.num_sequences:,} sequences have no "
            "position; they are left out"
        )
        yield Finding("sequences_without_positions", "note", sentence)
    if counts.num_positions_outside:
        sentence = (
            f"{counts.num_positions_outside:,} positions in {counts.num_longer_sequences:,} sequences lie "
            "outside their text (more positions than tokens); they are left out"
        )
        yield Finding("positions_outside_text", "note", sentence)
    if counts.num_shorter_sequences:
        sentence = (
            f"{counts.num_shorter_sequences:,} of {counts.num_sequences:,} sequences have positions for a part of their text: "
            f"{counts.num_uncovered:,} positions with a target have none, and are not learnt"
        )
        yield Finding("positions_for_a_part", "note", sentence)


def _not_finite(counts: ProbeCounts, num_positions: int) -> Iterator[Finding]:
    bad = counts.num_nan + counts.num_positive_infinite
    if bad:
        yield Finding(
            "not_numbers",
            "fatal",
            f"{bad:,} values are NaN or infinite in {num_positions:,} positions; a missing rank poisons a fitted position",
        )
    if counts.num_negative_infinite:
        sentence = f"{counts.num_negative_infinite:,} values are -inf, of ranks that the engine did not give; they are left out"
        yield Finding("missing_entries", "note", sentence)


def _kind(claimed: ValueKind, counts: ProbeCounts, num_positions: int) -> Iterator[Finding]:
    heavy, positive = counts.num_heavy_positions / num_positions, counts.num_positive_positions / num_positions
    mass = (
        f"the mass of a position, the sum of exp, is up to {counts.mass_max:.3g} "
        f"({counts.num_heavy_positions:,} of {num_positions:,} positions above 1)"
    )
    if claimed == "probs":
        if counts.min_value < 0 or counts.num_prob_positions < (1 - MANY) * num_positions:
            sentence = (
                f"called probabilities, but they range from {counts.min_value:.3g} to {counts.max_value:.3g} and "
                f"{num_positions - counts.num_prob_positions:,} positions sum to more than 1"
            )
            yield Finding("not_probabilities", "fatal", sentence)
    elif claimed == "logprobs" and counts.max_value > 0 and counts.num_prob_positions > MOST * num_positions:
        sentence = "these are probabilities, not logprobs: all lie in [0, 1] and no position sums to more than 1"
        yield Finding("probabilities", "repairable", sentence, "--values probs")
    elif claimed == "logprobs" and counts.max_value > 1 and counts.num_negated_positions > MOST * num_positions:
        sentence = (
            f"these are negative logprobs (-log p, from {counts.min_value:.3g} to {counts.max_value:.3g}): with the other sign "
            "they rank falling and no position's mass is above 1"
        )
        yield Finding("negated_logprobs", "repairable", sentence, "--values nll")
    elif heavy > MANY and claimed == "logits" and counts.has_log_z:
        if counts.mass_max < ROUNDED_MASS:
            yield Finding(
                "rounded_normaliser", "note", f"{mass}: the normaliser was rounded, as in bfloat16; masses are cut at 1"
            )
        else:
            yield Finding("wrong_normaliser", "fatal", f"the normaliser does not belong to the logits: {mass}")
    elif claimed == "logits" and not counts.has_log_z:
        yield _without_normaliser(heavy, counts)
    elif heavy > MANY and not _is_of_tails(counts, num_positions):
        yield _unnormalised(positive, mass, counts, num_positions)


def _without_normaliser(heavy: float, counts: ProbeCounts) -> Finding:
    if heavy <= MANY and counts.max_value <= 0:
        sentence = (
            "called logits and without a normaliser, but no position's mass is above 1 and none is positive: "
            "they look like logprobs"
        )
        return Finding("named_logits", "repairable", sentence, "--values logprobs")
    sentence = (
        "logits without a normaliser: log-sum-exp over the vocabulary was not stored, so neither a "
        "probability nor the tail mass can be had, only ratios within a position; capture again and keep it"
    )
    return Finding("missing_normaliser", "fatal", sentence)


def _unnormalised(positive: float, mass: str, counts: ProbeCounts, num_positions: int) -> Finding:
    if positive > 0.5 or counts.num_zero_topped_positions > MOST * num_positions:
        form = (
            "with each position's maximum taken off"
            if counts.num_zero_topped_positions > MOST * num_positions
            else f"up to {counts.max_value:.3g}"
        )
        sentence = f"these are logits ({form}), not logprobs: {mass}; without their normaliser no probability can be had"
        return Finding("logits", "fatal", sentence)
    return Finding("unnormalised", "fatal", f"the values are not logprobs over the vocabulary: {mass}")


def _renormalised(counts: ProbeCounts) -> Iterator[Finding]:
    testable = counts.num_complete_testable_positions
    if counts.num_unit_positions < (1 - MANY) * counts.num_tested_mass_positions:
        return
    draws = _num_draws(counts)
    if draws is not None:
        sentence = (
            f"the values are counts of {draws} random draws, divided by {draws}: a sample of the teacher's distribution, not "
            "the top of it. Its entries are estimates, which only a sampled selection of ours says of them; capture again with "
            "selection.kind sampled"
        )
        yield Finding("sampled_counts", "fatal", sentence)
    elif testable >= MIN_TESTABLE_POSITIONS and counts.num_complete_positions > MOST * testable:
        sentence = (
            f"every position sums to 1 within {ROUNDING}, though the entries are far from dying out: they were "
            "renormalised over the support, and what the tail held is lost. A student would learn "
            "over-confidence; capture again"
        )
        yield Finding("renormalised", "fatal", sentence)


def _num_draws(counts: ProbeCounts) -> int | None:
    """N where all probabilities of positions that sum to 1 are multiples of 1/N; None where they are not."""
    probs = np.array(counts.unit_position_probs)
    if len(probs) < MIN_TESTABLE_POSITIONS or not probs.min() > 1 / MAX_DRAWS:
        return None
    for fold in (1, 2, 3):
        draws = round(fold / float(probs.min()))
        if draws > 2 and (np.abs(probs * draws - np.round(probs * draws)) < DRAW_SLACK * np.maximum(1, probs * draws)).all():
            return draws
    return None


def _is_of_tails(counts: ProbeCounts, num_positions: int) -> bool:
    """Whether positions are above 1 by their fitted part alone: that can be left out."""
    return (
        counts.approximate_from is not None
        and counts.num_heavy_exact_positions <= MANY * num_positions
        and counts.num_positive_positions == 0
    )


def _tails(cache: ForeignCache, counts: ProbeCounts, num_positions: int) -> Iterator[Finding]:
    rising, seam, heavy = (
        count / num_positions
        for count in (counts.num_rising_tail_positions, counts.num_seam_positions, counts.num_heavy_positions)
    )
    is_rising = rising > RISING_SHARE and counts.tail_rise_sum > RISING_HARM * num_positions
    is_heavy = heavy > MANY and _is_of_tails(counts, num_positions)
    if cache.approximate_from is None or not (is_rising or is_heavy or seam > SEAM_SHARE):
        return
    signs = []
    if is_rising:
        signs.append(
            f"sorted values must fall, but rise by up to {counts.max_tail_rise:.2f} nats, in {rising:.0%} of the positions"
        )
    if is_heavy:
        signs.append(f"they bring {heavy:.0%} of the positions above 1, up to {counts.mass_max:.3g}")
    if seam > SEAM_SHARE:
        signs.append(f"{seam:.0%} of the positions drop off a step there that no exact entry before it shows")
    sentence = (
        f"the fitted tails are broken from rank {cache.approximate_from} on: {'; '.join(signs)}; the exact entries can be kept"
    )
    yield Finding("broken_tails", "repairable", sentence, "--repair tails")


def _ids(counts: ProbeCounts) -> Iterator[Finding]:
    if counts.num_negative_ids:
        yield Finding("negative_ids", "fatal", f"{counts.num_negative_ids:,} token ids are negative")
    if counts.vocab_size is not None and counts.max_id >= counts.vocab_size:
        sentence = (
            f"token ids go up to {counts.max_id}, but the vocabulary has {counts.vocab_size}: it is another, "
            "or ids are damaged; or the teacher's output is wider than its tokenizer, then say how wide with "
            "--vocab-size V"
        )
        yield Finding("ids_outside_vocabulary", "fatal", sentence)
    elif counts.tokenizer_size is not None and counts.max_id >= counts.tokenizer_size:
        if counts.vocab_size is None and counts.padded_mass > PADDED_MASS * max(counts.mass_sum, 1.0):
            share = counts.padded_mass / max(counts.mass_sum, 1.0)
            sentence = (
                f"{counts.num_padded_ids:,} entries, with {share:.1%} of all probability, have ids up to "
                f"{counts.max_id}, which the tokenizer of {counts.tokenizer_size} ids does not have: padding "
                "is not that likely; the tokenizer is another, or ids are damaged"
            )
            yield Finding("ids_outside_vocabulary", "fatal", sentence)
            return
        known = counts.vocab_size is not None
        sentence = (
            f"{counts.num_padded_ids:,} entries, with {counts.padded_mass / max(counts.num_entries, 1):.2g} of "
            f"probability each in the mean, have ids up to {counts.max_id}, which the tokenizer of "
            f"{counts.tokenizer_size} ids does not have: the teacher's output is "
            f"padded{'' if known else '; say how wide it is'}"
        )
        yield Finding("padded_vocabulary_ids", "note" if known else "repairable", sentence, None if known else "--vocab-size V")


def _entries(counts: ProbeCounts, num_positions: int) -> Iterator[Finding]:
    if counts.num_duplicate_positions:
        sentence = (
            f"{counts.num_duplicate_positions:,} of {num_positions:,} positions name an id twice; the first, "
            "with the greater value, can be kept"
        )
        yield Finding("duplicate_ids", "repairable", sentence, "--repair duplicates")
    if counts.num_unsorted_positions > counts.num_rising_tail_positions:
        sentence = (
            f"{counts.num_unsorted_positions:,} of {num_positions:,} positions are not ordered by falling "
            "value; they are sorted when converted"
        )
        yield Finding("unsorted", "note", sentence)
