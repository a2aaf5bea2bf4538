"""Fewer entries per position, without a teacher and without bias: which reduction each selection allows.

| selection | may become |
|---|---|
| `top_k` | `top_k` of a smaller k; `top_p_k` |
| `top_p_k` | the same of a smaller p or k |
| `threshold` | the same of a larger tau |
| `sampled` | the same of fewer draws |
| `top_k_sampled` | the same of a smaller k (from 1), or of fewer draws |

Everything else is refused: a top k of estimates would keep those that were drawn too high, and exact entries say nothing of
which tokens share their tail.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import numpy as np

from kdcache.derive.reduction.exact import reduce_exact
from kdcache.derive.reduction.sampled import reduce_draws, reduce_threshold
from kdcache.derive.reduction.systematic import operation_seed, position_uniforms
from kdcache.errors import ConfigError
from kdcache.format.manifest import SelectionInfo
from kdcache.format.record import Distributions, SequenceRecord, TokenSequence
from kdcache.format.selection import MAX_DRAWS, MIN_TAU, has_estimates


@dataclass(frozen=True, kw_only=True)
class Reduction:
    """The reduction that is asked for; None leaves a parameter as it is.

    Attributes:
        top_k: most exact entries of a position.
        top_p: the most probable tokens until their mass reaches this, in (0, 1].
        tau: threshold above which a token is exact, in (0, 1].
        draws: number of draws that estimates are counts of.
    """

    top_k: int | None = None
    top_p: float | None = None
    tau: float | None = None
    draws: int | None = None

    def asked(self) -> dict[str, float]:
        """Parameter -> value, of those that are asked for."""
        return {name: value for name, value in vars(self).items() if value is not None}


_ALLOWED = {
    "top_k": ("top_k", "top_p"), "top_p_k": ("top_k", "top_p"), "threshold": ("tau",), "sampled": ("draws",),
    "top_k_sampled": ("top_k", "draws"),
}  # fmt: skip
_STORED = {"top_k": "k", "top_p": "p", "tau": "tau", "draws": "num_draws"}
_RANGES = {
    "top_k": (1, None, "a whole number of at least 1"),
    "top_p": (0.0, 1.0, "a number above 0 and at most 1"),
    "tau": (MIN_TAU, 1.0, f"a number from {MIN_TAU} to 1"),
    "draws": (1, MAX_DRAWS, f"a whole number from 1 to {MAX_DRAWS}"),
}


def reduced_selection(selection: SelectionInfo, reduction: Reduction, seed: int) -> SelectionInfo:
    """The selection of the reduced records.

    Args:
        seed: of the draws that are done again; the selection's own becomes a function of it and of what there was.

    Raises:
        ConfigError: a value out of range, one that would add entries, or a reduction that would be biased.
    """
    asked = reduction.asked()
    if not asked:
        raise ConfigError("reduce: no reduction is named; expected top_k, top_p, tau or draws")
    for name, value in asked.items():
        _check_value(name, value)
        _check_allowed(selection, name, value)
    params = {_STORED[name]: value for name, value in asked.items()}
    kind = "top_p_k" if selection.kind == "top_k" and "top_p" in asked else selection.kind
    if has_estimates(selection):
        params["seed"] = operation_seed("reduce", seed, asked, selection)
    return msgspec.structs.replace(selection, kind=kind, params={**selection.params, **params})


def reduce_record(record: SequenceRecord, before: SelectionInfo, after: SelectionInfo) -> SequenceRecord:
    """The record with fewer entries.

    Args:
        before: its selection.
        after: from `reduced_selection`.
    """
    return SequenceRecord(record.sequence, _reduced(record.distributions, record.sequence, before, after))


def _reduced(d: Distributions, sequence: TokenSequence, before: SelectionInfo, after: SelectionInfo) -> Distributions:
    targets = sequence.target_ids_P, d.target_logprobs(sequence.target_ids_P)
    if not has_estimates(before):
        return reduce_exact(d, targets, k=after.params["k"], p=after.params.get("p"))
    u_P = position_uniforms(after.params["seed"], sequence.key, sequence.positions_P)
    if before.kind == "threshold":
        return reduce_threshold(d, targets, (before.params["tau"], after.params["tau"]), u_P)
    k = after.params.get("k", 0)
    return reduce_draws(d, targets, k=k, num_draws=after.params["num_draws"], u_P=u_P)


def _check_value(name: str, value: float) -> None:
    least, most, expected = _RANGES[name]
    is_whole = isinstance(least, int)
    is_numeric = isinstance(value, int if is_whole else (int, float, np.floating)) and not isinstance(value, bool)
    if not is_numeric or not least <= value or (most is not None and not value <= most) or value <= 0:
        raise ConfigError(f"reduce: {name} is {value!r}, expected {expected}")


def _check_allowed(selection: SelectionInfo, name: str, value: float) -> None:
    kind = selection.kind
    allowed = _ALLOWED[kind]
    if name not in allowed:
        raise ConfigError(f"reduce: {name} is not possible for selection {kind!r}: {_why_not(kind, name)}; {_instead(allowed)}")
    there = selection.params.get(_STORED[name])
    if there is None:  # top_p of top_k
        return
    is_less = value > there if name == "tau" else value < there
    if not is_less:
        raise ConfigError(
            f"reduce: {name} is {value!r}, but the cache's is {there!r} already; expected one "
            f"{'above' if name == 'tau' else 'below'} that, since what was not kept is gone"
        )


def _why_not(kind: str, name: str) -> str:
    if kind in ("top_k", "top_p_k"):
        return "which tokens share the mass of its tail was not kept"
    if name in ("top_k", "top_p"):
        return "the largest of random estimates are those that were drawn too high, so that keeping them would bias the target"
    return "its estimates are not of that kind"


def _instead(allowed: tuple[str, ...]) -> str:
    return f"it can be reduced by {' and '.join(allowed)}"
