"""What the loader hands to a trainer, and how records become it.

Shape letters: B rows, T positions per row, P supervised positions of the batch flattened, K entries per position (padded).

Alignment: the logits that a student gives at (b, t) predict token t+1 of the SAME sequence. `labels_BT[b, t]` is that token,
and `rows_P` counts b * T + t: nothing is to be shifted again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from kdcache.errors import CorruptCacheError
from kdcache.format.record import PADDING_ID, Distributions, SequenceRecord

IGNORED_LABEL = -100
"""What torch's cross entropy leaves out by default."""


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """One rank's share of a global batch. The arrays are the batch's own and may be written.

    Attributes:
        input_ids_BT: (B, T) int32; 0 at padding.
        position_ids_BT: (B, T) int32; 0.. within each sequence, 0 at padding.
        segment_ids_BT: (B, T) int32; 1.. for the sequences of the row, 0 at padding: attend only where it is equal.
        labels_BT: (B, T) int32; the token after position t in the same sequence, IGNORED_LABEL where there is none, where the
            position is not supervised, and at padding.
        rows_P: (P,) int64, ascending; index into B*T of each position with a teacher's distribution. A supervised last position
            of a sequence is among them although it has no label. P may be 0.
        token_ids_PK: (P, K) int32; PADDING_ID where a position has fewer entries. K is the same in all batches of a `top_k`
            cache.
        logprobs_PK: (P, K) float32, nats, normalised over the whole vocabulary; -inf at padding.
        tail_mass_P: (P,) float32 in [0, 1].
        weights_P: (P,) float32, 1 at each position: empty rows and padding have no position, hence no weight.
        num_sequences: in the batch; 0 for a rank that has only the empty rows of the last batch.
    """

    input_ids_BT: NDArray[np.int32]
    position_ids_BT: NDArray[np.int32]
    segment_ids_BT: NDArray[np.int32]
    labels_BT: NDArray[np.int32]
    rows_P: NDArray[np.int64]
    token_ids_PK: NDArray[np.int32]
    logprobs_PK: NDArray[np.float32]
    tail_mass_P: NDArray[np.float32]
    weights_P: NDArray[np.float32]
    num_sequences: int

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences, without padding."""
        return int(np.count_nonzero(self.segment_ids_BT))


@dataclass(frozen=True, slots=True)
class BatchLayout:
    """Where the records of a batch go.

    Attributes:
        sequences_per_row: for each of the B rows, how many records it takes, one behind the other; 0 for an empty row.
        seq_len: T.
        num_columns: K; None for the largest support of the batch.
    """

    sequences_per_row: tuple[int, ...]
    seq_len: int
    num_columns: int | None


def assemble(records: Sequence[SequenceRecord], layout: BatchLayout) -> Batch:
    """The batch of these records, row after row.

    Raises:
        CorruptCacheError: a record that does not fit the row, its own mask or K.
    """
    batch = _blank(records, layout)
    remaining, position = iter(records), 0
    for b, num_sequences in enumerate(layout.sequences_per_row):
        column = 0
        for segment in range(1, num_sequences + 1):
            record = next(remaining)
            _check(record, layout, column)
            _place_tokens(batch, record, (b, column), segment)
            position = _place_distributions(batch, record, b * layout.seq_len + column, position)
            column += record.sequence.num_tokens
    return batch


def assemble_reference(records: Sequence[SequenceRecord], layout: BatchLayout) -> Batch:
    """The same, token by token: the definition that `assemble` is compared with."""
    batch = _blank(records, layout)
    batch.token_ids_PK[:], batch.logprobs_PK[:] = PADDING_ID, -np.inf
    remaining, p = iter(records), 0
    for b, num_sequences in enumerate(layout.sequences_per_row):
        column = 0
        for segment in range(1, num_sequences + 1):
            record = next(remaining)
            sequence, d = record.sequence, record.distributions
            record_p = 0
            for t in range(sequence.num_tokens):
                batch.input_ids_BT[b, column] = sequence.input_ids_N[t]
                batch.position_ids_BT[b, column] = t
                batch.segment_ids_BT[b, column] = segment
                if sequence.supervised_N[t] and t + 1 < sequence.num_tokens:
                    batch.labels_BT[b, column] = sequence.input_ids_N[t + 1]
                if sequence.supervised_N[t]:
                    batch.rows_P[p] = b * layout.seq_len + column
                    for k, entry in enumerate(range(d.offsets_P1[record_p], d.offsets_P1[record_p + 1])):
                        batch.token_ids_PK[p, k] = d.token_ids_E[entry]
                        batch.logprobs_PK[p, k] = d.logprobs_E[entry]
                    batch.tail_mass_P[p] = d.tail_mass_P[record_p]
                    record_p, p = record_p + 1, p + 1
                column += 1
    return batch


def stack_batches(batches: Sequence[Batch]) -> Batch:
    """One batch of the rows of several, in their order: rows of a PackedView, or all ranks' shares of a global batch.

    Args:
        batches: at least one, all with the same T and K.
    """
    joined = {f.name: np.concatenate([getattr(b, f.name) for b in batches]) for f in fields(Batch) if f.name != "num_sequences"}
    sizes = [batch.input_ids_BT.size for batch in batches]
    offsets = np.cumsum([0, *sizes[:-1]])
    joined["rows_P"] = np.concatenate([batch.rows_P + offset for batch, offset in zip(batches, offsets, strict=True)])
    return Batch(**joined, num_sequences=sum(batch.num_sequences for batch in batches))


def _blank(records: Sequence[SequenceRecord], layout: BatchLayout) -> Batch:
    """Padding everywhere; the entries, most of the bytes, are left unwritten, as each of them is written anyway."""
    shape_BT = (len(layout.sequences_per_row), layout.seq_len)
    num_positions = sum(record.distributions.num_positions for record in records)
    num_columns = layout.num_columns
    if num_columns is None:
        num_columns = max((int(r.distributions.num_entries_P.max(initial=0)) for r in records), default=0)
    return Batch(
        input_ids_BT=np.zeros(shape_BT, np.int32),
        position_ids_BT=np.zeros(shape_BT, np.int32),
        segment_ids_BT=np.zeros(shape_BT, np.int32),
        labels_BT=np.full(shape_BT, IGNORED_LABEL, np.int32),
        rows_P=np.zeros(num_positions, np.int64),
        token_ids_PK=np.empty((num_positions, num_columns), np.int32),
        logprobs_PK=np.empty((num_positions, num_columns), np.float32),
        tail_mass_P=np.zeros(num_positions, np.float32),
        weights_P=np.ones(num_positions, np.float32),
        num_sequences=len(records),
    )


def _place_tokens(batch: Batch, record: SequenceRecord, place: tuple[int, int], segment: int) -> None:
    ids_N, supervised_N = record.sequence.input_ids_N, record.sequence.supervised_N
    b, start = place
    stop = start + len(ids_N)
    batch.input_ids_BT[b, start:stop] = ids_N
    batch.position_ids_BT[b, start:stop] = np.arange(len(ids_N))
    batch.segment_ids_BT[b, start:stop] = segment
    # The last position is left out: the token behind it is another sequence's.
    batch.labels_BT[b, start : stop - 1] = np.where(supervised_N[:-1], ids_N[1:], IGNORED_LABEL)


def _place_distributions(batch: Batch, record: SequenceRecord, first_row: int, position: int) -> int:
    """Write the record's positions behind the `position` ones that are there; returns how many there are now."""
    d = record.distributions
    end = position + d.num_positions
    batch.rows_P[position:end] = first_row + record.sequence.positions_P
    _place_entries(d, batch.token_ids_PK[position:end], batch.logprobs_PK[position:end])
    batch.tail_mass_P[position:end] = d.tail_mass_P
    return end


