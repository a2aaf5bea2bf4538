"""From totals to sentences: what is wrong with a foreign cache, how bad it is, and what mends it.

Order of the sentences: values, normalisation, fitted tails, ids, extra entries, alignment, temperature.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from kdcache.foreign.base import Finding, ForeignCache, ValueKind
from kdcache.foreign.judge.alignment import judge
from kdcache.foreign.judge.placement import MANY, MOST, evidence_of, extra_entries, other_logarithms, placement, temperature
from kdcache.foreign.probes import ROUNDING, Tally

MIN_TESTABLE_ROWS = 16
ROUNDED_MASS = 1.05
"""A normaliser that was rounded to bfloat16 moves every probability of its row by up to 4%: 2^-8 of a logarithm near 10."""

RISING_SHARE, SEAM_SHARE = 0.02, 0.25
RISING_HARM = 2e-3
"""Probability times nats by which a row's fitted values rise, in the mean: a sound fit of degree 8 wavers by 1e-4 and costs a
KL of 1e-4, README's budget config of DistillKit rises by 2e-2 and costs 1e-1."""

MAX_DRAWS, DRAW_SLACK = 500, 4e-3
"""More draws than this are no longer told from any numbers; half precision rounds counts by this share."""

PADDED_MASS = 0.1
"""Share of all probability that ids of padding may hold: a trained teacher gives them nothing, a random one their number."""


def all_findings(cache: ForeignCache, tally: Tally) -> list[Finding]:
    """Everything that is to be said, from the layout and from the values."""
    rows = tally.num_rows - tally.num_missing_rows
    if not rows:
        named = cache.findings or (Finding("no_rows", "fatal", "there is not one row with an entry in it"),)
        return list(named)
    found = [*cache.findings, *_missing(tally), *_row_counts(tally), *_not_numbers(tally, rows)]
    kind = list(_kind(cache.values, tally, rows))
    found += kind
    # What is no logprob has no mass to be tested, and the text says nothing of a temperature there; nor where the text itself
    # has chosen an entry.
    are_logprobs = all(finding.severity == "note" for finding in kind)
    found += _renormalised(tally) if are_logprobs else ()
    found += [*_tails(cache, tally, rows), *_ids(tally), *_entries(tally, rows), *tally.runs.findings()]
    if tally.num_tokens:
        alignment = judge(tally)
        extra = list(extra_entries(tally, alignment))
        are_normal = are_logprobs and not any(finding.name in ("renormalised", "sampled_counts") for finding in found)
        tempered = list(temperature(tally, alignment)) if are_logprobs and not extra else []
        evidence = evidence_of(tally, alignment) if are_normal else None
        if evidence is not None and not tempered and not extra:
            tempered = list(other_logarithms(tally, alignment, evidence))
        found += [*extra, *placement(alignment, evidence, is_tempered=bool(tempered)), *tempered]
    names = set()
    return [finding for finding in found if not (finding.name in names or names.add(finding.name))]


def _missing(tally: Tally) -> Iterator[Finding]:
    if tally.num_missing_rows:
        sentence = f"{tally.num_missing_rows:,} of {tally.num_rows:,} rows are null, empty, or -inf alone; they are left out"
        yield Finding("missing_rows", "note", sentence)


def _row_counts(tally: Tally) -> Iterator[Finding]:
    if tally.num_rowless_sequences:
        sentence = f"{tally.num_rowless_sequences:,} of {tally.num_sequences:,} sequences have no row; they are left out"
        yield Finding("sequences_without_rows", "note", sentence)
    if tally.num_rows_outside:
        sentence = (
            f"{tally.num_rows_outside:,} rows in {tally.num_longer_sequences:,} sequences lie outside their text (more rows "
            "than tokens); they are left out"
        )
        yield Finding("rows_outside_text", "note", sentence)
    if tally.num_shorter_sequences:
        sentence = (
            f"{tally.num_shorter_sequences:,} of {tally.num_sequences:,} sequences have rows for a part of their text: "
            f"{tally.num_uncovered:,} positions with a target have none, and are not learnt"
        )
        yield Finding("rows_for_a_part", "note", sentence)


def _not_numbers(tally: Tally, rows: int) -> Iterator[Finding]:
    bad = tally.num_nan + tally.num_positive_infinite
    if bad:
        yield Finding(
            "not_numbers", "fatal", f"{bad:,} values are NaN or infinite in {rows:,} rows; a missing rank poisons a fitted row"
        )
    if tally.num_negative_infinite:
        sentence = f"{tally.num_negative_infinite:,} values are -inf, of ranks that the engine did not give; they are left out"
        yield Finding("missing_entries", "note", sentence)


