"""What a drafter is trained from: of each sequence its tokens, which of them count, and the teacher's states at all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kdcache.errors import ConfigError
from kdcache.format.identity import FeatureInfo
from kdcache.format.record import TokenSequence
from kdcache.loader.cache import Cache

AFTER_NORM = -1


@dataclass(frozen=True, slots=True, eq=False)
class DrafterStates:
    """One sequence as a drafter's trainer wants it.

    Attributes:
        input_ids_N: (N,) int32.
        loss_mask_N: (N,) bool, whether the token at t is one to learn; the first token never is.
        hidden: one (N, H) float32 for each feature that was chosen, in their order.
    """

    input_ids_N: NDArray[np.int32]
    loss_mask_N: NDArray[np.bool_]
    hidden: tuple[NDArray[np.float32], ...]


@dataclass(frozen=True, slots=True)
class DrafterFeatures:
    """The features of a cache that a drafter reads.

    Attributes:
        auxiliary: hidden states of inner layers, in the order in which they are handed over.
        last: the teacher's last state, before or after the final norm as the trainer wants it; None where it wants none.
    """

    auxiliary: tuple[FeatureInfo, ...]
    last: FeatureInfo | None

    @property
    def all(self) -> tuple[FeatureInfo, ...]:
        """The auxiliary ones, and then the last."""
        return self.auxiliary if self.last is None else (*self.auxiliary, self.last)

    @property
    def names(self) -> list[str]:
        """Their names in the cache."""
        return [feature.name for feature in self.all]


def choose_features(cache: Cache, names: Sequence[str], *, last: str | None) -> DrafterFeatures:
    """Choose what a drafter reads from a cache.

    Args:
        cache: a capture with hidden states at all tokens.
        names: of the auxiliary features, in the order wanted; empty for all that fit, by layer.
        last: `before_norm`, `after_norm`, or None where no last state is wanted.

    Raises:
        ConfigError: a feature that is not there, or that does not hold whole states of every token.
    """
    there = {feature.name: feature for feature in cache.manifest.identity.features}
    whole = {name: feature for name, feature in there.items() if _why_not(feature) is None}
    final = None if last is None else _last(whole, after_norm=last == "after_norm")
    if names:
        chosen = [_named(name, there) for name in names]
    else:
        chosen = sorted((f for f in whole.values() if 0 <= f.layer < (f.num_layers or 0)), key=lambda f: f.layer)
    if not chosen:
        raise ConfigError(
            f"the cache keeps no hidden states of inner layers at all tokens; it has {', '.join(there) or 'no features'}. "
            "Capture with features such as {layer: 2, positions: all}"
        )
    _check_sizes([*chosen, *([] if final is None else [final])])
    return DrafterFeatures(tuple(chosen), final)


def drafter_states(cache: Cache, index: int, features: Sequence[FeatureInfo]) -> DrafterStates:
    """Read one sequence.

    Raises:
        CorruptCacheError: its shard is missing or damaged.
    """
    record = cache[index]
    values = record.distributions.features
    return DrafterStates(
        record.sequence.input_ids_N, loss_mask(record.sequence), tuple(values[feature.name] for feature in features)
    )


def loss_mask(sequence: TokenSequence) -> NDArray[np.bool_]:
    """(N,) bool: the tokens that a supervised position predicts. Position t predicts token t+1, so the mask is one later."""
    return np.concatenate([np.zeros(1, np.bool_), sequence.supervised_N[:-1]])


def _named(name: str, there: dict[str, FeatureInfo]) -> FeatureInfo:
    if name not in there:
        raise ConfigError(f"the cache has no feature {name!r}; it has {', '.join(there) or 'none'}")
    reason = _why_not(there[name])
    if reason is not None:
        raise ConfigError(f"feature {name!r} {reason}, but a drafter reads the whole hidden state of every token")
    return there[name]


def _why_not(feature: FeatureInfo) -> str | None:
    """Why a feature is not the whole hidden state of every token; None where it is."""
    if feature.kind != "hidden":
        return f"is of kind {feature.kind!r}"
    if feature.positions != "all":
        return "is kept at supervised positions only (positions: all keeps every token)"
    if feature.stride != 1 or feature.max_positions is not None:
        return "leaves positions out (stride, max_positions)"
    if feature.pooling != "none":
        return f"is pooled ({feature.pooling})"
    if feature.projection is not None:
        return f"is projected to {feature.size:,} numbers ({feature.projection.kind})"
    return None


def _last(whole: dict[str, FeatureInfo], *, after_norm: bool) -> FeatureInfo:
    for feature in whole.values():
        if feature.layer == (AFTER_NORM if after_norm else feature.num_layers):
            return feature
    what, layer = ("after", "-1") if after_norm else ("before", "the number of layers")
    raise ConfigError(
        f"the cache keeps no last state {what} the final norm at all tokens; capture with the feature "
        f"{{layer: {layer}, positions: all}}"
    )


def _check_sizes(features: Sequence[FeatureInfo]) -> None:
    sizes = {feature.size for feature in features}
    if len(sizes) > 1:
        raise ConfigError(f"the features have different sizes: {', '.join(f'{f.name} {f.size:,}' for f in features)}")
