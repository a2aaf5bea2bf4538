"""What a derivation will do, known from the sources' indexes alone: its sequences, its units, its manifest.

In `indexes_SC`, S counts the sequences that are taken, C the sources.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import msgspec
import numpy as np
from numpy.typing import NDArray

import kdcache
from kdcache.codec import get_codec
from kdcache.derive.choose import sampled, selected
from kdcache.derive.config import DeriveConfig
from kdcache.derive.expression import Condition, position_condition, sequence_condition
from kdcache.derive.lineage import make_lineage
from kdcache.derive.match import shared_sequences
from kdcache.derive.mix import check_weights, mixed_identity
from kdcache.derive.positions import lost_features
from kdcache.derive.reduction.reduce import reduced_selection
from kdcache.derive.scalars import check_available
from kdcache.errors import ConfigError, InputError, MismatchError, UnsupportedVersionError
from kdcache.format.manifest import CodecInfo, Identity, LineageInfo, Manifest, PlanInfo, SelectionInfo, fingerprint
from kdcache.store.reader import CacheReader

UNIT_BYTES = 2**28
"""About this much of the sources' shards per shard."""

MAY_DIFFER = ("input_fingerprint", "codec.", "seeds.", "selection.params.seed", "domains", "groups")
"""Leaves of an identity that may differ between caches that are concatenated: other texts are what it is for, with domains or
without; all is written again by one codec; any seed's draws are as good."""


@dataclass(frozen=True, eq=False)
class Derivation:
    """A planned derivation.

    Attributes:
        readers: the sources.
        indexes_SC: (S, C) indexes in each source, for a mixture; else (S, 1) indexes that count through all sources.
        per_unit: sequences per unit.
        manifest: manifest 0 of the new cache.
        before: the selection of the records before they are reduced.
        where, where_position: parsed conditions.
        num_missing: sequences that are not in all sources of a mixture.
    """

    readers: Sequence[CacheReader]
    config: DeriveConfig
    indexes_SC: NDArray[np.int64]
    per_unit: int
    manifest: Manifest
    before: SelectionInfo
    where: Condition | None
    where_position: Condition | None
    num_missing: int

    def unit(self, index: int) -> NDArray[np.int64]:
        """The part of indexes_SC that one unit takes."""
        return self.indexes_SC[index * self.per_unit : (index + 1) * self.per_unit]

    def parts(self, indexes_SC: NDArray[np.int64]) -> Iterator[list[tuple[int, int]]]:
        """Yield, for each sequence, the (source, index there) of each record that it is made of."""
        if self.config.mix is not None:
            yield from (list(enumerate(indexes)) for indexes in indexes_SC.tolist())
            return
        bases = np.array([0, *accumulate(len(reader) for reader in self.readers)])
        sources_S = np.searchsorted(bases, indexes_SC[:, 0], side="right") - 1
        for source, index in zip(sources_S.tolist(), (indexes_SC[:, 0] - bases[sources_S]).tolist(), strict=True):
            yield [(source, index)]


def make_derivation(readers: Sequence[CacheReader], names: Sequence[str], config: DeriveConfig) -> Derivation:
    """Plan a derivation: a pure function of the sources' snapshots and the config.

    Raises:
        ConfigError: a config that these sources cannot satisfy. MismatchError: sources that do not fit together.
        InputError: nothing is taken, or sequences are not in all sources.
    """
    where = None if config.where is None else sequence_condition(config.where)
    where_position = None if config.where_position is None else position_condition(config.where_position)
    made = _identity(readers, names, config)
    for condition in (where, where_position):
        if condition is not None:
            check_available(condition.names, made.selection)
    if where_position is not None:
        _refuse_lost(made)
    indexes_SC, num_missing = _indexes(readers, names, config)
    lineage = make_lineage([(name, reader.manifest) for name, reader in zip(names, readers, strict=True)], config)
    per_unit = _per_unit(readers, config)
    identity = _with_output(made, indexes_SC, lineage, config, readers)
    manifest = _manifest(identity, lineage, (len(indexes_SC), per_unit), readers, config)
    return Derivation(readers, config, indexes_SC, per_unit, manifest, made.selection, where, where_position, num_missing)


def _identity(readers: Sequence[CacheReader], names: Sequence[str], config: DeriveConfig) -> Identity:
    """The identity of the records before they are reduced."""
    identities = [reader.manifest.identity for reader in readers]
    if config.mix is None:
        check_concatenation(identities, names)
        named = {name: any(getattr(identity, name) for identity in identities) for name in ("domains", "groups")}
        return msgspec.structs.replace(identities[0], **named)
    check_weights(config.mix, len(readers))
    return mixed_identity(identities, names, config.mix, config.seed)