def _kind(claimed: ValueKind, tally: Tally, rows: int) -> Iterator[Finding]:
    heavy, positive = tally.num_heavy_rows / rows, tally.num_positive_rows / rows
    mass = (
        f"the mass of a row, the sum of exp, is up to {tally.mass_max:.3g} ({tally.num_heavy_rows:,} of {rows:,} rows above 1)"
    )
    if claimed == "probs":
        if tally.min_value < 0 or tally.num_prob_rows < (1 - MANY) * rows:
            yield Finding("not_probabilities", "fatal", f"called probabilities, but they range from {tally.min_value:.3g} to "
                          f"{tally.max_value:.3g} and {rows - tally.num_prob_rows:,} rows sum to more than 1")  # fmt: skip
    elif claimed == "logprobs" and tally.max_value > 0 and tally.num_prob_rows > MOST * rows:
        sentence = "these are probabilities, not logprobs: all lie in [0, 1] and no row sums to more than 1"
        yield Finding("probabilities", "repairable", sentence, "--values probs")
    elif claimed == "logprobs" and tally.max_value > 1 and tally.num_negated_rows > MOST * rows:
        sentence = (
            f"these are negative logprobs (-log p, from {tally.min_value:.3g} to {tally.max_value:.3g}): with the other sign "
            "they rank falling and no row's mass is above 1"
        )
        yield Finding("negated_logprobs", "repairable", sentence, "--values nll")
    elif heavy > MANY and claimed == "logits" and tally.has_log_z:
        if tally.mass_max < ROUNDED_MASS:
            yield Finding(
                "rounded_normaliser", "note", f"{mass}: the normaliser was rounded, as in bfloat16; masses are cut at 1"
            )
        else:
            yield Finding("wrong_normaliser", "fatal", f"the normaliser does not belong to the logits: {mass}")
    elif claimed == "logits" and not tally.has_log_z:
        yield _without_normaliser(heavy, tally)
    elif heavy > MANY and not _is_of_tails(tally, rows):
        yield _unnormalised(positive, mass, tally, rows)


def _without_normaliser(heavy: float, tally: Tally) -> Finding:
    if heavy <= MANY and tally.max_value <= 0:
        sentence = (
            "called logits and without a normaliser, but no row's mass is above 1 and none is positive: they look like logprobs"
        )
        return Finding("named_logits", "repairable", sentence, "--values logprobs")
    sentence = (
        "logits without a normaliser: log-sum-exp over the vocabulary was not stored, so neither a probability nor the tail "
        "mass can "
        "be had, only ratios within a row; capture again and keep it"
    )
    return Finding("missing_normaliser", "fatal", sentence)


def _unnormalised(positive: float, mass: str, tally: Tally, rows: int) -> Finding:
    if positive > 0.5 or tally.num_zero_topped_rows > MOST * rows:
        form = (
            "with each row's maximum taken off" if tally.num_zero_topped_rows > MOST * rows else f"up to {tally.max_value:.3g}"
        )
        sentence = f"these are logits ({form}), not logprobs: {mass}; without their normaliser no probability can be had"
        return Finding("logits", "fatal", sentence)
    return Finding("unnormalised", "fatal", f"the values are not logprobs over the vocabulary: {mass}")


def _renormalised(tally: Tally) -> Iterator[Finding]:
    testable = tally.num_complete_testable_rows
    if tally.num_unit_rows < (1 - MANY) * tally.num_tested_mass_rows:
        return
    draws = _num_draws(tally)
    if draws is not None:
        sentence = (
            f"the values are counts of {draws} random draws, divided by {draws}: a sample of the teacher's distribution, not "
            "the top of it. Its entries are estimates, which only a sampled selection of ours says of them; capture again with "
            "selection.kind sampled"
        )
        yield Finding("sampled_counts", "fatal", sentence)
    elif testable >= MIN_TESTABLE_ROWS and tally.num_complete_rows > MOST * testable:
        sentence = (
            f"every row sums to 1 within {ROUNDING}, though the entries are far from dying out: they were renormalised over "
            "the "
            "support, and what the tail held is lost. A student would learn over-confidence; capture again"
        )
        yield Finding("renormalised", "fatal", sentence)