def _place_entries(d: Distributions, token_ids_PK: NDArray[np.int32], logprobs_PK: NDArray[np.float32]) -> None:
    if d.num_entries == token_ids_PK.size:  # no support is larger than K, so each of them has K entries: one straight copy
        token_ids_PK[:] = d.token_ids_E.reshape(token_ids_PK.shape)
        logprobs_PK[:] = d.logprobs_E.reshape(logprobs_PK.shape)
        return
    token_ids_PK[:], logprobs_PK[:] = d.padded(token_ids_PK.shape[1])


def _check(record: SequenceRecord, layout: BatchLayout, column: int) -> None:
    sequence, d = record.sequence, record.distributions
    if column + sequence.num_tokens > layout.seq_len:
        raise CorruptCacheError(
            f"{sequence.source}: {sequence.num_tokens} tokens at column {column} pass seq_len {layout.seq_len}"
        )
    num_supervised = int(np.count_nonzero(sequence.supervised_N))
    if d.num_positions != num_supervised:
        raise CorruptCacheError(f"{sequence.source}: {d.num_positions} distributions for {num_supervised} supervised positions")
    widest = int(d.num_entries_P.max(initial=0))
    if layout.num_columns is not None and widest > layout.num_columns:
        raise CorruptCacheError(
            f"{sequence.source}: a position has {widest} entries, but the cache's selection {layout.num_columns}"
        )
