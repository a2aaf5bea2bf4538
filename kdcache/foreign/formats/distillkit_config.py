"""Whether a DistillKit config is the one that wrote the positions: other settings take as many bytes and give other values.

A config is suspected where its positions rise, or their mass is far from the share of the text's tokens in them, or where the
curve leaves the line on which the exact ranks lie (logprobs fall about evenly with the logarithm of the rank) and another
setting stays on it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from kdcache.errors import InputError
from kdcache.foreign.base import Finding
from kdcache.foreign.formats.distillkit_codec import Config, decode_values
from kdcache.foreign.probes import TAIL_RISE_NATS

MIN_POSITIONS = 32
USUAL_TERMS: tuple[int | str, ...] = (0, 1, 2, 3, 4, "sqrt")

RISING_SHARE, MASS_OFF = 0.5, 0.15
"""Positions that rise, and mass below the hits, from which on a config is suspected; a sound fit stays far below."""

FALLING_SHARE, MASS_NEAR = 0.95, 0.1
"""What another config must reach to be named."""

FAR_NATS, FAR_RATIO, NEARLY = 1.0, 0.25, 1.25
"""A sound curve is a few tenths off the line; beyond this one is sought that is a quarter as far off, and of those that are
nearly the nearest the one that takes the fewest changes."""

MIN_EXACT = 8
LINE_NATS, LINE_RATIO, LINE_ERRORS = 0.03, 0.75, 6.0
"""The curve must leave the line by this much more than under the other setting, in nats, as a ratio and in standard errors."""


@dataclass(frozen=True)
class _Look:
    """What positions look like under a config."""

    config: Config
    values_PK: NDArray[np.float64]
    rising: float
    mass: float

    def is_off(self, hits: float) -> bool:
        # A text that the positions are not about is hit less often than any mass says: that is no fault of the config.
        return not (self.rising < RISING_SHARE and hits - MASS_OFF < self.mass < 1 + MASS_NEAR)

    def fits(self, hits: float) -> bool:
        return self.rising <= 1 - FALLING_SHARE and abs(self.mass - hits) < MASS_NEAR


def wrong_config(packed: NDArray[np.uint8], hits: float, config: Config) -> Finding | None:
    """What is to be said of the config, from some positions.

    Args:
        packed: `compressed_logprobs` of some positions.
        hits: share of these positions whose ids hold the text's token.
        config: the one that was named.
    """
    stated = _look(packed, config)
    if len(packed) < MIN_POSITIONS or stated is None:
        return None
    if stated.is_off(hits):
        others = (look for other in _same_bytes(config) if (look := _look(packed, other)) is not None and look.fits(hits))
        best = min(others, key=lambda look: (_num_changes(config, look.config), abs(look.mass - hits)), default=None)
        return None if best is None else _of_values(stated, best, hits)
    if _can_be_extrapolated(stated) and float(_off_the_line(stated).mean()) > FAR_NATS:
        return _far_off_the_line(packed, stated, hits)
    others = [_look(packed, other) for other in _switched(config)]
    fitting = [look for look in others if look is not None and look.fits(hits) and _stays_on_the_line(stated, look)]
    return _of_tails(stated, fitting[0]) if fitting else None


def _far_off_the_line(packed: NDArray[np.uint8], stated: _Look, hits: float) -> Finding | None:
    """Tails that are nowhere near where the exact ranks lead; any config of as many bytes that leads there is to be named."""
    limit = FAR_RATIO * float(_off_the_line(stated).mean())
    looks = (look for other in _same_bytes(stated.config) if (look := _look(packed, other)) is not None)
    fitting = [look for look in looks if look.fits(hits) and _can_be_extrapolated(look) and _off_the_line(look).mean() < limit]
    if not fitting:
        return None
    nearest = NEARLY * min(float(_off_the_line(look).mean()) for look in fitting)
    near = (look for look in fitting if float(_off_the_line(look).mean()) <= nearest)
    best = min(near, key=lambda look: _num_changes(stated.config, look.config))
    same = all(getattr(best.config, name) == getattr(stated.config, name) for name in ("delta_encoding", "exact_dtype"))
    if same and stated.config.exact_k <= best.config.exact_k:
        return _of_tails(stated, best)
    return _of_values(stated, best, hits)


def _can_be_extrapolated(look: _Look) -> bool:
    return look.config.exact_k >= MIN_EXACT and look.config.num_fitted > 0


def _look(packed: NDArray[np.uint8], config: Config) -> _Look | None:
    try:
        values_PK = decode_values(packed, config)
    except InputError:
        return None
    with np.errstate(over="ignore", invalid="ignore"):
        rising_P = ~((values_PK[:, 1:] - values_PK[:, :-1]).max(axis=1, initial=-np.inf) <= TAIL_RISE_NATS)
        mass = float(np.exp(np.minimum(values_PK, 50.0)).sum(axis=1).mean())
    return _Look(config, values_PK, float(rising_P.mean()), mass if math.isfinite(mass) else math.inf)


def _switched(config: Config) -> Iterator[Config]:
    for normalize_t, delta_encoding in itertools.product((False, True), repeat=2):
        other = msgspec.structs.replace(config, normalize_t=normalize_t, delta_encoding=delta_encoding)
        if other != config:
            yield other


def _same_bytes(config: Config) -> Iterator[Config]:
    """Configs whose positions are as long: other switches, other terms, more or fewer exact values, another type of float."""
    terms = tuple(config.polynomial_terms or ())
    widths = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
    splits: list[tuple[int, Sequence[int | str]]] = [
        (config.exact_k, other) for other in itertools.combinations(USUAL_TERMS, len(terms))
    ]
    splits.append((config.exact_k, terms))
    for exact_k in range(max(config.exact_k - 4, 0), min(config.exact_k + 5, config.k + 1)):
        spare = (config.exact_k - exact_k) * widths[config.exact_dtype] + len(terms) * widths[config.term_dtype]
        if exact_k != config.exact_k and spare >= 0 and spare % widths[config.term_dtype] == 0:
            splits += [(exact_k, c) for c in itertools.combinations(USUAL_TERMS, spare // widths[config.term_dtype])]
    halves = {"float16", "bfloat16"}
    dtypes = sorted(halves) if config.exact_dtype in halves else [config.exact_dtype]
    for (exact_k, other_terms), dtype in itertools.product(splits, dtypes):
        try:
            other = msgspec.structs.replace(
                config, exact_k=exact_k, polynomial_terms=list(other_terms) or None, exact_dtype=dtype
            )
            other.__post_init__()
        except ValueError:
            continue
        yield from (c for c in (other, *_switched(other)) if c != config)


def _num_changes(config: Config, other: Config) -> int:
    return sum(getattr(config, name) != getattr(other, name) for name in config.__struct_fields__)


def _stays_on_the_line(stated: _Look, other: _Look) -> bool:
    if not _can_be_extrapolated(stated):
        return False
    stated_P, other_P = _off_the_line(stated), _off_the_line(other)
    better_P = stated_P - other_P
    error = float(better_P.std()) / math.sqrt(len(better_P))
    return (
        other_P.mean() < LINE_RATIO * stated_P.mean()
        and better_P.mean() > max(LINE_NATS, LINE_ERRORS * error)
    )  # fmt: skip


def _off_the_line(look: _Look) -> NDArray[np.float64]:
    """Return (P,) the mean |fitted - line|: the line through the latter half of the exact ranks over log rank."""
    exact_k = look.config.exact_k
    ranks_K = np.log(np.arange(look.config.k) + 1.0)
    known_K = ranks_K[exact_k // 2 : exact_k] - ranks_K[exact_k // 2 : exact_k].mean()
    known_PK = look.values_PK[:, exact_k // 2 : exact_k]
    slope_P = (known_PK * known_K).sum(axis=1) / (known_K**2).sum()
    line_PK = known_PK.mean(axis=1)[:, None] + slope_P[:, None] * (ranks_K[exact_k:] - ranks_K[exact_k // 2 : exact_k].mean())
    return np.abs(look.values_PK[:, exact_k:] - line_PK).mean(axis=1)


def _changes(config: Config, other: Config) -> str:
    names = [name for name in config.__struct_fields__ if getattr(config, name) != getattr(other, name)]
    return ", ".join(f"{name}: {_yaml(getattr(other, name))}" for name in names)


def _yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _of_values(stated: _Look, best: _Look, hits: float) -> Finding:
    sentence = (
        f"the config is probably not the one that wrote the positions: as it says, {stated.rising:.0%} of them "
        f"rise and their mass is {stated.mass:.3g} in the mean, where {hits:.2f} of the text's tokens are in "
        f"them; with {_changes(stated.config, best.config)} they fall and their mass is {best.mass:.2f}. Name "
        "the right one with --config FILE"
    )
    return Finding("wrong_config", "fatal", sentence)


def _of_tails(stated: _Look, best: _Look) -> Finding:
    both = (f"{_off_the_line(look).mean():.2f}" for look in (stated, best))
    sentence = (
        f"the fitted tails do not continue where the exact entries end: they are {next(both)} nats off in the mean, and "
        f"{next(both)} with {_changes(stated.config, best.config)}; the config is probably not the one that wrote them. The "
        "exact entries can be kept; with the right config, named with --config FILE, all of them"
    )
    return Finding("broken_tails", "repairable", sentence, "--repair tails")
