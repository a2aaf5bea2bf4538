"""What a derivation will do, known before anything is read but indexes: its sequences, its units, its manifest.

Shape letters: S sequences that are taken, C caches.
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
from kdcache.derive.concatenate import check_concatenation
from kdcache.derive.expression import Condition, position_condition, sequence_condition
from kdcache.derive.lineage import make_lineage
from kdcache.derive.match import shared_sequences
from kdcache.derive.mix import check_weights, mixed_identity
from kdcache.derive.options import DeriveOptions
from kdcache.derive.reduction.reduce import reduced_selection
from kdcache.derive.scalars import check_available
from kdcache.errors import ConfigError, InputError, UnsupportedVersionError
from kdcache.format.manifest import CodecInfo, Identity, LineageInfo, Manifest, PlanInfo, SelectionInfo, fingerprint
from kdcache.store.reader import CacheReader

UNIT_BYTES = 2**28
"""About this much of the sources' shards per shard."""


@dataclass(frozen=True, eq=False)
class Job:
    """A derivation that is planned.

    Attributes:
        readers: the sources.
        numbers_SC: (S, C) numbers in each source, of a mixture; (S, 1) numbers that count through all sources, else.
        per_unit: sequences per unit.
        manifest: number 0 of the new cache.
        before: the selection of the records before they are reduced.
        where, where_position: conditions that were read.
        num_missing: sequences that are not in all sources of a mixture.
    """

    readers: Sequence[CacheReader]
    options: DeriveOptions
    numbers_SC: NDArray[np.int64]
    per_unit: int
    manifest: Manifest
    before: SelectionInfo
    where: Condition | None
    where_position: Condition | None
    num_missing: int

    def unit(self, number: int) -> NDArray[np.int64]:
        """The rows of numbers_SC of one unit."""
        return self.numbers_SC[number * self.per_unit : (number + 1) * self.per_unit]

    def places(self, numbers_SC: NDArray[np.int64]) -> Iterator[list[tuple[int, int]]]:
        """(source, number there) of each record that a sequence is made of."""
        if self.options.mix is not None:
            yield from (list(enumerate(numbers)) for numbers in numbers_SC.tolist())
            return
        bases = np.array([0, *accumulate(len(reader) for reader in self.readers)])
        sources_S = np.searchsorted(bases, numbers_SC[:, 0], side="right") - 1
        for source, number in zip(sources_S.tolist(), (numbers_SC[:, 0] - bases[sources_S]).tolist(), strict=True):
            yield [(source, number)]


def make_job(readers: Sequence[CacheReader], names: Sequence[str], options: DeriveOptions) -> Job:
    """Plan; a pure function of the sources' snapshots and the options.

    Raises:
        ConfigError: options that cannot be had of these sources. MismatchError: sources that do not fit together.
        InputError: nothing is taken, or sequences are not in all sources.
    """
    where = None if options.where is None else sequence_condition(options.where)
    where_position = None if options.where_position is None else position_condition(options.where_position)
    made = _identity(readers, names, options)
    for condition in (where, where_position):
        if condition is not None:
            check_available(condition.names, made.selection)
    if where_position is not None:
        _refuse_pooled(made)
    numbers_SC, num_missing = _numbers(readers, names, options)
    lineage = make_lineage([(name, reader.manifest) for name, reader in zip(names, readers, strict=True)], options)
    per_unit = _per_unit(readers, options)
    identity = _with_output(made, numbers_SC, lineage, options, readers)
    manifest = _manifest(identity, lineage, (len(numbers_SC), per_unit), readers, options)
    return Job(readers, options, numbers_SC, per_unit, manifest, made.selection, where, where_position, num_missing)


def _identity(readers: Sequence[CacheReader], names: Sequence[str], options: DeriveOptions) -> Identity:
    """Of the records before they are reduced."""
    identities = [reader.manifest.identity for reader in readers]
    if options.mix is None:
        check_concatenation(identities, names)
        return msgspec.structs.replace(identities[0], domains=any(identity.domains for identity in identities))
    check_weights(options.mix, len(readers))
    return mixed_identity(identities, names, options.mix, options.seed)


