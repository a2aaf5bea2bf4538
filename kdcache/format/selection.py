"""What a selection kind means for a record: which entries are exact, how many there may be, what else must be stored.

| kind | params | entries |
|---|---|---|
| `top_k` | k | the k most probable tokens, exact |
| `top_p_k` | p, k | the most probable tokens until their mass reaches p, at most k, exact |
| `sampled` | num_draws, seed | estimates: the distinct tokens of N draws with replacement, at count / N |
| `threshold` | tau, seed | exact: tokens with p >= tau; estimates: others, kept with probability p / tau, at tau |
| `top_k_sampled` | k, num_draws, seed | exact: the k most probable; estimates: N draws of the rest r, at r * count / N |

An estimate is a random number whose expectation is the token's probability (0 where the token is not kept), so a sum over all
entries estimates the sum over the vocabulary without bias. In a record exact entries stand before estimates.

That is what a capture stores. A cache that was made of others (`kdcache.derive`) may hold fewer exact entries than the most
probable ones (the mixture of several `top_k`), and counts that were drawn otherwise (fewer of `sampled`): exact or unbiased as
here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kdcache.errors import FormatError
from kdcache.format.identity import SelectionInfo

MAX_K = 2**31
MAX_DRAWS = 2**16 - 1
MIN_TAU = 2.0**-15
"""Entries at one position are counted in 16 bits: at most 1/tau + 1 of them."""


@dataclass(frozen=True)
class _Kind:
    params: tuple[str, ...]
    entries: str


ENTRIES = ("exact", "unbiased", "mixed")
"""What the entries of a position can be: all exact, all estimates, or exact ones before estimates."""

_KINDS = {
    "top_k": _Kind(("k",), "exact"),
    "top_p_k": _Kind(("p", "k"), "exact"),
    "sampled": _Kind(("num_draws", "seed"), "unbiased"),
    "threshold": _Kind(("tau", "seed"), "mixed"),
    "top_k_sampled": _Kind(("k", "num_draws", "seed"), "mixed"),
}
SELECTION_KINDS = tuple(_KINDS)

_RANGES: dict[str, tuple[type, float, float]] = {
    "k": (int, 0, MAX_K),
    "p": (float, 0.0, 1.0),
    "num_draws": (int, 1, MAX_DRAWS),
    "tau": (float, MIN_TAU, 1.0),
    "seed": (int, -(2**63), 2**63 - 1),
}


def check_selection(selection: SelectionInfo) -> None:
    """Raise FormatError unless the kind is known and its parameters are those of the kind, in range."""
    kind = _kind(selection)
    if set(selection.params) != set(kind.params):
        raise FormatError(
            f"selection {selection.kind!r} has the parameters {sorted(selection.params)}, expected {sorted(kind.params)}"
        )
    for name, value in selection.params.items():
        _check_param(selection.kind, name, value)
    for temperature in selection.temperatures:
        if not (isinstance(temperature, float) and 0 < temperature < 1e4):
            raise FormatError(f"selection {selection.kind!r} has the temperature {temperature!r}, expected one above 0")


def selection_params(kind: str) -> tuple[str, ...]:
    """The names of a kind's parameters; raises FormatError where it is unknown."""
    return _kind(SelectionInfo(kind=kind, params={})).params


def has_estimates(selection: SelectionInfo) -> bool:
    """Whether some entries are random estimates; then only what is linear in the probabilities may be computed of them."""
    return _kind(selection).entries != "exact"


def entries_of(kind: str) -> str:
    """What the entries of a kind of selection are, one of ENTRIES; raises FormatError where the kind is unknown."""
    return _kind(SelectionInfo(kind=kind, params={})).entries


def fixed_entries(selection: SelectionInfo) -> int | None:
    """Entries that every position has, and none may exceed, by the selection: k of `top_k`; None where it varies.

    Raises:
        FormatError: see `check_selection`.
    """
    check_selection(selection)
    return selection.params["k"] if selection.kind == "top_k" else None


def most_entries(selection: SelectionInfo, vocab_size: int) -> int:
    """Most entries that a position can have.

    `threshold`: h tokens of at least tau and at most ceil(R / tau) of the rest R <= 1 - h tau, so at most floor(1 / tau) + 1.

    Raises:
        FormatError: see `check_selection`.
    """
    check_selection(selection)
    params = selection.params
    most = {
        "top_k": lambda: params["k"],
        "top_p_k": lambda: params["k"],
        "sampled": lambda: params["num_draws"],
        "threshold": lambda: int(1 / params["tau"]) + 1,
        "top_k_sampled": lambda: params["k"] + params["num_draws"],
    }[selection.kind]()
    return min(most, vocab_size)


def fixed_exact(selection: SelectionInfo) -> int | None:
    """Exact entries that every position has by the selection, where that differs from all of them: 0 of `sampled`, k of
    `top_k_sampled`. None where all are exact, or where their number is stored (`threshold`)."""
    if selection.kind == "sampled":
        return 0
    return selection.params["k"] if selection.kind == "top_k_sampled" else None


def stores_num_exact(selection: SelectionInfo) -> bool:
    """Whether the number of exact entries is another at each position and has to be stored."""
    return selection.kind == "threshold"


def _kind(selection: SelectionInfo) -> _Kind:
    if selection.kind not in _KINDS:
        raise FormatError(f"selection {selection.kind!r} is unknown here; known are {', '.join(_KINDS)}; upgrade kdcache")
    return _KINDS[selection.kind]


def _check_param(kind: str, name: str, value: Any) -> None:
    kind_of_number, least, most = _RANGES[name]
    accepted = (int, float) if kind_of_number is float else (int,)
    if isinstance(value, bool) or not isinstance(value, accepted) or not least <= value <= most:
        expected = "an integer" if kind_of_number is int else "a number"
        end = "2^31" if most == MAX_K else most
        raise FormatError(f"selection {kind!r} has {name} = {value!r}, expected {expected} from {least} to {end}")
