"""Which inner states an engine can show, and the proof that they are what they are taken for. Pure functions; no vLLM."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import numpy as np

from kdcache.errors import TeacherError
from kdcache.format.manifest import FeatureInfo
from kdcache.format.record import Distributions
from kdcache.shown import get_logger
from kdcache.teacher.features import ATTENTION, HEADS, HIDDEN, LAST, Source, source_of
from kdcache.teacher.vllm.wire import AskedFeatures

log = get_logger(__name__)

MOST_OFF = 0.02
"""The most, relative, that the states of one layer may differ between a compiled model and its layers one by one."""

EAGER = "set teacher.engine_options.enforce_eager to true, which is slower"

Probe = Callable[[AskedFeatures], Iterable[Distributions]]
"""Reads a few tokens."""


def refusal(sources: Collection[Source], *, is_eager: bool, num_ranks: int) -> str | None:
    """Why vLLM cannot show these, by what is known before it is asked; None if it may.

    Args:
        sources: kinds and layers.
        is_eager: whether the engine runs its layers one by one.
        num_ranks: that share a layer.
    """
    kinds = {kind for kind, _ in sources}
    if ATTENTION in kinds:
        return "it makes no attention maps; use teacher.backend transformers"
    if kinds & {*HEADS} and num_ranks > 1:
        return f"each of {num_ranks} ranks has only some of the heads; use teacher.backend transformers, or one rank"
    if kinds & {*HEADS} and not is_eager:
        return f"a compiled model does not show queries, keys and values; {EAGER}, or use teacher.backend transformers"
    return None


def layers_to_hand_out(sources: Collection[Source], num_layers: int) -> set[int]:
    """The layers that a compiled model must hand out for these, and the last one, for the proof."""
    return {layer for kind, layer in sources if kind == HIDDEN and layer != LAST} | {num_layers}


def inner_features(features: Sequence[FeatureInfo]) -> list[FeatureInfo]:
    """One feature for each source inside the model, of all positions: what the proof asks for."""
    found: dict[Source, FeatureInfo] = {}
    for feature in features:
        source = source_of(feature)
        if source != (HIDDEN, LAST):
            found[source] = FeatureInfo(
                name=f"{source[0]}_{source[1]}",
                layer=feature.layer,
                size=feature.full_size,
                kind=feature.kind,
                positions="all",
                num_heads=feature.num_heads,
                head_dim=feature.head_dim,
                num_layers=feature.num_layers,
            )
    return list(found.values())


def prove(features: Sequence[FeatureInfo], probe: Probe, *, is_eager: bool) -> str | None:
    """Read a few tokens and give what is wrong, or None.

    What the last layer gives must become, by the final norm, what is projected. Of a compiled model the states must also be
    those that hooks see when its layers run one by one, where they can be made to.

    Args:
        features: see `inner_features`.
        probe: reads the tokens.
        is_eager: whether the engine runs its layers one by one anyway.
    """
    try:
        found = _joined(probe(AskedFeatures(features, proves=True)))
    except TeacherError as error:
        return str(error)
    if is_eager:
        return None
    try:
        expected = _joined(probe(AskedFeatures(features, proves=True, directly=True)))
    except TeacherError as error:
        log.info("the layers of the compiled model do not run one by one (%s): only the last one is proven", error)
        return None
    for name, values in found.items():
        off = float(np.linalg.norm(values - expected[name]) / max(float(np.linalg.norm(expected[name])), 1e-30))
        if not off <= MOST_OFF:
            return f"{name} of the compiled model is not what its layers give one by one: they differ by {off:.2g}; {EAGER}"
    return None


def _joined(answers: Iterable[Distributions]) -> Mapping[str, np.ndarray]:
    of_each = [answer.features for answer in answers]
    return {name: np.concatenate([features[name] for features in of_each]) for name in of_each[0]}
