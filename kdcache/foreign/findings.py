"""From totals to sentences: what is wrong with a foreign cache, how bad it is, and what mends it.

Order of the sentences: values, normalisation, fitted tails, ids, extra entries, alignment, temperature.
"""

from __future__ import annotations

from collections.abc import Iterator

from kdcache.foreign.alignment import Alignment, applied_temperature, judge
from kdcache.foreign.base import Finding, ForeignCache, ValueKind
from kdcache.foreign.blocks import SHIFTS
from kdcache.foreign.probes import ROUNDING, Tally

MANY, MOST = 0.01, 0.9
MIN_TESTABLE_ROWS = 16
ROUNDED_MASS = 1.05
"""A normaliser that was rounded to bfloat16 moves every probability of its row by up to 4%: 2^-8 of a logarithm near 10."""

RISING_SHARE, SEAM_SHARE = 0.02, 0.25
TEMPERATURE_RANGE = (0.6, 1.7)
"""Inverse temperatures that text and teacher can differ by without any having been applied: a chat model on plain text is
over-confident, a base model is calibrated within a few percent."""


def all_findings(cache: ForeignCache, tally: Tally) -> list[Finding]:
    """Everything that is to be said, from the layout and from the values."""
    rows = tally.num_rows - tally.num_missing_rows
    if not rows:
        named = cache.findings or (Finding("no_rows", "fatal", "there is not one row with an entry in it"),)
        return list(named)
    found = [*cache.findings, *_missing(tally), *_not_numbers(tally, rows)]
    kind = list(_kind(cache.values, tally, rows))
    found += kind
    # What is no logprob has no mass to be tested, and the text says nothing of a temperature there; nor where the text itself
    # has chosen an entry.
    are_logprobs = all(finding.severity == "note" for finding in kind)
    found += _renormalised(tally) if are_logprobs else ()
    found += [*_tails(cache, tally, rows), *_ids(tally), *_entries(tally, rows)]
    if tally.num_tokens:
        alignment = judge(tally)
        extra = list(_extra_entries(tally, alignment))
        found += [*extra, *_alignment(alignment)]
        found += _temperature(tally, alignment) if are_logprobs and not extra else ()
    names = set()
    return [finding for finding in found if not (finding.name in names or names.add(finding.name))]


def _missing(tally: Tally) -> Iterator[Finding]:
    if tally.num_missing_rows:
        sentence = f"{tally.num_missing_rows:,} of {tally.num_rows:,} rows are null or empty; they are left out"
        yield Finding("missing_rows", "note", sentence)


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
    elif heavy > MANY and claimed == "logits" and tally.has_log_z:
        if tally.mass_max < ROUNDED_MASS:
            yield Finding(
                "rounded_normaliser", "note", f"{mass}: the normaliser was rounded, as in bfloat16; masses are cut at 1"
            )
        else:
            yield Finding("wrong_normaliser", "fatal", f"the normaliser does not belong to the logits: {mass}")
    elif claimed == "logits" and not tally.has_log_z:
        yield _without_normaliser(heavy, tally)
    elif heavy > MANY:
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
    if tally.num_unit_rows < (1 - MANY) * tally.num_tested_mass_rows or testable < MIN_TESTABLE_ROWS:
        return
    if tally.num_complete_rows > MOST * testable:
        sentence = (
            f"every row sums to 1 within {ROUNDING}, though the entries are far from dying out: they were renormalised over "
            "the "
            "support, and what the tail held is lost. A student would learn over-confidence; capture again"
        )
        yield Finding("renormalised", "fatal", sentence)


def _tails(cache: ForeignCache, tally: Tally, rows: int) -> Iterator[Finding]:
    rising, seam = tally.num_rising_tail_rows / rows, tally.num_seam_rows / rows
    if cache.approximate_from is None or (rising <= RISING_SHARE and seam <= SEAM_SHARE):
        return
    signs = []
    if rising > RISING_SHARE:
        signs.append(f"sorted values must fall, but rise by up to {tally.max_tail_rise:.2f} nats, in {rising:.0%} of the rows")
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
            f"token ids go up to {tally.max_id}, but the vocabulary has {tally.vocab_size}: it is another, or ids are damaged"
        )
        yield Finding("ids_outside_vocabulary", "fatal", sentence)
    elif tally.tokenizer_size is not None and tally.max_id >= tally.tokenizer_size:
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


def _extra_entries(tally: Tally, alignment: Alignment) -> Iterator[Finding]:
    index = SHIFTS.index(alignment.shift)
    widest = max((size for size in tally.sizes if size), default=0)
    extra, others = tally.sizes[widest], tally.sizes[widest - 1]
    targets = tally.least_is_target[index][widest]
    if (
        widest > 1
        and others
        and {size for size in tally.sizes if size} == {widest, widest - 1}
        and targets >= MOST * 0.9 * extra
    ):
        sentence = (
            f"{extra:,} rows have {widest} entries and {others:,} have {widest - 1}: the engine adds the text's own token "
            "where it is "
            "not among the top k. Who takes the first k, or cuts a rectangle, loses the k-th; converting keeps it as the "
            "target's logprob"
        )
        yield Finding("k_plus_1_rows", "repairable", sentence, "--repair k+1")
        return
    displaced = tally.first_is_displaced_target[index]
    if displaced > MANY * max(tally.num_paired, 1) and displaced > MOST * tally.num_first_smallest:
        sentence = (
            f"{displaced:,} rows start with the text's own token though it is their least entry: the first k of k+1 entries "
            "were kept, and "
            "the k-th most probable token is lost there"
        )
        yield Finding("displaced_entries", "repairable", sentence, "--repair k+1")


def _alignment(alignment: Alignment) -> Iterator[Finding]:
    listed = ", ".join(f"{shift:+d}: {nll:.3f}" for shift, nll in zip(SHIFTS, alignment.nll, strict=True))
    if alignment.verdict == "shifted":
        what = {
            -1: "each row is about the token at its own place, not the next",
            1: "each row is about the token after the next",
        }
        sentence = (
            f"rows are shifted by {alignment.shift:+d}: {what[alignment.shift]} (NLL of the text under shifts {listed} nats; "
            f"{alignment.margin:.2f} apart, {alignment.deviations:.0f} standard errors, {alignment.num_rows:,} rows)"
        )
        yield Finding("shifted_rows", "repairable", sentence, f"--shift {alignment.shift:+d}")
    elif alignment.verdict == "unclear":
        sentence = (
            f"where the rows belong cannot be told from {alignment.num_rows:,} rows: NLL of the text under shifts {listed} "
            "nats; "
            "--teacher MODEL tells exactly"
        )
        yield Finding("alignment_unclear", "undecided", sentence)


def _temperature(tally: Tally, alignment: Alignment) -> Iterator[Finding]:
    temperature = applied_temperature(tally, alignment.shift)
    low, high = TEMPERATURE_RANGE
    if alignment.verdict != "unclear" and temperature is not None and not low <= temperature <= high:
        sentence = (
            f"the text would be likelier if the values were {'sharper' if temperature > 1 else 'flatter'}: it looks as if a "
            "temperature "
            f"of about {temperature:.2g} had been applied to them, which cannot be undone; --teacher MODEL tells exactly"
        )
        yield Finding("temperature_applied", "undecided", sentence)
