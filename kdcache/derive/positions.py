"""Leave out positions of a record: their distributions go, and the sequence is no longer supervised there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.format.feature_positions import feature_positions
from kdcache.format.identity import FeatureInfo, Identity
from kdcache.format.record import (
    Distributions,
    SequenceRecord,
    TokenSequence,
    distances_key,
    find_targets,
    sequence_key,
)


def keep_positions(record: SequenceRecord, keep_P: NDArray[np.bool_], identity: Identity) -> SequenceRecord:
    """The record with only these positions; its key changes, since the mask is part of it.

    Args:
        keep_P: (P,) which of the supervised positions stay.
        identity: of the cache: its features, and the fingerprint of the chat template.
    """
    if keep_P.all():
        return record
    sequence = _supervised_there(record.sequence, keep_P, identity.tokenizer.chat_template_fingerprint)
    kept = _kept(record.distributions, record.sequence.target_ids_P, keep_P)
    features = _kept_features(record, sequence.supervised_N, identity.features)
    return SequenceRecord(sequence, replace(kept, features=features))


def lost_features(features: Sequence[FeatureInfo]) -> list[FeatureInfo]:
    """The features that do not follow where positions are left out: made of, or chosen among, all supervised ones."""
    return [f for f in features if f.positions == "supervised" and (f.pooling != "none" or f.max_positions is not None)]


def _kept_features(
    record: SequenceRecord, supervised_N: NDArray[np.bool_], features: Sequence[FeatureInfo]
) -> dict[str, NDArray[Any]]:
    values = dict(record.distributions.features)
    for feature in features:
        if feature.positions == "all":
            continue
        keep_F = supervised_N[feature_positions(feature, record.sequence.supervised_N)]
        for key in {feature.name, distances_key(feature)} & set(values):
            values[key] = values[key][keep_F]
    return values


def _supervised_there(sequence: TokenSequence, keep_P: NDArray[np.bool_], template_fingerprint: str) -> TokenSequence:
    supervised_N = np.zeros(sequence.num_tokens, bool)
    supervised_N[sequence.positions_P[keep_P]] = True
    key = sequence_key(sequence.input_ids_N, supervised_N, template_fingerprint)
    return replace(sequence, supervised_N=supervised_N, key=key)


def _kept(d: Distributions, target_ids_P: NDArray[np.int32], keep_P: NDArray[np.bool_]) -> Distributions:
    counts_P = d.num_entries_P
    keep_E = np.repeat(keep_P, counts_P)
    has_target_P, inside_P, _ = find_targets(d, target_ids_P)
    is_outside_P = has_target_P & ~inside_P
    return Distributions(
        token_ids_E=d.token_ids_E[keep_E],
        logprobs_E=d.logprobs_E[keep_E],
        offsets_P1=np.concatenate([[0], np.cumsum(counts_P[keep_P])]).astype(np.int64),
        tail_mass_P=d.tail_mass_P[keep_P],
        outside_target_logprobs=d.outside_target_logprobs[keep_P[is_outside_P]],
        num_exact_P=None if d.num_exact_P is None else d.num_exact_P[keep_P],
        log_z_PL=None if d.log_z_PL is None else d.log_z_PL[keep_P],
        entropy_P=None if d.entropy_P is None else d.entropy_P[keep_P],
    )
