"""How records become a batch. `assemble_reference` defines it, token by token; `assemble` is compared with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from kdcache.codec.base import Codec, DecodeTask, EntryArrays, copy_into
from kdcache.config.loader import MaskConfig
from kdcache.errors import CorruptCacheError, FormatError
from kdcache.format.manifest import SelectionInfo
from kdcache.format.record import PADDING_ID, SequenceRecord
from kdcache.format.selection import entries_of, fixed_entries, fixed_exact, stores_num_exact
from kdcache.format.soft_targets import SoftTargets
from kdcache.loader.batches.batch import NO_ROLE, NO_TARGET, Batch
from kdcache.loader.batches.buffers import BufferPool
from kdcache.loader.batches.features import AskedFeature, batch_features
from kdcache.loader.batches.mask import EVERYTHING, Choice, choose, choose_reference, target_roles
from kdcache.store.records.batch import EncodedRecord

Record = SequenceRecord | EncodedRecord

MOST_FIXED = 4096
"""Of k: a cache that says more gets batches as wide as what they hold."""


@dataclass(frozen=True, slots=True)
class EntryColumns:
    """What a batch holds of each position, by the caches' selections: the same for all batches, the empty ones too.

    Attributes:
        num_columns: K; None for the largest support of the batch.
        selection: kind of the caches' selections, the same for all.
        vocab_size: of the teacher.
        has_exact, has_entropy: whether num_exact_P and entropy_P are there.
        temperatures: the L further ones.
        has_target_logprobs: whether target_logprobs_P is there.
    """

    num_columns: int | None
    selection: str = "top_k"
    vocab_size: int | None = None
    has_exact: bool = False
    has_entropy: bool = False
    temperatures: tuple[float, ...] = ()
    has_target_logprobs: bool = False

    @classmethod
    def of(cls, selections: Sequence[SelectionInfo], vocab_size: int) -> EntryColumns:
        """For caches with these selections: K is fixed where each of them fixes it, at most at the vocabulary, and is not
        larger than any real k; else a few bytes could ask for any amount of memory."""
        widths = [fixed_entries(selection) for selection in selections]
        most = 0 if None in widths else min(max(width or 0 for width in widths), vocab_size)
        first = selections[0]
        return cls(
            num_columns=None if None in widths or most > MOST_FIXED else most,
            selection=first.kind,
            vocab_size=vocab_size,
            has_exact=fixed_exact(first) is not None or stores_num_exact(first),
            has_entropy=first.entropy,
            temperatures=tuple(first.temperatures),
        )

    def blank(self, shape_PK: tuple[int, int], dtype: DTypeLike, pool: BufferPool) -> SoftTargets[NDArray[Any]]:
        """Soft targets of P positions and K columns; entries and tail masses are left unwritten."""
        num_positions, num_temperatures = shape_PK[0], len(self.temperatures)
        return SoftTargets(
            token_ids_PK=pool.take(shape_PK, np.int32),
            logprobs_PK=pool.take(shape_PK, dtype),
            tail_mass_P=np.empty(num_positions, np.float32),
            entries=entries_of(self.selection),
            num_exact_P=np.zeros(num_positions, np.int64) if self.has_exact else None,
            vocab_size=self.vocab_size,
            log_z_PL=np.zeros((num_positions, num_temperatures), np.float32) if num_temperatures else None,
            temperatures=self.temperatures,
            entropy_P=np.zeros(num_positions, np.float32) if self.has_entropy else None,
            selection=self.selection,
            target_logprobs_P=np.full(num_positions, np.nan, np.float32) if self.has_target_logprobs else None,
        )


@dataclass(frozen=True, slots=True)
class BatchLayout:
    """Where the records of a batch go.

    Attributes:
        sequences_per_row: for each of the B rows, how many records it takes, one after the other; 0 for an empty row.
        seq_len: T.
        columns: of the entries.
        mask: which positions are learned from.
        features: that the batch holds.
        logprob_dtype: float32, or float16 where all caches store that.
        with_roles: whether the batch holds roles_P.
    """

    sequences_per_row: tuple[int, ...]
    seq_len: int
    columns: EntryColumns
    mask: MaskConfig = field(default_factory=MaskConfig)
    features: tuple[AskedFeature, ...] = ()
    logprob_dtype: DTypeLike = np.float32
    with_roles: bool = False


def assemble(records: Sequence[Record], layout: BatchLayout, pool: BufferPool | None = None) -> Batch:
    """The batch of these records, row after row.

    Args:
        records: as many as the layout's rows take.
        layout: where they go.
        pool: gives the memory of the two large arrays; None for fresh ones.

    Raises:
        CorruptCacheError: a record that does not fit the row, its own mask or K.
    """
    # Imported on use: numba takes 0.4 s.
    from kdcache.loader.batches._numba_tokens import TOKENS, fill_tokens

    for record in records:
        _check_positions(record)
    choices = [EVERYTHING if layout.mask.is_all else choose(record.sequence, layout.mask) for record in records]
    batch = _blank(records, choices, layout, pool)
    remaining, position = iter(zip(records, choices, strict=True)), 0
    tasks: dict[int, tuple[Codec, list[DecodeTask]]] = {}
    table, ends, held = [], [], []
    for b, num_sequences in enumerate(layout.sequences_per_row):
        column = 0
        for segment in range(1, num_sequences + 1):
            record, choice = next(remaining)
            num_tokens = _num_tokens(record)
            _check_fits(record, layout, column)
            end = position + _num_kept(record, choice)
            addresses = _addresses(record, choice, held)
            table.append((*addresses, num_tokens, b, column, segment, position))
            if choice.kept_weights is not None:
                batch.weights_P[position:end] = choice.kept_weights
            if batch.roles_P is not None:
                roles_P = target_roles(record.sequence)
                batch.roles_P[position:end] = roles_P if choice.keep_P is None else roles_P[choice.keep_P]
            out = _entry_arrays(batch.teacher, slice(position, end))
            if batch.teacher.target_logprobs_P is not None:
                logprobs_P = _target_logprobs(record)
                kept_P = logprobs_P if choice.keep_P is None else logprobs_P[choice.keep_P]
                batch.teacher.target_logprobs_P[position:end] = kept_P
            if isinstance(record, EncodedRecord):
                tasks.setdefault(id(record.codec), (record.codec, []))[1].append(record.decode_task(out, choice.keep_P))
            else:
                _copy(record, out, choice.keep_P)
            position, column = end, column + num_tokens
        ends.append(column)
    fill_tokens(batch, np.array(table, TOKENS), np.array(ends, np.int64))
    for codec, several in tasks.values():  # all of a cache's at once
        codec.decode_many_into(several)
    return batch


def assemble_reference(records: Sequence[SequenceRecord], layout: BatchLayout) -> Batch:
    """The same, token by token: the definition that `assemble` is compared with."""
    choices = [choose(record.sequence, layout.mask) for record in records]
    batch = _blank(records, choices, layout, None)
    teacher = batch.teacher
    teacher.token_ids_PK[:], teacher.logprobs_PK[:] = PADDING_ID, -np.inf
    batch.input_ids_BT[:], batch.position_ids_BT[:], batch.segment_ids_BT[:] = 0, 0, 0
    batch.target_ids_BT[:] = NO_TARGET
    remaining, p = iter(records), 0
    for b, num_sequences in enumerate(layout.sequences_per_row):
        column = 0
        for segment in range(1, num_sequences + 1):
            record = next(remaining)
            sequence, d = record.sequence, record.distributions
            weights, record_p = choose_reference(sequence, layout.mask), 0
            for t in range(sequence.num_tokens):
                batch.input_ids_BT[b, column] = sequence.input_ids_N[t]
                batch.position_ids_BT[b, column] = t
                batch.segment_ids_BT[b, column] = segment
                is_kept = bool(sequence.supervised_N[t]) and weights[record_p] > 0
                if is_kept and t + 1 < sequence.num_tokens:
                    batch.target_ids_BT[b, column] = sequence.input_ids_N[t + 1]
                if is_kept:
                    batch.flat_positions_P[p] = b * layout.seq_len + column
                    batch.weights_P[p] = weights[record_p]
                    for k, entry in enumerate(range(d.offsets_P1[record_p], d.offsets_P1[record_p + 1])):
                        teacher.token_ids_PK[p, k] = d.token_ids_E[entry]
                        teacher.logprobs_PK[p, k] = d.logprobs_E[entry]
                    teacher.tail_mass_P[p] = d.tail_mass_P[record_p]
                    if batch.roles_P is not None:
                        batch.roles_P[p] = sequence.roles_N[t + 1] if t + 1 < sequence.num_tokens else NO_ROLE
                    for name, values in (("num_exact_P", d.num_exact_P), ("log_z_PL", d.log_z_PL), ("entropy_P", d.entropy_P)):
                        if getattr(teacher, name) is not None and values is not None:
                            getattr(teacher, name)[p] = values[record_p]
                    if teacher.target_logprobs_P is not None:
                        teacher.target_logprobs_P[p] = d.target_logprobs(sequence.target_ids_P)[record_p]
                    p += 1
                record_p += bool(sequence.supervised_N[t])
                column += 1
    return batch


def _blank(records: Sequence[Record], choices: Sequence[Choice], layout: BatchLayout, pool: BufferPool | None) -> Batch:
    num_stored = sum(_num_positions(record) for record in records)
    num_masked = sum(int(np.count_nonzero(~c.keep_P)) for c in choices if c.keep_P is not None)
    num_columns = layout.columns.num_columns
    if num_columns is None:
        num_columns = max((int(np.diff(_offsets(record)).max(initial=0)) for record in records), default=0)
    cu_seqlens_G1 = _segment_starts([_num_tokens(record) for record in records], layout)
    segments = cu_seqlens_G1, int(np.diff(cu_seqlens_G1).max(initial=0))
    batch = blank_batch(layout, segments, (len(records), num_stored - num_masked, num_columns), pool)
    keeps, starts = [choice.keep_P for choice in choices], _slots_of_starts(records, layout) if layout.features else []
    features = batch_features(records, keeps, starts, layout.features, pool or BufferPool(0))
    return replace(batch, num_masked=num_masked, features=features)


def blank_batch(
    layout: BatchLayout, segments: tuple[NDArray[np.int32], int], sizes: tuple[int, int, int], pool: BufferPool | None
) -> Batch:
    """A batch with nothing masked and without features. Weights are 1; what is to be written whole anyway, most of it, is left
    unwritten.

    Args:
        layout: of the batch.
        segments: cu_seqlens_G1 and max_seqlen.
        sizes: number of sequences, of positions P and of columns K.
        pool: as for `assemble`.
    """
    shape_BT, columns, pool = (len(layout.sequences_per_row), layout.seq_len), layout.columns, pool or BufferPool(0)
    num_sequences, num_positions, num_columns = sizes
    return Batch(
        input_ids_BT=np.empty(shape_BT, np.int32),
        position_ids_BT=np.empty(shape_BT, np.int32),
        segment_ids_BT=np.empty(shape_BT, np.int32),
        cu_seqlens_G1=segments[0],
        max_seqlen=segments[1],
        target_ids_BT=np.empty(shape_BT, np.int32),
        flat_positions_P=np.empty(num_positions, np.int64),
        teacher=columns.blank((num_positions, num_columns), layout.logprob_dtype, pool),
        weights_P=np.ones(num_positions, np.float32),
        roles_P=np.full(num_positions, NO_ROLE, np.uint8) if layout.with_roles else None,
        num_sequences=num_sequences,
        num_masked=0,
    )


def _segment_starts(lengths: Sequence[int], layout: BatchLayout) -> NDArray[np.int32]:
    """(G+1,) int32; the padding at a row's end is a segment, and there is none of no length."""
    starts, remaining = [0], iter(lengths)
    for b, num_sequences in enumerate(layout.sequences_per_row):
        for _ in range(num_sequences):
            starts.append(starts[-1] + next(remaining))
        end = (b + 1) * layout.seq_len
        if starts[-1] < end:
            starts.append(end)
    return np.array(starts, np.int32)


