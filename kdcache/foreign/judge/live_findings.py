"""From a comparison with the teacher to sentences: exact where the text alone could only hint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kdcache.foreign.base import Finding, ForeignCache
from kdcache.foreign.blocks import SHIFTS
from kdcache.foreign.judge.live import Comparison

SUPERSEDED = (
    "shifted_positions", "alignment_unclear", "temperature_applied", "foreign_positions", "foreign_sequences", "few_hits",
    "many_hits", "broken_tails", "other_logarithms",
)  # fmt: skip
"""Hints from the text and the values, which the teacher's answer replaces."""

TOLERANCE_NATS = 0.02
"""The mean KL to the same teacher in another engine, in bfloat16, stays below this; a wrong model's does not."""

SLOPE_TOLERANCE = 0.05
SAME_SUPPORT, RESIDUAL_SHARE = 0.7, 0.5
"""A temperature keeps a position's order, so its support, and a line; positions of another text share few ids, off any line."""

OFFSET_NATS = 0.02
"""Mean difference of stored and live logprobs that rounding does not explain."""

BROKEN_TAIL_NATS = 0.1
"""Mean error of fitted entries: a sound fit of 48 ranks is 0.04 off, the budget config in DistillKit's README 0.12, a curve
read with another spacing 0.18."""

FOREIGN_NATS, FOREIGN_FACTOR = 0.3, 4.0
"""A sequence stands out where its KL is this, and this many times that of the sequences that agree."""

NAMED_SEQUENCES = 3


def with_teacher(cache: ForeignCache, findings: Sequence[Finding], comparison: Comparison) -> list[Finding]:
    """The findings with those that the teacher decides put in place of the hints."""
    moves = [Finding("teacher_moves", "undecided", comparison.moved)] if comparison.moved else []
    exact = [*moves, *_findings(cache, comparison)]
    decided = {finding.name for finding in exact} | set(SUPERSEDED)
    return [*(finding for finding in findings if finding.name not in decided), *exact]


def _findings(cache: ForeignCache, c: Comparison) -> Iterator[Finding]:
    listed = ", ".join(f"{shift:+d}: {kl:.3g}" for shift, kl in zip(SHIFTS, c.kl, strict=True))
    if c.shift:
        sentence = f"the teacher says that positions are shifted by {c.shift:+d}: KL(live || stored) under shifts {listed} nats"
        yield Finding("shifted_positions", "repairable", sentence, f"--shift {c.shift:+d}")
    line = c.exact_line
    if not line.num_entries:
        yield Finding(
            "teacher_disagrees", "fatal", f"no stored id is one that the teacher finds likely: it is another teacher ({listed})"
        )
        return
    foreign = _foreign_sequences(c)
    if foreign is not None:
        yield foreign
        return
    # The slope is not a number where every position has one exact entry, or is flat: nothing can be said of a temperature then.
    if (
        c.common_share > SAME_SUPPORT
        and line.slope > 0
        and abs(line.slope - 1) > SLOPE_TOLERANCE
        and line.residual < RESIDUAL_SHARE * abs(line.slope - 1)
    ):
        sentence = (
            f"a temperature of {1 / line.slope:.3g} was applied to the stored values (they are {line.slope:.3g} times the "
            f"teacher's, within {line.residual:.2g} nats); this cannot be undone from a truncated position"
        )
        yield Finding("temperature_applied", "fatal", sentence)
        return
    cost = c.renormalisation_cost
    if (
        c.common_share > SAME_SUPPORT
        and line.offset_mean > OFFSET_NATS
        and abs(line.offset_mean - cost) < 0.2 * cost + line.residual
    ):
        sentence = (
            f"the values were renormalised over the support: they lie {line.offset_mean:.3f} nats above the teacher's, and its "
        )
        yield Finding("renormalised", "fatal", f"{sentence}mass there is {c.kept_mass:.4f}; what the tail held is lost")
        return
    broken = _broken_tails(cache, c)
    if broken is not None:
        yield broken
        return
    yield from _agreement(c, listed)


def _broken_tails(cache: ForeignCache, c: Comparison) -> Finding | None:
    """Exact entries are the teacher's, and fitted ones are not."""
    is_off = c.fitted_error > BROKEN_TAIL_NATS or _kl(c) > TOLERANCE_NATS
    if cache.approximate_from is None or c.exact_kl > TOLERANCE_NATS or not is_off:
        return None
    sentence = (
        f"the fitted tails are {c.fitted_error:.2f} nats off the teacher's in the mean, up to {c.line.max_difference:.1f} "
        f"(KL {_kl(c):.3g}), while the exact entries are at most {c.exact_line.max_difference:.2g} off"
    )
    causes = [finding.sentence for finding in cache.findings if finding.name == "broken_tails"]
    return Finding("broken_tails", "repairable", "; ".join([sentence, *causes]), "--repair tails")


def _kl(c: Comparison) -> float:
    return c.kl[SHIFTS.index(c.shift)]


def _foreign_sequences(c: Comparison) -> Finding | None:
    """Some sequences are far off the teacher, and the rest are not: positions of another text, or shifted."""
    foreign = [(source, kl) for source, kl in c.sequence_kl if kl > TOLERANCE_NATS]
    others = [kl for _, kl in c.sequence_kl if kl <= TOLERANCE_NATS]
    if not foreign or not others or min(kl for _, kl in foreign) < max(FOREIGN_NATS, FOREIGN_FACTOR * max(others)):
        return None
    named = ", ".join(f"{source} ({kl:.2g})" for source, kl in sorted(foreign, key=lambda item: -item[1])[:NAMED_SEQUENCES])
    sentence = (
        f"{len(foreign):,} of {len(c.sequence_kl):,} sequences hold positions that the teacher does not give "
        f"for their text, by KL in nats: {named}; the others are within {max(others):.2g}. Their positions are "
        "shifted, or of another text; take them out, or make their positions again"
    )
    return Finding("foreign_sequences", "fatal", sentence)


def _agreement(c: Comparison, listed: str) -> Iterator[Finding]:
    kl = _kl(c)
    if kl > TOLERANCE_NATS:
        sentence = (
            f"the values are not this teacher's: KL(live || stored) is {kl:.3g} nats per position (shifts {listed}), up to "
        )
        yield Finding("teacher_disagrees", "fatal", f"{sentence}{c.line.max_difference:.2g} nats apart in an entry")
        return
    sentence = (
        f"the teacher agrees: KL(live || stored) is {kl:.3g} nats per position over {c.num_positions:,} positions, at most "
    )
    yield Finding("teacher_agrees", "note", f"{sentence}{c.line.max_difference:.2g} nats in an entry")
    if c.num_outlier_positions:
        named = ", ".join(f"{source} position {position} ({nats:.2g})" for source, position, nats in c.outliers)
        sentence = (
            f"{c.num_outlier_positions:,} of {c.num_positions:,} positions differ from the teacher's by far "
            f"more than rounding; positions are {c.typical_difference:.2g} nats off in the median: {named}; "
            "these positions, or bytes of the file, may be damaged"
        )
        yield Finding("outlier_positions", "undecided", sentence)