def _refuse_pooled(identity: Identity) -> None:
    pooled = [feature.name for feature in identity.features if feature.pooling != "none"]
    if pooled:
        raise ConfigError(
            f"where_position: feature {pooled[0]!r} is pooled over the positions of its sequence, and would be of positions "
            "that are left out; leave out whole sequences with where"
        )


def _numbers(readers: Sequence[CacheReader], names: Sequence[str], options: DeriveOptions) -> tuple[NDArray[np.int64], int]:
    keys = [reader.keys_S for reader in readers]
    if options.mix is not None:
        numbers_SC, num_missing = shared_sequences(keys, names, skip_missing=options.missing == "skip")
        keys_S = keys[0][numbers_SC[:, 0]]
    else:
        keys_S, num_missing = np.concatenate(keys), 0
        numbers_SC = np.arange(len(keys_S), dtype=np.int64)[:, None]
    taken_S = np.ones(len(keys_S), bool)
    if options.select is not None:
        taken_S = selected(options.select, keys_S)
    numbers_S = np.flatnonzero(taken_S)
    if options.fraction is not None:
        numbers_S = numbers_S[sampled(options.fraction, options.seed, keys_S[numbers_S])]
    if not len(numbers_S):
        raise InputError(f"no sequence of {', '.join(map(repr, names))} is taken: {len(keys_S):,} there, 0 left to write")
    return numbers_SC[numbers_S], num_missing


def _per_unit(readers: Sequence[CacheReader], options: DeriveOptions) -> int:
    if options.unit_sequences is not None:
        if options.unit_sequences < 1:
            raise ConfigError(f"unit_sequences is {options.unit_sequences}, expected at least 1")
        return options.unit_sequences
    num_bytes = sum(reader.manifest.total("num_bytes") for reader in readers)
    return max(1, UNIT_BYTES * sum(map(len, readers)) // max(num_bytes, 1))


def _with_output(
    made: Identity,
    numbers_SC: NDArray[np.int64],
    lineage: LineageInfo,
    options: DeriveOptions,
    readers: Sequence[CacheReader],
) -> Identity:
    """With the reduced selection, the codec, and the fingerprint of what is taken."""
    selection = made.selection
    if options.reduce is not None:
        selection = reduced_selection(selection, options.reduce, options.seed)
    is_whole = all(len(numbers_SC) == len(reader) for reader in readers)
    if not is_whole or options.where is not None or options.where_position is not None:
        choosing = [operation for operation in lineage.operations if operation.name not in ("mix", "reduce")]
        read = fingerprint([[parent.snapshot for parent in lineage.parents], choosing])
    else:
        read = made.input_fingerprint
    return msgspec.structs.replace(made, selection=selection, codec=_codec(made, selection, options), input_fingerprint=read)


def _codec(made: Identity, selection: SelectionInfo, options: DeriveOptions) -> CodecInfo:
    if options.codec is None and options.bits is None:
        return made.codec
    codec_id = options.codec or made.codec.codec_id
    bits = {} if options.bits is None else {"bits": options.bits}
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
    options: DeriveOptions,
) -> Manifest:
    num_sequences, per_unit = sizes
    plan = fingerprint(["kdcache.derive.v1", lineage, num_sequences, per_unit, options.record_batch_bytes])
    return Manifest(
        number=0,
        parent=None,
        identity=identity,
        plan=PlanInfo(fingerprint=plan, num_units=-(-num_sequences // per_unit)),
        versions={"kdcache": kdcache.__version__, "python": platform.python_version(), "numpy": np.__version__},
        # The config of the capture says how the teacher was run, to be compared by `kdcache verify --deep`; a mixture has none.
        config=readers[0].manifest.config if options.mix is None else {},
        lineage=lineage,
    )