def _slots_of_starts(records: Sequence[Record], layout: BatchLayout) -> list[int]:
    """The slot of each record's first token."""
    starts, remaining = [], iter(records)
    for b, num_sequences in enumerate(layout.sequences_per_row):
        slot = b * layout.seq_len
        for _ in range(num_sequences):
            starts.append(slot)
            slot += _num_tokens(next(remaining))
    return starts


def _num_kept(record: Record, choice: Choice) -> int:
    return _num_positions(record) if choice.keep_P is None else int(np.count_nonzero(choice.keep_P))


def _addresses(record: Record, choice: Choice, held: list[NDArray[Any]]) -> tuple[int, int, int]:
    """Where ids, supervised flags and the mask's flags (0 for none) lie; arrays made for it are put into `held`."""
    keep = 0 if choice.keep_P is None else _address(choice.keep_P, np.bool_, held)
    if isinstance(record, EncodedRecord):
        return (*record.token_addresses, keep)
    sequence = record.sequence
    return _address(sequence.input_ids_N, np.int32, held), _address(sequence.supervised_N, np.bool_, held), keep


def _address(values: NDArray[Any], dtype: DTypeLike, held: list[NDArray[Any]]) -> int:
    held.append(np.ascontiguousarray(values, dtype))
    return held[-1].__array_interface__["data"][0]