def _refuse_lost(identity: Identity) -> None:
    lost = lost_features(identity.features)
    if lost:
        how = "pooled over" if lost[0].pooling != "none" else "chosen among"
        raise ConfigError(
            f"where_position: feature {lost[0].name!r} is {how} all positions of its sequence, also those that would "
            "be left out; leave out whole sequences with where"
        )


def _indexes(readers: Sequence[CacheReader], names: Sequence[str], config: DeriveConfig) -> tuple[NDArray[np.int64], int]:
    keys = [reader.keys_S for reader in readers]
    if config.mix is not None:
        indexes_SC, num_missing = shared_sequences(keys, names, skip_missing=config.missing == "skip")
        keys_S = keys[0][indexes_SC[:, 0]]
    else:
        keys_S, num_missing = np.concatenate(keys), 0
        indexes_SC = np.arange(len(keys_S), dtype=np.int64)[:, None]
    taken_S = np.ones(len(keys_S), bool)
    if config.select is not None:
        taken_S = selected(config.select, keys_S)
    indexes_S = np.flatnonzero(taken_S)
    if config.fraction is not None:
        indexes_S = indexes_S[sampled(config.fraction, config.seed, keys_S[indexes_S])]
    if not len(indexes_S):
        raise InputError(f"no sequence of {', '.join(map(repr, names))} is taken: of {len(keys_S):,}, 0 are left to write")
    return indexes_SC[indexes_S], num_missing


def _per_unit(readers: Sequence[CacheReader], config: DeriveConfig) -> int:
    if config.unit_sequences is not None:
        if config.unit_sequences < 1:
            raise ConfigError(f"unit_sequences is {config.unit_sequences}, expected at least 1")
        return config.unit_sequences
    num_bytes = sum(reader.manifest.total("num_bytes") for reader in readers)
    return max(1, UNIT_BYTES * sum(map(len, readers)) // max(num_bytes, 1))


def _with_output(
    made: Identity,
    indexes_SC: NDArray[np.int64],
    lineage: LineageInfo,
    config: DeriveConfig,
    readers: Sequence[CacheReader],
) -> Identity:
    """The identity with the reduced selection, the codec, and the fingerprint of what is taken."""
    selection = made.selection
    if config.reduce is not None:
        selection = reduced_selection(selection, config.reduce, config.seed)
    is_whole = all(len(indexes_SC) == len(reader) for reader in readers)
    if not is_whole or config.where is not None or config.where_position is not None:
        choosing = [operation for operation in lineage.operations if operation.name not in ("mix", "reduce")]
        read = fingerprint([[parent.snapshot for parent in lineage.parents], choosing])
    else:
        read = made.input_fingerprint
    return msgspec.structs.replace(made, selection=selection, codec=_codec(made, selection, config), input_fingerprint=read)


def _codec(made: Identity, selection: SelectionInfo, config: DeriveConfig) -> CodecInfo:
    if config.codec is None and config.bits is None:
        return made.codec
    codec_id = config.codec or made.codec.codec_id
    bits = {} if config.bits is None else {"bits": config.bits}
    try:
        codec = get_codec(codec_id, {"vocab_size": made.teacher.vocab_size, **bits}, selection)
    except UnsupportedVersionError as error:
        raise ConfigError(f"codec: {error}") from error
    return CodecInfo(codec_id=codec.codec_id, params=codec.params())


def _manifest(
    identity: Identity,
    lineage: LineageInfo,
    sizes: tuple[int, int],
    readers: Sequence[CacheReader],
    config: DeriveConfig,
) -> Manifest:
    num_sequences, per_unit = sizes
    plan = fingerprint(["kdcache.derive.v1", lineage, num_sequences, per_unit, config.record_batch_bytes])
    return Manifest(
        number=0,
        parent=None,
        identity=identity,
        plan=PlanInfo(fingerprint=plan, num_units=-(-num_sequences // per_unit)),
        versions={"kdcache": kdcache.__version__, "python": platform.python_version(), "numpy": np.__version__},
        # The config of the capture says how the teacher was run, to be compared by `kdcache verify --deep`; a mixture has none.
        config=readers[0].manifest.config if config.mix is None else {},
        lineage=lineage,
    )


def check_concatenation(identities: Sequence[Identity], names: Sequence[str]) -> None:
    """Raise MismatchError, naming what differs, unless the caches' records mean the same."""
    first = identities[0]
    for name, other in zip(names[1:], identities[1:], strict=True):
        leaves = {leaf: pair for leaf, pair in first.differing(other).items() if not leaf.startswith(MAY_DIFFER)}
        if leaves:
            differences = "; ".join(f"{leaf}: {mine!r} != {theirs!r}" for leaf, (mine, theirs) in leaves.items())
            raise MismatchError(
                f"{names[0]!r} and {name!r} cannot be concatenated: {differences}; they must be of one teacher, tokenizer and "
                "selection (--mix makes one cache of several teachers')"
            )
