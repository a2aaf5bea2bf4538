"""Which losses a cache's selection is enough for, and how its entries are to be given to them; the rest is refused in words.

Kinds of selection are plain strings, those of the manifest: nothing of the format is needed, nor torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from kdcache.errors import LossError
from kdcache.kernels.base import Objective
from kdcache.kernels.divergences import DIVERGENCES, TAIL_POLICIES, Divergence, get_divergence


@dataclass(frozen=True, slots=True)
class SelectionRule:
    """What the entries of a selection mean.

    Attributes:
        exact: it has entries whose logprob is the token's own, and the mass of all else.
        estimates: it has entries that are random, exp(logprob) an unbiased estimate of the token's probability at
            temperature 1.
    """

    exact: bool
    estimates: bool


SELECTIONS = {
    "top_k": SelectionRule(exact=True, estimates=False),
    "top_p_k": SelectionRule(exact=True, estimates=False),
    "sampled": SelectionRule(exact=False, estimates=True),
    "threshold": SelectionRule(exact=True, estimates=True),
    "top_k_sampled": SelectionRule(exact=True, estimates=True),
}
"""By kind."""


def targets_for(
    selection: str, divergence: str | Divergence = "forward_kl", *, tail: str = "bucket", temperature: float = 1.0
) -> str:
    """What to pass as `targets` to a loss over entries of this selection: `exact` or `unbiased`.

    Beside it goes `num_exact_P` where the selection has both kinds: with `exact` the loss then leaves the estimates out.

    Args:
        selection: a name of SELECTIONS, as in the cache's manifest.
        divergence: as for `sparse_kd_loss`.
        tail: as for `sparse_kd_loss`. With the forward KL, `drop` is what all entries of a random selection are for.
        temperature: as for `sparse_kd_loss`; other than 1 it needs the normalisers kept at capture, which are not seen here.

    Raises:
        LossError: an unknown selection; a loss that would be wrong for it, with the reason and what is right.
    """
    if selection not in SELECTIONS:
        raise LossError(f"selection is {selection!r}, but must be one of {', '.join(map(repr, SELECTIONS))}")
    rule, objective = SELECTIONS[selection], Objective(tail, divergence=get_divergence(divergence), temperature=temperature)
    name, needs = objective.divergence.name, objective.divergence.requirements
    if needs.tail_sample:
        _check_both(selection, rule, objective.divergence)
        return "unbiased"
    if not rule.estimates:
        return "exact"
    if needs.unbiased and tail == "drop":
        _check_temperature(selection, rule, temperature)
        return "unbiased"
    if rule.exact:
        return "exact"
    why = f"{name} is not" if not needs.unbiased else f"tail {tail!r} would count the tail that they stand for once more"
    raise LossError(
        f"{name} with tail {tail!r} cannot be computed from the selection {selection!r}: its sampled entries are unbiased only "
        f"in a loss linear in p, and {why}; use 'forward_kl' with tail 'drop', or capture exact entries ('top_k', 'threshold')"
    )


def allowed(selection: str) -> dict[str, dict[str, str]]:
    """{divergence: {tail: targets}} of everything that `targets_for` does not refuse at temperature 1.

    Raises:
        LossError: an unknown selection.
    """
    answers: dict[str, dict[str, str]] = {}
    targets_for(selection, tail="drop")
    for name, kind in DIVERGENCES.items():
        for tail in (tail for tail in TAIL_POLICIES if tail in kind.requirements.tails):
            try:
                answers.setdefault(name, {})[tail] = targets_for(selection, kind(), tail=tail)
            except LossError:
                continue
    return {name: tails for name, tails in answers.items() if tails}


def rules_table() -> str:
    """Markdown: for each divergence and selection the tail policies, in bold where all entries are read. README.md holds it."""
    columns = {selection: allowed(selection) for selection in SELECTIONS}
    lines = ["| divergence | " + " | ".join(f"`{name}`" for name in SELECTIONS) + " |", "|---" * (len(SELECTIONS) + 1) + "|"]
    for name in DIVERGENCES:
        cells = []
        for answers in columns.values():
            tails = [f"**{tail}**" if use == "unbiased" else tail for tail, use in answers.get(name, {}).items()]
            cells.append(", ".join(tails) or "refused")
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _check_both(selection: str, rule: SelectionRule, divergence: Divergence) -> None:
    if rule.exact and rule.estimates:
        return
    lacks = "no exact head" if not rule.exact else "no sample of the tail"
    raise LossError(
        f"{divergence.name} cannot be computed from the selection {selection!r}, which has {lacks}: "
        f"{divergence.requirements.because}; capture with 'threshold' or 'top_k_sampled'"
    )


def _check_temperature(selection: str, rule: SelectionRule, temperature: float) -> None:
    if temperature == 1:
        return
    instead = "tail 'bucket', which takes the exact entries alone" if rule.exact else "temperature 1.0"
    raise LossError(
        f"temperature is {temperature!r}, but the sampled entries of the selection {selection!r} stand for temperature 1 "
        f"alone; use {instead}"
    )