def _target_logprobs(record: Record) -> NDArray[np.float32]:
    """(P,) the teacher's logprob of each target of the record; NaN at a sequence's last position."""
    whole = record.decode() if isinstance(record, EncodedRecord) else record
    try:
        return whole.distributions.target_logprobs(whole.sequence.target_ids_P)
    except FormatError as error:
        raise CorruptCacheError(f"{whole.sequence.source}: {error}") from error


def _entry_arrays(teacher: SoftTargets[NDArray[Any]], where: slice) -> EntryArrays:
    return EntryArrays(
        token_ids_PK=teacher.token_ids_PK[where],
        logprobs_PK=teacher.logprobs_PK[where],
        tail_mass_P=teacher.tail_mass_P[where],
        num_exact_P=None if teacher.num_exact_P is None else teacher.num_exact_P[where],
        log_z_PL=None if teacher.log_z_PL is None else teacher.log_z_PL[where],
        entropy_P=None if teacher.entropy_P is None else teacher.entropy_P[where],
    )


def _copy(record: SequenceRecord, out: EntryArrays, keep_P: NDArray[np.bool_] | None) -> None:
    try:
        copy_into(record.distributions, out, keep_P)
    except CorruptCacheError as error:
        raise CorruptCacheError(f"{record.sequence.source}: {error}") from error


def _offsets(record: Record) -> NDArray[np.int64]:
    return record.offsets_P1 if isinstance(record, EncodedRecord) else record.distributions.offsets_P1


def _num_positions(record: Record) -> int:
    """Stored positions."""
    return record.num_positions if isinstance(record, EncodedRecord) else record.distributions.num_positions


def _num_tokens(record: Record) -> int:
    return record.num_tokens if isinstance(record, EncodedRecord) else record.sequence.num_tokens


def _check_positions(record: Record) -> None:
    if isinstance(record, EncodedRecord):
        return  # its offsets are made for as many positions as are supervised
    num_supervised = int(np.count_nonzero(record.sequence.supervised_N))
    num_positions = _num_positions(record)
    if num_positions != num_supervised:
        raise CorruptCacheError(
            f"{record.sequence.source}: {num_positions} distributions for {num_supervised} supervised positions"
        )


def _check_fits(record: Record, layout: BatchLayout, column: int) -> None:
    num_tokens = _num_tokens(record)
    if column + num_tokens > layout.seq_len:
        where = f"{record.sequence.source}: {num_tokens} tokens at column {column}"
        raise CorruptCacheError(f"{where} pass seq_len {layout.seq_len}")
