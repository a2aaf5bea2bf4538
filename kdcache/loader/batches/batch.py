"""What the loader hands to a trainer.

Shape letters: B rows, T positions per row, P supervised positions of the batch flattened, K entries per position (padded),
G segments of the batch, C further temperatures.

Alignment: the logits that a student gives at (b, t) predict token t+1 of the SAME sequence. `target_ids_BT[b, t]` is that
token, and `flat_positions_P` counts b * T + t: shift nothing again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.format.record import PADDING_ID

NO_TARGET = -100
"""What torch's cross entropy leaves out by default."""

NO_ROLE = 255
"""In `Batch.roles_P`: the position predicts no token of its sequence, which is not the role `none`."""


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """One rank's share of a global batch. The arrays are the batch's own and may be written.

    Attributes:
        input_ids_BT: (B, T) int32; 0 at padding.
        position_ids_BT: (B, T) int32; 0.. within each sequence, 0 at padding.
        segment_ids_BT: (B, T) int32; 1.. for the sequences of the row, 0 at padding: attend only where it is equal.
        cu_seqlens_G1: (G+1,) int32, from 0 to B*T: where each segment of the flattened rows starts. Each sequence is a segment,
            and so is the padding behind a row's last one, so that every place is in one.
        max_seqlen: length of the longest segment.
        target_ids_BT: (B, T) int32; the token after position t in the same sequence, NO_TARGET where there is none, where the
            position is not supervised or masked out, and at padding.
        flat_positions_P: (P,) int64, ascending; index into B*T of each position with a teacher's distribution that the mask
            keeps. A supervised last position of a sequence is among them although it has no target id. P may be 0.
        token_ids_PK: (P, K) int32; PADDING_ID where a position has fewer entries. K is the same in all batches of a `top_k`
            cache.
        logprobs_PK: (P, K) float32, or float16 where LoaderConfig.logprob_dtype says so; nats, normalised over the whole
            vocabulary; -inf at padding.
        tail_mass_P: (P,) float32 in [0, 1].
        weights_P: (P,) float32, 1 at each position, or by the mask: empty rows and padding have no position, hence no weight.
        num_exact_P: (P,) int64, how many of a position's entries are exact, the others being estimates; None where all are.
        log_z_PC: (P, C) float32, nats, as `Distributions.log_z_PT`; None where the cache keeps none.
        entropy_P: (P,) float32, nats, of the teacher's whole distribution; None where the cache keeps none.
        num_sequences: in the batch; 0 for a rank that has only the empty rows of the last batch.
        num_masked: supervised positions of its sequences that the mask left out.
        features: name -> (P, H) float32, a row for each position, in the order of flat_positions_P; or (num_sequences, H) where
            the feature is pooled, in the order of the sequences in the rows. None where LoaderConfig.features names none.
        roles_P: (P,) uint8, index into `kdcache.format.record.ROLES`: the role of the token that the position predicts, the one
            at t+1; NO_ROLE at a sequence's last position. None unless LoaderConfig.with_roles asks for it.
    """

    input_ids_BT: NDArray[np.int32]
    position_ids_BT: NDArray[np.int32]
    segment_ids_BT: NDArray[np.int32]
    cu_seqlens_G1: NDArray[np.int32]
    max_seqlen: int
    target_ids_BT: NDArray[np.int32]
    flat_positions_P: NDArray[np.int64]
    token_ids_PK: NDArray[np.int32]
    logprobs_PK: NDArray[np.floating]
    tail_mass_P: NDArray[np.float32]
    weights_P: NDArray[np.float32]
    num_exact_P: NDArray[np.int64] | None
    log_z_PC: NDArray[np.float32] | None
    entropy_P: NDArray[np.float32] | None
    num_sequences: int
    num_masked: int
    features: dict[str, NDArray[np.float32]] | None = None
    roles_P: NDArray[np.uint8] | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences, without padding."""
        return int(np.count_nonzero(self.segment_ids_BT))

    @property
    def num_positions(self) -> int:
        """P."""
        return len(self.flat_positions_P)


ARRAYS = ("input_ids_BT", "position_ids_BT", "segment_ids_BT", "cu_seqlens_G1", "target_ids_BT", "flat_positions_P",
          "token_ids_PK", "logprobs_PK", "tail_mass_P", "weights_P")  # fmt: skip
OPTIONAL_ARRAYS = ("num_exact_P", "log_z_PC", "entropy_P", "roles_P")
NUMBERS = ("max_seqlen", "num_sequences", "num_masked")


def stack_batches(batches: Sequence[Batch]) -> Batch:
    """One batch of the rows of several, in their order: rows of a PackedView, or all ranks' shares of a global batch.

    Args:
        batches: at least one, all with the same T and of the same caches; smaller supports are padded to the largest K.
    """
    num_columns = max(batch.token_ids_PK.shape[1] for batch in batches)
    fields: dict[str, Any] = {
        name: np.concatenate([getattr(b, name) for b in batches]) for name in ARRAYS if not name.endswith("K")
    }
    for name in OPTIONAL_ARRAYS:
        parts = [getattr(batch, name) for batch in batches]
        fields[name] = None if parts[0] is None else np.concatenate(parts)
    fields["token_ids_PK"] = np.concatenate([_widened(b.token_ids_PK, num_columns, PADDING_ID) for b in batches])
    fields["logprobs_PK"] = np.concatenate([_widened(b.logprobs_PK, num_columns, -np.inf) for b in batches])
    offsets = np.cumsum([0, *(batch.input_ids_BT.size for batch in batches)])
    fields["flat_positions_P"] = np.concatenate(
        [batch.flat_positions_P + offset for batch, offset in zip(batches, offsets, strict=False)]
    )
    starts = [b.cu_seqlens_G1[:-1] + offset for b, offset in zip(batches, offsets, strict=False)]
    fields["cu_seqlens_G1"] = np.concatenate([*starts, offsets[-1:]]).astype(np.int32)
    return Batch(
        **fields,
        max_seqlen=max(batch.max_seqlen for batch in batches),
        num_sequences=sum(batch.num_sequences for batch in batches),
        num_masked=sum(batch.num_masked for batch in batches),
        features=_stacked([batch.features for batch in batches]),
    )


def _stacked(features: Sequence[dict[str, NDArray[np.float32]] | None]) -> dict[str, NDArray[np.float32]] | None:
    parts = [found for found in features if found is not None]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else None


def _widened(values_PK: NDArray[np.generic], num_columns: int, padding: float) -> NDArray[np.generic]:
    missing = num_columns - values_PK.shape[1]
    return values_PK if not missing else np.pad(values_PK, ((0, 0), (0, missing)), constant_values=padding)
