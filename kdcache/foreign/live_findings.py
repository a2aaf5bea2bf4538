"""From a comparison with the teacher to sentences: exact where the text alone could only hint."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from kdcache.foreign.base import Finding, ForeignCache
from kdcache.foreign.blocks import SHIFTS
from kdcache.foreign.live import Comparison

SUPERSEDED = ("shifted_rows", "alignment_unclear", "temperature_applied")
"""Hints from the text that the teacher's word replaces."""

TOLERANCE_NATS = 0.02
"""Mean KL between the stored rows and the same teacher through another engine, in bfloat16, stays below; a wrong model does
not."""

SLOPE_TOLERANCE = 0.05
OFFSET_NATS = 0.02
"""Mean difference of stored and live logprobs that rounding does not explain."""

BROKEN_TAIL_NATS = 0.3


def with_teacher(cache: ForeignCache, findings: Sequence[Finding], comparison: Comparison) -> list[Finding]:
    """The findings with those that the teacher decides put in place of the hints."""
    moves = [Finding("teacher_moves", "undecided", comparison.moved)] if comparison.moved else []
    exact = [*moves, *_findings(cache, comparison)]
    decided = {finding.name for finding in exact} | set(SUPERSEDED)
    return [*(finding for finding in findings if finding.name not in decided), *exact]


def _findings(cache: ForeignCache, c: Comparison) -> Iterator[Finding]:
    listed = ", ".join(f"{shift:+d}: {kl:.3g}" for shift, kl in zip(SHIFTS, c.kl, strict=True))
    if c.shift:
        sentence = f"the teacher says that rows are shifted by {c.shift:+d}: KL(live || stored) under shifts {listed} nats"
        yield Finding("shifted_rows", "repairable", sentence, f"--shift {c.shift:+d}")
    line = c.exact_line
    if math.isnan(line.slope):
        yield Finding(
            "teacher_disagrees", "fatal", f"no stored id is one that the teacher finds likely: it is another teacher ({listed})"
        )
        return
    if abs(line.slope - 1) > SLOPE_TOLERANCE and line.residual < abs(line.slope - 1):
        sentence = (
            f"a temperature of {1 / line.slope:.3g} was applied to the stored values (they are {line.slope:.3g} times the "
            f"teacher's, within {line.residual:.2g} nats); this cannot be undone from a truncated row"
        )
        yield Finding("temperature_applied", "fatal", sentence)
        return
    cost = c.renormalisation_cost
    if line.offset_mean > OFFSET_NATS and abs(line.offset_mean - cost) < 0.2 * cost + line.residual:
        sentence = (
            f"the values were renormalised over the support: they lie {line.offset_mean:.3f} nats above the teacher's, and its "
        )
        yield Finding("renormalised", "fatal", f"{sentence}mass there is {c.kept_mass:.4f}; what the tail held is lost")
        return
    if cache.approximate_from is not None and c.line.residual > BROKEN_TAIL_NATS >= line.residual:
        sentence = (
            f"the fitted tails are {c.line.residual:.2f} nats (root mean square) off the teacher's, up to "
            f"{c.line.max_difference:.1f}, while the exact entries are {line.residual:.2g} off"
        )
        yield Finding("broken_tails", "repairable", sentence, "--repair tails")
        return
    yield from _agreement(c, listed)


def _agreement(c: Comparison, listed: str) -> Iterator[Finding]:
    kl = c.kl[SHIFTS.index(c.shift)]
    if kl > TOLERANCE_NATS:
        sentence = f"the values are not this teacher's: KL(live || stored) is {kl:.3g} nats per row (shifts {listed}), up to "
        yield Finding("teacher_disagrees", "fatal", f"{sentence}{c.line.max_difference:.2g} nats apart in an entry")
    else:
        sentence = f"the teacher agrees: KL(live || stored) is {kl:.3g} nats per row over {c.num_rows:,} rows, at most "
        yield Finding("teacher_agrees", "note", f"{sentence}{c.line.max_difference:.2g} nats in an entry")
