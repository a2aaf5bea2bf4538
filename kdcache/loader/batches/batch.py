"""What the loader hands to a trainer.

Alignment: the logits that a student gives at (b, t) predict token t+1 of the SAME sequence. `target_ids_BT[b, t]` is that
token, and `flat_positions_P` counts b * T + t: shift nothing again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.format.feature_vectors import FeatureVectors, stacked_vectors
from kdcache.format.record import NO_TARGET as NO_TARGET
from kdcache.format.record import PADDING_ID
from kdcache.format.soft_targets import ARRAYS as SOFT_TARGET_ARRAYS
from kdcache.format.soft_targets import SoftTargets

NO_ROLE = 255
"""In `Batch.roles_P`: the position predicts no token of its sequence, which is not the role `none`."""


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Batch:
    """One rank's share of a global batch. The arrays are the batch's own and may be written.

    Attributes:
        input_ids_BT: (B, T) int32; 0 at padding.
        position_ids_BT: (B, T) int32; 0.. within each sequence, 0 at padding.
        segment_ids_BT: (B, T) int32; 1.. for the sequences of the row, 0 at padding: attend only where it is equal.
        cu_seqlens_G1: (G+1,) int32, from 0 to B*T: where each segment of the flattened rows starts. Each sequence is a segment,
            and so is the padding after a row's last one, so that every slot is in one.
        max_seqlen: length of the longest segment.
        target_ids_BT: (B, T) int32; the token after position t in the same sequence, NO_TARGET where there is none, where the
            position is not supervised or masked out, and at padding.
        flat_positions_P: (P,) int64, ascending; index into B*T of each position with a teacher's distribution that the mask
            keeps. A supervised last position of a sequence is among them although it has no target id. P may be 0.
        teacher: what the teacher said at these positions: token_ids_PK int32, with K the same in all batches of a `top_k`
            cache; logprobs_PK float32, or float16 where LoaderConfig.logprob_dtype says so, -inf at padding; num_exact_P int64;
            its other arrays float32. The losses take it whole.
        weights_P: (P,) float32, 1 at each position, or by the mask: empty rows and padding have no position, hence no weight.
        num_sequences: in the batch; 0 for a rank that has only the empty rows of the last batch.
        num_masked: supervised positions of its sequences that the mask left out.
        features: name -> FeatureVectors: the teacher's states in the dtype in which they are stored, and the slot of each. None
            where LoaderConfig.features names none.
        pairs: (number of pairs, 2) int64, where LoaderConfig.pairs asks for them, else None: which of the batch's sequences, in
            the order of the rows, are the chosen and the rejected answer to one prompt.
        roles_P: (P,) uint8, index into `kdcache.format.record.ROLES`: the role of the token that the position predicts, the one
            at t+1; NO_ROLE at a sequence's last position. None unless LoaderConfig.with_roles asks for it.
        sequence_indices_S: (num_sequences,) int64, which of the caches' sequences these are, in the order of the rows: an index
            of the cache that was given to the loader, or of several that counts through all of them. None of a batch that was
            not made by a loader.
        domains: of each sequence, in the order of the rows, "" where the input named none. None unless
            LoaderConfig.with_domains asks for them.
    """

    input_ids_BT: NDArray[np.int32]
    position_ids_BT: NDArray[np.int32]
    segment_ids_BT: NDArray[np.int32]
    cu_seqlens_G1: NDArray[np.int32]
    max_seqlen: int
    target_ids_BT: NDArray[np.int32]
    flat_positions_P: NDArray[np.int64]
    teacher: SoftTargets[NDArray[Any]]
    weights_P: NDArray[np.float32]
    num_sequences: int
    num_masked: int
    features: dict[str, FeatureVectors[NDArray[Any]]] | None = None
    roles_P: NDArray[np.uint8] | None = None
    sequence_indices_S: NDArray[np.int64] | None = None
    pairs: NDArray[np.int64] | None = None
    domains: tuple[str, ...] | None = None

    def __repr__(self) -> str:
        return brief(self)

    @property
    def target_ids_P(self) -> NDArray[np.int32]:
        """(P,) the token that came after each of the positions, NO_TARGET after a sequence's last."""
        return self.target_ids_BT.reshape(-1)[self.flat_positions_P]

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences, without padding."""
        return int(np.count_nonzero(self.segment_ids_BT))

    @property
    def num_positions(self) -> int:
        """P."""
        return len(self.flat_positions_P)


ARRAYS = ("input_ids_BT", "position_ids_BT", "segment_ids_BT", "cu_seqlens_G1", "target_ids_BT", "flat_positions_P",
          "weights_P")  # fmt: skip
"""The fields of a batch that are arrays and always there; OPTIONAL, `features` and arrays of `teacher` may be missing."""
OPTIONAL = ("roles_P", "sequence_indices_S", "pairs")
SCALARS = ("max_seqlen", "num_sequences", "num_masked", "domains")
"""The other fields."""


def brief(batch: Any) -> str:
    """One line about a batch, of arrays or of tensors: its sizes, not its numbers."""
    num_rows, num_slots = batch.input_ids_BT.shape
    features = f", features {', '.join(batch.features)}" if batch.features else ""
    return (
        f"{type(batch).__name__}({num_rows} rows of {num_slots:,} slots, {batch.num_sequences:,} sequences, "
        f"teacher={batch.teacher}{features})"
    )


def stack_batches(batches: Sequence[Batch]) -> Batch:
    """One batch of the rows of several, in their order: rows of a PackedView, or all ranks' shares of a global batch.

    Args:
        batches: at least one, all with the same T and of the same caches; smaller supports are padded to the largest K.
    """
    fields: dict[str, Any] = {name: np.concatenate([getattr(batch, name) for batch in batches]) for name in ARRAYS}
    fields |= {name: _joined([getattr(batch, name) for batch in batches]) for name in OPTIONAL}
    before = np.cumsum([0, *(batch.num_sequences for batch in batches)])
    fields["pairs"] = _joined([None if b.pairs is None else b.pairs + n for b, n in zip(batches, before, strict=False)])
    offsets = np.cumsum([0, *(batch.input_ids_BT.size for batch in batches)])
    fields["flat_positions_P"] = np.concatenate(
        [batch.flat_positions_P + offset for batch, offset in zip(batches, offsets, strict=False)]
    )
    starts = [b.cu_seqlens_G1[:-1] + offset for b, offset in zip(batches, offsets, strict=False)]
    fields["cu_seqlens_G1"] = np.concatenate([*starts, offsets[-1:]]).astype(np.int32)
    return Batch(
        **fields,
        teacher=_stacked_teacher([batch.teacher for batch in batches]),
        max_seqlen=max(batch.max_seqlen for batch in batches),
        num_sequences=sum(batch.num_sequences for batch in batches),
        num_masked=sum(batch.num_masked for batch in batches),
        features=_stacked(batches, offsets),
        domains=None if batches[0].domains is None else tuple(name for batch in batches for name in batch.domains or ()),
    )


def _stacked_teacher(parts: Sequence[SoftTargets[NDArray[Any]]]) -> SoftTargets[NDArray[Any]]:
    num_columns = max(part.token_ids_PK.shape[1] for part in parts)
    arrays: dict[str, NDArray[Any] | None] = {}
    for name in SOFT_TARGET_ARRAYS:
        values = [getattr(part, name) for part in parts]
        if name in _PADDING:
            values = [_widened(array_PK, num_columns, _PADDING[name]) for array_PK in values]
        arrays[name] = None if values[0] is None else np.concatenate(values)
    return replace(parts[0], **arrays)


_PADDING = {"token_ids_PK": PADDING_ID, "logprobs_PK": -np.inf}


def _joined(parts: Sequence[NDArray[Any] | None]) -> NDArray[Any] | None:
    found = [part for part in parts if part is not None]
    return np.concatenate(found) if found else None


def _stacked(batches: Sequence[Batch], slots: NDArray[np.int64]) -> dict[str, FeatureVectors[NDArray[Any]]] | None:
    if batches[0].features is None:
        return None
    sequences = np.cumsum([0, *(batch.num_sequences for batch in batches)])
    made = {}
    for name, first in batches[0].features.items():
        offsets = slots if first.info.pooling == "none" else sequences
        made[name] = stacked_vectors([batch.features[name] for batch in batches if batch.features], offsets[:-1].tolist())
    return made


def _widened(values_PK: NDArray[np.generic], num_columns: int, padding: float) -> NDArray[np.generic]:
    missing = num_columns - values_PK.shape[1]
    return values_PK if not missing else np.pad(values_PK, ((0, 0), (0, missing)), constant_values=padding)
