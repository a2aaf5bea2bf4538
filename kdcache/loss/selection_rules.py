"""How a loss reads the teacher: which tail policy and which entries are right for a selection; the rest is refused in words."""

from __future__ import annotations

from dataclasses import dataclass

from kdcache.errors import LossError
from kdcache.format.selection import ENTRIES, SELECTION_KINDS, entries_of
from kdcache.kernels.base import Objective
from kdcache.kernels.divergences import DIVERGENCES, TAIL_POLICIES, Divergence, get_divergence


@dataclass(frozen=True, slots=True)
class Reading:
    """How the entries of a position go into a loss.

    Attributes:
        tail: one of TAIL_POLICIES.
        entries: `exact` leaves estimates out; `unbiased` reads all entries.
    """

    tail: str
    entries: str


def reading_for(
    origin: str,
    divergence: str | Divergence = "forward_kl",
    *,
    tail: str | None = None,
    entries: str | None = None,
    temperature: float = 1.0,
) -> Reading:
    """The best reading known for a selection, or the one that is asked for.

    By default the forward KL at temperature 1 reads all entries of a random selection, without bias; everything else reads the
    exact entries and one bucket for the tail (README.md has the figures).

    Args:
        origin: kind of the cache's selection, or what the entries are: `exact`, `unbiased` or `mixed`.
        divergence: a name, or one made with its parameters.
        tail: None for the best.
        entries: `exact` or `unbiased`; None for the best that goes with the tail.
        temperature: other than 1 it needs the normalisers kept at capture, which are not seen here.

    Raises:
        LossError: an unknown word; a loss that would be wrong, with the reason and what is right.
    """
    held, divergence = _held(origin), get_divergence(divergence)
    if entries not in (None, "exact", "unbiased"):
        raise LossError(f"entries is {entries!r}, but must be 'exact', 'unbiased' or None")
    if divergence.requirements.tail_sample:
        reading = _with_both(origin, held, divergence, tail, entries)
    elif entries == "unbiased" or (entries is None and _reads_estimates(held, divergence, tail, temperature)):
        reading = _with_estimates(origin, held, divergence, tail, temperature)
    else:
        reading = _exact_only(origin, held, divergence, tail, entries)
    Objective(reading.tail, divergence=divergence, temperature=temperature)
    return reading


def _held(origin: str) -> str:
    if origin not in (*ENTRIES, *SELECTION_KINDS):
        raise LossError(f"selection is {origin!r}, but must be one of {', '.join(map(repr, SELECTION_KINDS))}")
    return origin if origin in ENTRIES else entries_of(origin)


def _shown(origin: str) -> str:
    return f"{origin!r} entries" if origin in ENTRIES else f"the selection {origin!r}"


def _reads_estimates(held: str, divergence: Divergence, tail: str | None, temperature: float) -> bool:
    if held == "exact" or not divergence.requirements.unbiased:
        return False
    # Estimates stand for temperature 1; the exact entries of a mixed selection have normalisers for the others.
    has_other_way = held == "mixed" and temperature != 1
    return tail == "drop" or (tail is None and not has_other_way)


def _with_both(origin: str, held: str, divergence: Divergence, tail: str | None, entries: str | None) -> Reading:
    if held != "mixed":
        lacks = "no exact head" if held == "unbiased" else "no sample of the tail"
        raise LossError(
            f"{divergence.name} cannot be computed from {_shown(origin)}, which has {lacks}: "
            f"{divergence.requirements.because}; capture with 'threshold' or 'top_k_sampled'"
        )
    if entries == "exact":
        raise LossError(f"entries is 'exact', but {divergence.name} reads the estimates too; use 'unbiased', or leave it out")
    return Reading(tail or divergence.requirements.tails[0], "unbiased")


def _with_estimates(origin: str, held: str, divergence: Divergence, tail: str | None, temperature: float) -> Reading:
    name, needs, tail = divergence.name, divergence.requirements, tail or "drop"
    if held == "exact":
        raise LossError(f"entries is 'unbiased', but {_shown(origin)} has exact entries only; use 'exact', or leave it out")
    if not needs.unbiased:
        instead = "entries 'exact', which leaves the estimates out, or " if held == "mixed" else ""
        raise LossError(
            f"{name} cannot be computed from unbiased entries: {needs.because}; use {instead}divergence 'forward_kl'"
        )
    if tail != "drop":
        raise LossError(
            f"tail is {tail!r}, but unbiased entries stand for the tail too, and would count it twice; use 'drop', or leave it "
            "out"
        )
    if temperature != 1:
        instead = "tail 'bucket', which reads the exact entries alone" if held == "mixed" else "temperature 1.0"
        raise LossError(
            f"temperature is {temperature!r}, but the sampled entries of {_shown(origin)} stand for temperature 1 alone; use "
            f"{instead}"
        )
    return Reading(tail, "unbiased")


def _exact_only(origin: str, held: str, divergence: Divergence, tail: str | None, entries: str | None) -> Reading:
    name, needs = divergence.name, divergence.requirements
    if held == "unbiased" and entries == "exact":
        raise LossError(f"entries is 'exact', but {_shown(origin)} has estimates only; use 'unbiased', or leave it out")
    if held == "unbiased":
        why = f"{name} is not" if not needs.unbiased else f"tail {tail!r} would count the tail that they stand for once more"
        raise LossError(
            f"{name} with tail {tail or needs.tails[0]!r} cannot be computed from {_shown(origin)}: its sampled entries are "
            f"unbiased only in a loss linear in p, and {why}; use 'forward_kl' with tail 'drop', or capture exact entries "
            "('top_k', 'threshold')"
        )
    return Reading(tail or ("bucket" if "bucket" in needs.tails else needs.tails[0]), "exact")


def allowed(selection: str) -> dict[str, dict[str, str]]:
    """{divergence: {tail: entries}} of everything that `reading_for` does not refuse at temperature 1; its default first.

    Raises:
        LossError: an unknown selection.
    """
    _held(selection)
    answers: dict[str, dict[str, str]] = {}
    for name, kind in DIVERGENCES.items():
        tails = [tail for tail in TAIL_POLICIES if tail in kind.requirements.tails]
        found = {tail: reading for tail in (None, *tails) if (reading := _reading_or_none(selection, kind(), tail))}
        readings = {reading.tail: reading.entries for reading in found.values()}
        if readings:
            answers[name] = readings
    return answers


def _reading_or_none(selection: str, divergence: Divergence, tail: str | None) -> Reading | None:
    try:
        return reading_for(selection, divergence, tail=tail)
    except LossError:
        return None


def rules_table() -> str:
    """Markdown: for each divergence and selection the tail policies, the default first, in bold where all entries are read."""
    columns = {selection: allowed(selection) for selection in SELECTION_KINDS}
    lines = [
        "| divergence | " + " | ".join(f"`{name}`" for name in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for name in DIVERGENCES:
        cells = []
        for answers in columns.values():
            tails = [f"**{tail}**" if use == "unbiased" else tail for tail, use in answers.get(name, {}).items()]
            cells.append(", ".join(tails) or "refused")
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
