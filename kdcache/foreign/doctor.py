"""Examine a cache of ours or a foreign one: what it is, what it holds, what is wrong with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdcache.foreign.alignment import Alignment, judge
from kdcache.foreign.base import Finding, ForeignCache, ForeignSequence, ReadOptions
from kdcache.foreign.blocks import SHIFTS
from kdcache.foreign.detect import open_foreign
from kdcache.foreign.findings import all_findings
from kdcache.foreign.live import Comparison, compare_with_teacher, reservoir
from kdcache.foreign.live_findings import with_teacher
from kdcache.foreign.probes import Tally
from kdcache.teacher.base import Teacher

Progress = Callable[[int], object]
"""Called with the number of rows of each sequence that was read."""


@dataclass(frozen=True, kw_only=True)
class ExamineOptions:
    """How closely to look.

    Attributes:
        read: what the user says of the files.
        vocab_size: ids that the teacher's distributions range over; None for what the files say.
        tokenizer_size: ids of the tokenizer; None where it is not known.
        sample: sequences to ask the teacher about.
        seed: of that choice.
    """

    read: ReadOptions = field(default_factory=ReadOptions)
    vocab_size: int | None = None
    tokenizer_size: int | None = None
    sample: int = 16
    seed: int = 0


@dataclass(frozen=True)
class Examination:
    """What was found.

    Attributes:
        title, format, path, facts: of the cache.
        findings: everything that is to be said; empty or notes alone for a sound cache.
        tally: totals over all rows.
        alignment: the verdict of the text; None where there are no tokens.
        comparison: with the teacher, where one was asked.
    """

    title: str
    format: str
    path: str
    facts: dict[str, str]
    findings: tuple[Finding, ...]
    tally: Tally
    alignment: Alignment | None
    comparison: Comparison | None = None

    @property
    def is_sound(self) -> bool:
        """Whether there is nothing but notes."""
        return all(finding.severity == "note" for finding in self.findings)

    def to_builtins(self) -> dict[str, Any]:
        """Everything for JSON, without what is not a number."""
        return {
            "format": self.format, "title": self.title, "path": self.path, "facts": self.facts, "sound": self.is_sound,
            "findings": [vars(finding) for finding in self.findings],
            "totals": numbers(self.tally),
            "alignment": None if self.alignment is None else vars(self.alignment),
            "comparison": None if self.comparison is None else vars(self.comparison) | {
                "line": vars(self.comparison.line), "exact_line": vars(self.comparison.exact_line),
            },
        }  # fmt: skip


def examine(
    path: str | Path, options: ExamineOptions, *, teacher: Teacher | None = None, progress: Progress | None = None
) -> Examination:
    """Read a foreign cache from end to end.

    Raises:
        InputError: nothing is there, no known format, or files that cannot be read. TeacherError: the teacher fails.
    """
    return examine_opened(open_foreign(path, options.read), options, teacher=teacher, progress=progress)


def examine_opened(
    cache: ForeignCache, options: ExamineOptions, *, teacher: Teacher | None = None, progress: Progress | None = None
) -> Examination:
    """The same for a cache that is open."""
    vocab_size = options.vocab_size or (teacher.identity.vocab_size if teacher else None) or cache.vocab_size
    tally = Tally(vocab_size=vocab_size, tokenizer_size=options.tokenizer_size, approximate_from=cache.approximate_from)
    sample = fill(tally, cache, options, progress)
    findings = all_findings(cache, tally)
    comparison = None
    if teacher is not None and tally.num_tokens and sample:
        # Sequences that the text speaks against are asked about too: chance would seldom draw them.
        sources = {sequence.source for sequence in sample}
        sample = [*sample, *(suspect for suspect in tally.proof.suspects() if suspect.source not in sources)]
        comparison = compare_with_teacher(sample, cache.values, teacher, approximate_from=cache.approximate_from)
        findings = with_teacher(cache, findings, comparison)
    return Examination(
        title=cache.title,
        format=cache.format,
        path=cache.path,
        facts=dict(cache.facts) | _facts(tally),
        findings=tuple(findings),
        tally=tally,
        alignment=judge(tally) if tally.num_tokens else None,
        comparison=comparison,
    )


def fill(tally: Tally, cache: ForeignCache, options: ExamineOptions, progress: Progress | None) -> Sequence[ForeignSequence]:
    """Count every sequence; gives the sample for the teacher."""
    sample: Sequence[ForeignSequence] = ()
    for sequence, sample in reservoir(cache.read(), options.sample, options.seed):  # noqa: B007 - the last one is the sample
        tally.add_sequence(sequence, cache.values)
        if progress is not None:
            progress(len(sequence.counts_R))
    return sample


def numbers(tally: Tally) -> dict[str, Any]:
    """The totals that JSON can hold."""
    plain = {name: value for name, value in vars(tally).items() if isinstance(value, int | float) or value is None}
    shown = {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in plain.items()}
    return shown | {"sizes": {str(size): number for size, number in sorted(tally.sizes.items())}}


def _facts(tally: Tally) -> dict[str, str]:
    rows = tally.num_rows - tally.num_missing_rows
    if not rows:
        return {}
    low, high = (pick((size for size in tally.sizes if size), default=0) for pick in (min, max))
    facts = {
        "rows": f"{rows:,} in {tally.num_sequences:,} sequences, {low if low == high else f'{low} to {high}'} entries each",
        "values": f"{tally.min_value:.4g} to {tally.max_value:.4g}",
    }
    if tally.num_tested_mass_rows and math.isfinite(tally.mass_max) and tally.mass_max < 1e29:
        facts["mass"] = f"{tally.mass_sum / tally.num_tested_mass_rows:.4f} in the mean, at most {tally.mass_max:.4f}"
    if tally.num_paired:
        alignment = judge(tally)
        shares = ", ".join(f"{s:+d}: {share:.3f}" for s, share in zip(SHIFTS, alignment.hit_share, strict=True))
        facts["alignment"] = f"{alignment.verdict}; share of rows whose support holds the target under shifts {shares}"
    return facts
