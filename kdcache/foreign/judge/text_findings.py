"""What the text says of the positions, in sentences: extra entries, shifts, positions of another text, a temperature."""

from __future__ import annotations

from collections.abc import Iterator

from kdcache.foreign.base import Finding
from kdcache.foreign.blocks import SHIFTS
from kdcache.foreign.judge.alignment import Alignment, applied_temperature
from kdcache.foreign.probes import ProbeCounts
from kdcache.foreign.proof import BEYOND, NUM_SUSPECTS, Evidence, Suspect

MANY, MOST = 0.01, 0.9
NAMED_SUSPECTS = 3

TEMPERED_SHARE = 0.3
"""Of the way from chance hits to those that are claimed: positions of another text are below, sharpened ones above."""

STEEP = 0.8
"""An inverse temperature: logarithms to base 2 are 1.44 times natural ones, which would be likelier at 0.69."""

TEMPERATURE_RANGE = (0.6, 1.7)
"""Inverse temperatures that text and teacher can differ by without any having been applied: a chat model on plain text is
over-confident, a base model is calibrated within a few percent."""


def extra_entries(counts: ProbeCounts, alignment: Alignment) -> Iterator[Finding]:
    index = SHIFTS.index(alignment.shift)
    widest = max((size for size in counts.sizes if size), default=0)
    if widest == 1 and counts.num_lone_unlikely_positions and counts.hits[index] > (1 - MANY) * counts.num_paired > 0:
        sentence = (
            "each position holds the text's own token alone, however unlikely: the text has chosen the "
            "entries, not the teacher. The engine was asked for no top logprobs (vLLM: prompt_logprobs=0); "
            "ask again, for k of them"
        )
        yield Finding("targets_alone", "fatal", sentence)
        return
    extra, others = counts.sizes[widest], counts.sizes[widest - 1]
    targets = counts.least_is_target[index][widest]
    if (
        widest > 1
        and others
        and {size for size in counts.sizes if size} == {widest, widest - 1}
        and targets >= MOST * 0.9 * extra
    ):
        sentence = (
            f"{extra:,} positions have {widest} entries and {others:,} have {widest - 1}: the engine adds the "
            "text's own token where it is not among the top k. Who takes the first k, or cuts a rectangle, "
            "loses the k-th; converting keeps it as the target's logprob"
        )
        yield Finding("k_plus_1_entries", "repairable", sentence, "--repair k+1")
        return
    displaced = counts.first_is_displaced_target[index]
    if displaced > MANY * max(counts.num_paired, 1) and displaced > MOST * counts.num_first_smallest:
        sentence = (
            f"{displaced:,} positions start with the text's own token though it is their least entry: the "
            "first k of k+1 entries were kept, and the k-th most probable token is lost there"
        )
        yield Finding("displaced_entries", "repairable", sentence, "--repair k+1")


def evidence_of(counts: ProbeCounts, alignment: Alignment) -> Evidence:
    """Compare hits with masses under the shift that the text speaks for, or else under the claimed one."""
    return counts.proof.at(alignment.shift if alignment.verdict != "unclear" else 0)


def alignment_findings(alignment: Alignment, evidence: Evidence | None, *, is_tempered: bool) -> Iterator[Finding]:
    """Whether positions belong to their tokens, and where else they would.

    Args:
        alignment: what the text says.
        evidence: None where the values have no mass.
        is_tempered: the values look sharpened or flattened, which alone makes targets miss a support that is theirs.
    """
    verdict = "untested" if evidence is None else evidence.verdict
    is_foreign = evidence is not None and verdict == "foreign" and not evidence.suspects and not is_tempered
    explained = is_tempered and evidence is not None and not evidence.suspects and evidence.share > TEMPERED_SHARE
    if evidence is not None and verdict in ("foreign", "unclear") and not explained:
        yield _few_hits(evidence)
    if alignment.verdict == "shifted" and not is_foreign:
        yield _shifted(alignment)
    elif alignment.verdict == "unclear" and verdict not in ("foreign", "unclear", "proven"):
        sentence = (
            f"where the positions belong cannot be told from {alignment.num_positions:,} positions: NLL of the "
            f"text under shifts {_listed(alignment)} nats; --teacher MODEL tells exactly"
        )
        yield Finding("alignment_unclear", "undecided", sentence)
    if evidence is not None:
        yield from _calibration(evidence, is_tempered=is_tempered)


