"""Examine a cache of ours or a foreign one: what it is, what it holds, what is wrong with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdcache.foreign.base import Finding, ForeignCache, ForeignSequence, ReadConfig
from kdcache.foreign.blocks import SHIFTS
from kdcache.foreign.formats.detect import open_foreign
from kdcache.foreign.judge.alignment import Alignment, judge
from kdcache.foreign.judge.findings import all_findings
from kdcache.foreign.judge.live import Comparison, compare_with_teacher, reservoir
from kdcache.foreign.judge.live_findings import with_teacher
from kdcache.foreign.judge.text_findings import evidence_of
from kdcache.foreign.probes import ProbeCounts
from kdcache.foreign.proof import Evidence
from kdcache.teacher.base import Teacher

Progress = Callable[[int], object]
"""Called with the number of positions of each sequence that was read."""


@dataclass(frozen=True, kw_only=True)
class ExamineConfig:
    """How closely to look.

    Attributes:
        read: what the user says of the files.
        vocab_size: ids that the teacher's distributions range over; None for what the files say.
        tokenizer_size: ids of the tokenizer; None where it is not known.
        num_sequences: how many to ask the teacher about, chosen at random.
        seed: of that choice.
    """

    read: ReadConfig = field(default_factory=ReadConfig)
    vocab_size: int | None = None
    tokenizer_size: int | None = None
    num_sequences: int = 16
    seed: int = 0


@dataclass(frozen=True)
class Examination:
    """What was found in a cache.

    Attributes:
        title, format, path, facts: of the cache.
        findings: everything to be said; empty or only notes for a sound cache.
        tally: totals over all positions.
        alignment: the verdict of the text; None without tokens.
        evidence: how many targets are in the support, and the supports' masses, under the shift that the text speaks
            for; None as above.
        comparison: with the teacher, where one was asked.
    """

    title: str
    format: str
    path: str
    facts: dict[str, str]
    findings: tuple[Finding, ...]
    counts: ProbeCounts
    alignment: Alignment | None
    evidence: Evidence | None = None
    comparison: Comparison | None = None

    @property
    def is_sound(self) -> bool:
        """Whether there are only notes."""
        return all(finding.severity == "note" for finding in self.findings)

    def alignment_proof(self) -> dict[str, Any]:
        """What shows that the positions belong to their tokens, once they are moved as the findings say, for a manifest.

        `proven_by` is `teacher`, `text` (see README.md), or None with the reason.
        """
        if self.comparison is not None and any(finding.name == "teacher_agrees" for finding in self.findings):
            c = self.comparison
            asked = {"num_sequences": c.num_sequences, "num_rows": c.num_positions, "kl_nats": c.kl[SHIFTS.index(c.shift)]}
            return {"proven_by": "teacher", **asked}
        e = self.evidence
        if e is None:
            return {"proven_by": None, "reason": "the text is missing"}
        totals = {
            "num_rows": e.num_positions, "hits_claimed": e.claimed, "hits_found": e.found, "hits_by_chance": e.chance,
            "deviations": e.deviations, "worst_sequence": e.worst, "other_shift": e.rival,
        }  # fmt: skip
        finite = {name: value for name, value in totals.items() if math.isfinite(value)}
        if e.verdict == "proven":
            return {"proven_by": "text", **finite}
        reasons = {
            "consistent": "another shift of the positions fits the text too",
            "untested": "there are too few positions, or positions that hit any text",
            "doubtful": "targets are in their position's support less often than its mass says",
            "unclear": "targets are in their position's support less often than its mass says",
            "foreign": "targets are in their position's support far less often than its mass says",
        }
        reason = (
            f"{len(e.suspects):,} sequences hold positions that are not about their text" if e.suspects else reasons[e.verdict]
        )
        return {"proven_by": None, "reason": reason, **finite}

    def to_builtins(self) -> dict[str, Any]:
        """Return everything for JSON; what is not finite becomes null."""
        return {
            "format": self.format, "title": self.title, "path": self.path, "facts": self.facts, "sound": self.is_sound,
            "findings": [vars(finding) for finding in self.findings],
            "totals": totals(self.counts),
            "alignment": None if self.alignment is None else vars(self.alignment),
            "evidence": None if self.evidence is None else _plain(self.evidence),
            "alignment_proof": self.alignment_proof(),
            "comparison": None if self.comparison is None else vars(self.comparison) | {
                "line": vars(self.comparison.line), "exact_line": vars(self.comparison.exact_line),
            },
        }  # fmt: skip


def examine(
    path: str | Path, config: ExamineConfig, *, teacher: Teacher | None = None, progress: Progress | None = None
) -> Examination:
    """Read a foreign cache from end to end.

    Raises:
        InputError: nothing is there, no known format, or files that cannot be read. TeacherError: the teacher fails.
    """
    return examine_opened(open_foreign(path, config.read), config, teacher=teacher, progress=progress)


def examine_opened(
    cache: ForeignCache, config: ExamineConfig, *, teacher: Teacher | None = None, progress: Progress | None = None
) -> Examination:
    """Examine a cache that is open."""
    vocab_size = config.vocab_size or (teacher.identity.vocab_size if teacher else None) or cache.vocab_size
    counts = ProbeCounts(vocab_size=vocab_size, tokenizer_size=config.tokenizer_size, approximate_from=cache.approximate_from)
    sample = fill(counts, cache, config, progress)
    findings = all_findings(cache, counts)
    alignment = judge(counts) if counts.num_tokens else None
    evidence = None if alignment is None else evidence_of(counts, alignment)
    comparison = None
    if teacher is not None and counts.num_tokens and sample:
        # Sequences that the text speaks against are asked about too: chance would seldom draw them.
        sources = {sequence.source for sequence in sample}
        sample = [*sample, *(suspect for suspect in counts.proof.suspects() if suspect.source not in sources)]
        comparison = compare_with_teacher(sample, cache.values, teacher, approximate_from=cache.approximate_from)
        findings = with_teacher(cache, findings, comparison)
    return Examination(
        title=cache.title,
        format=cache.format,
        path=cache.path,
        facts=dict(cache.facts) | _facts(counts) | _hit_facts(evidence),
        findings=tuple(findings),
        counts=counts,
        alignment=alignment,
        evidence=evidence,
        comparison=comparison,
    )


def fill(
    counts: ProbeCounts, cache: ForeignCache, config: ExamineConfig, progress: Progress | None
) -> Sequence[ForeignSequence]:
    """Count every sequence; return the sample for the teacher."""
    sample: Sequence[ForeignSequence] = ()
    for sequence, sample in reservoir(cache.read(), config.num_sequences, config.seed):  # noqa: B007 - the last one is the sample
        counts.add_sequence(sequence, cache.values)
        if progress is not None:
            progress(len(sequence.counts_P))
    return sample


def totals(counts: ProbeCounts) -> dict[str, Any]:
    """Return the totals that JSON can hold."""
    plain = {name: value for name, value in vars(counts).items() if isinstance(value, int | float) or value is None}
    shown = {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in plain.items()}
    return shown | {"sizes": {str(size): count for size, count in sorted(counts.sizes.items())}}


def _plain(evidence: Evidence) -> dict[str, Any]:
    fields = {name: getattr(evidence, name) for name in evidence.__dataclass_fields__}
    shown = {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in fields.items()}
    return shown | {"suspects": [vars(suspect) for suspect in evidence.suspects]}


def _hit_facts(evidence: Evidence | None) -> dict[str, str]:
    if evidence is None or not evidence.num_positions or not math.isfinite(evidence.claimed):
        return {}
    e = evidence
    known = {
        "proven": "proven from the text",
        "consistent": "fits, and so does another shift",
        "foreign": "not proven: positions are not about their text",
        "doubtful": "not proven: few hits",
        "unclear": "not proven: too few hits",
        "untested": "cannot be tested",
    }
    shown = (
        f"{known[e.verdict]}; of the targets {e.found:.1%} are in the support, masses say {e.claimed:.1%} and "
        f"chance gives {e.chance:.1%}: {e.deviations:+.1f} standard deviations, {e.worst:+.1f} in the worst of "
        f"{e.num_sequences:,} sequences, {e.rival:+.1f} under another shift"
    )
    return {"placement": shown}


def _facts(counts: ProbeCounts) -> dict[str, str]:
    positions = counts.num_positions - counts.num_missing_positions
    if not positions:
        return {}
    low, high = (pick((size for size in counts.sizes if size), default=0) for pick in (min, max))
    facts = {
        "positions": f"{positions:,} in {counts.num_sequences:,} sequences, "
        f"{low if low == high else f'{low} to {high}'} entries each",
        "values": f"{counts.min_value:.4g} to {counts.max_value:.4g}",
    }
    if counts.num_tested_mass_positions and math.isfinite(counts.mass_max) and counts.mass_max < 1e29:
        facts["mass"] = f"{counts.mass_sum / counts.num_tested_mass_positions:.4f} in the mean, at most {counts.mass_max:.4f}"
    if counts.num_paired:
        alignment = judge(counts)
        shares = ", ".join(f"{s:+d}: {share:.3f}" for s, share in zip(SHIFTS, alignment.hit_share, strict=True))
        facts["alignment"] = f"{alignment.verdict}; share of positions whose support holds the target under shifts {shares}"
    return facts