def _num_draws(tally: Tally) -> int | None:
    """N where all probabilities of rows that sum to 1 are multiples of 1/N; None where they are not."""
    probs = np.array(tally.unit_row_probs)
    if len(probs) < MIN_TESTABLE_ROWS or not probs.min() > 1 / MAX_DRAWS:
        return None
    for fold in (1, 2, 3):
        draws = round(fold / float(probs.min()))
        if draws > 2 and (np.abs(probs * draws - np.round(probs * draws)) < DRAW_SLACK * np.maximum(1, probs * draws)).all():
            return draws
    return None


def _is_of_tails(tally: Tally, rows: int) -> bool:
    """Whether rows are above 1 by their fitted part alone: that can be left out."""
    return tally.approximate_from is not None and tally.num_heavy_exact_rows <= MANY * rows and tally.num_positive_rows == 0


def _tails(cache: ForeignCache, tally: Tally, rows: int) -> Iterator[Finding]:
    rising, seam, heavy = (number / rows for number in (tally.num_rising_tail_rows, tally.num_seam_rows, tally.num_heavy_rows))
    is_rising = rising > RISING_SHARE and tally.tail_rise_sum > RISING_HARM * rows
    is_heavy = heavy > MANY and _is_of_tails(tally, rows)
    if cache.approximate_from is None or not (is_rising or is_heavy or seam > SEAM_SHARE):
        return
    signs = []
    if is_rising:
        signs.append(f"sorted values must fall, but rise by up to {tally.max_tail_rise:.2f} nats, in {rising:.0%} of the rows")
    if is_heavy:
        signs.append(f"they bring {heavy:.0%} of the rows above 1, up to {tally.mass_max:.3g}")
    if seam > SEAM_SHARE:
        signs.append(f"{seam:.0%} of the rows drop off a step there that no exact entry before it shows")
    sentence = (
        f"the fitted tails are broken from rank {cache.approximate_from} on: {'; '.join(signs)}; the exact entries can be kept"
    )
    yield Finding("broken_tails", "repairable", sentence, "--repair tails")


def _ids(tally: Tally) -> Iterator[Finding]:
    if tally.num_negative_ids:
        yield Finding("negative_ids", "fatal", f"{tally.num_negative_ids:,} token ids are negative")
    if tally.vocab_size is not None and tally.max_id >= tally.vocab_size:
        sentence = (
            f"token ids go up to {tally.max_id}, but the vocabulary has {tally.vocab_size}: it is another, or ids are damaged; "
            "or the teacher's output is wider than its tokenizer, then say how wide with --vocab-size V"
        )
        yield Finding("ids_outside_vocabulary", "fatal", sentence)
    elif tally.tokenizer_size is not None and tally.max_id >= tally.tokenizer_size:
        if tally.vocab_size is None and tally.padded_mass > PADDED_MASS * max(tally.mass_sum, 1.0):
            share = tally.padded_mass / max(tally.mass_sum, 1.0)
            sentence = (
                f"{tally.num_padded_ids:,} entries, with {share:.1%} of all probability, have ids up to {tally.max_id}, which "
                f"the tokenizer of {tally.tokenizer_size} ids does not have: padding is not that likely; the tokenizer is "
                "another, or ids are damaged"
            )
            yield Finding("ids_outside_vocabulary", "fatal", sentence)
            return
        known = tally.vocab_size is not None
        sentence = (
            f"{tally.num_padded_ids:,} entries, with {tally.padded_mass / max(tally.num_entries, 1):.2g} of probability each "
            "in the mean, "
            f"have ids up to {tally.max_id}, which the tokenizer of {tally.tokenizer_size} ids does not have: the teacher's "
            "output is "
            f"padded{'' if known else '; say how wide it is'}"
        )
        yield Finding("padded_vocabulary_ids", "note" if known else "repairable", sentence, None if known else "--vocab-size V")


def _entries(tally: Tally, rows: int) -> Iterator[Finding]:
    if tally.num_duplicate_rows:
        sentence = (
            f"{tally.num_duplicate_rows:,} of {rows:,} rows name an id twice; the first, with the greater value, can be kept"
        )
        yield Finding("duplicate_ids", "repairable", sentence, "--repair duplicates")
    if tally.num_unsorted_rows > tally.num_rising_tail_rows:
        sentence = (
            f"{tally.num_unsorted_rows:,} of {rows:,} rows are not ordered by falling value; they are sorted when converted"
        )
        yield Finding("unsorted", "note", sentence)