def _calibration(evidence: Evidence, *, is_tempered: bool) -> Iterator[Finding]:
    """Notes on hits that chance does not explain, where positions are about their text all the same."""
    if evidence.verdict in ("proven", "consistent", "untested") and evidence.deviations >= BEYOND:
        sentence = (
            f"{_hits(evidence)}: more than the positions claim. The text was written greedily or after "
            "filters, or a temperature above 1 was applied to the values, or they are not natural logarithms "
            "of probabilities; --teacher MODEL tells which"
        )
        yield Finding("many_hits", "note", sentence)
    is_short = evidence.verdict in ("proven", "consistent") and evidence.deviations <= -BEYOND
    if not is_tempered and (is_short or evidence.verdict == "doubtful"):
        sentence = (
            f"{_hits(evidence)}: fewer than the positions claim, though far more than chance. The teacher is "
            "surer of this text than it should be, as chat models are, or a temperature below 1 was applied, "
            "or a few positions belong elsewhere; --teacher MODEL tells which"
        )
        yield Finding("few_hits", "note", sentence)


def _shifted(alignment: Alignment) -> Finding:
    what = {
        -1: "each position is about the token at its own index, not the next",
        1: "each position is about the token after the next",
    }
    sentence = (
        f"positions are shifted by {alignment.shift:+d}: {what[alignment.shift]} (NLL of the text under shifts "
        f"{_listed(alignment)} nats; {alignment.margin:.2f} apart, {alignment.deviations:.0f} standard errors, "
        f"{alignment.num_positions:,} positions)"
    )
    return Finding("shifted_positions", "repairable", sentence, f"--shift {alignment.shift:+d}")


def _few_hits(evidence: Evidence) -> Finding:
    """Positions that are not about their text: all, some sequences, or too many to be chance and too few to be sure."""
    if evidence.suspects:
        shown = "; ".join(map(_suspect, evidence.suspects[:NAMED_SUSPECTS]))
        count = f"{len(evidence.suspects):,}{' or more' * (len(evidence.suspects) == NUM_SUSPECTS)}"
        sentence = (
            f"{count} of {evidence.num_sequences:,} sequences hold positions that are not about their text: {shown}; "
            "--teacher MODEL tells exactly. Take them out, or make their positions again"
        )
        return Finding("foreign_sequences", "fatal", sentence)
    if evidence.verdict == "unclear":
        sentence = (
            f"{_hits(evidence)}: some positions belong elsewhere, or are of padding, or a temperature below 1 "
            "was applied, or the teacher is surer of this text than it should be; --teacher MODEL tells which"
        )
        return Finding("few_hits", "undecided", sentence)
    sentence = (
        f"the positions are not about their text: {_hits(evidence)}. Ids of positions or text are damaged or "
        "another tokenizer's, or positions belong to other tokens; --teacher MODEL tells more"
    )
    return Finding("foreign_positions", "fatal", sentence)


def _hits(evidence: Evidence) -> str:
    return (
        f"{evidence.found:.1%} of the targets are in their position's support, where the positions' masses say "
        f"{evidence.claimed:.1%} and chance gives {evidence.chance:.1%} ({evidence.deviations:+.1f} standard "
        f"deviations, {evidence.num_positions:,} positions)"
    )


def _suspect(suspect: Suspect) -> str:
    fits = "" if suspect.other_shift is None else f", and {suspect.other_shift:+d} would fit"
    return (
        f"{suspect.source} ({suspect.found:.0%} of its targets in the support, masses say {suspect.claimed:.0%}, "
        f"{suspect.deviations:+.1f} standard deviations{fits})"
    )


def _listed(alignment: Alignment) -> str:
    return ", ".join(f"{shift:+d}: {nll:.3f}" for shift, nll in zip(SHIFTS, alignment.nll, strict=True))


def other_logarithms(counts: ProbeCounts, alignment: Alignment, evidence: Evidence) -> Iterator[Finding]:
    """Far more hits than masses say, and positions too steep for the text: any temperature would make one of them, not both."""
    applied = applied_temperature(counts, alignment.shift)
    if applied is not None and applied < STEEP and evidence.deviations >= BEYOND:
        sentence = (
            f"{_hits(evidence)}, and the text would be likelier if the values were flatter: they look like logarithms to "
            "another base, as of 2, and natural ones are needed; --teacher MODEL tells exactly"
        )
        yield Finding("other_logarithms", "undecided", sentence)


def temperature(counts: ProbeCounts, alignment: Alignment) -> Iterator[Finding]:
    applied = applied_temperature(counts, alignment.shift)
    low, high = TEMPERATURE_RANGE
    if alignment.verdict != "unclear" and applied is not None and not low <= applied <= high:
        sentence = (
            f"the text would be likelier if the values were {'sharper' if applied > 1 else 'flatter'}: it looks as if a "
            f"temperature of about {applied:.2g} had been applied to them, which cannot be undone"
            f"{', or as if the text had been written greedily' if applied > 1 else ''}; --teacher MODEL tells exactly"
        )
        yield Finding("temperature_applied", "undecided", sentence)
