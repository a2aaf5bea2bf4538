"""Ranking-loss KD: the student is to rank the ids that either side finds most probable as the teacher does.

1 - Spearman's correlation of soft ranks over the union of both tops, at each position; `ranking_reference` is the definition.
The student's logits are made chunk by chunk, as for the fused loss. Source: RLKD, arXiv 2409.12545, and its code; there half of
a divergence over the whole vocabulary is added.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kdcache.errors import LossError
from kdcache.format.soft_targets import SoftTargets
from kdcache.kernels import divergences as d
from kdcache.kernels.base import PADDING_ID
from kdcache.kernels.divergences import torch_formulas
from kdcache.kernels.divergences.torch_formulas import Masses, soft_ranks
from kdcache.loss.chunks import Product
from kdcache.loss.fused import PLAIN_HEAD, Projection, check_projection, run_fused
from kdcache.loss.prepare import position_scales
from kdcache.loss.steps.step import Found
from kdcache.loss.steps.torch_positions import exact_entries, widened


@dataclass(slots=True, eq=False)
class RankingMeasures:
    """What is worth watching of a ranking loss, added up over the positions that count.

    Attributes:
        num_positions: that count.
        num_ids: ranked, over all of them.
        num_dead: of these, ids whose soft rank has no derivative: no other logit is within the strength of theirs.
        num_unknown: positions with an id of the student's top that the teacher's entries do not have.
        num_common: ids in both tops, over all positions.
        num_first: positions where both have the same first id.
    """

    num_positions: Tensor | float = 0.0
    num_ids: Tensor | float = 0.0
    num_dead: Tensor | float = 0.0
    num_unknown: Tensor | float = 0.0
    num_common: Tensor | float = 0.0
    num_first: Tensor | float = 0.0


def ranking_loss(
    hidden_PH: Tensor,
    projection: Tensor | Projection,
    teacher: SoftTargets[Tensor],
    *,
    top: int = 15,
    strength: float = 1.0,
    weights: Tensor | None = None,
    reduction: str = "mean",
    measures: RankingMeasures | None = None,
) -> Tensor:
    """1 - Spearman's correlation of soft ranks over the union of the teacher's top ids and the student's, in [0, 2].

    Ids of the student's top that the teacher's exact entries do not have are all given one value below them, since all that is
    known of each is that it has less. Which of them comes first among themselves is not learned; with the whole vocabulary as
    entries nothing is unknown.
    0 without a gradient where the teacher has no order, 1 without one where all of the student's soft ranks are equal.

    Args:
        hidden_PH: (P, H) the student's last hidden states.
        projection: (V, H) the output projection's weight, or a Projection that says more.
        teacher: exact entries of at least one id, or such with estimates, which are not read.
        top: ids of each side; the teacher's are fewer where it has fewer exact entries.
        strength: how soft the ranks are; where logits differ by more, a rank is hard and has no derivative. Above 0.
        weights: (P,) >= 0; None for 1.
        reduction: `mean`, sum(weight * loss) / sum(weight), or `sum`.
        measures: added to.

    Returns:
        A scalar; differentiable once.

    Raises:
        LossError: an argument is impossible, or the entries are estimates alone, which have no order.
    """
    if top < 1 or not 0 < strength < math.inf:
        raise LossError(f"top is {top!r} and strength {strength!r}, but both must be above 0, and top a whole number")
    if reduction not in ("mean", "sum"):
        raise LossError(f"reduction is {reduction!r}, but must be 'mean' or 'sum': the gradients are summed over positions")
    if teacher.entries == "unbiased":
        raise LossError("the entries are unbiased estimates, which are in no order; the ranking loss needs exact entries")
    projection = projection if isinstance(projection, Projection) else Projection(projection)
    check_projection(hidden_PH, projection.weight_VH, projection.bias_V)
    product = Product(hidden_PH, *projection.without_padding(), projection.head or PLAIN_HEAD)
    scales_P = position_scales(hidden_PH, weights, reduction)
    step = RankingStep(teacher, scales_P, top, strength, measures or RankingMeasures())
    return run_fused(product, step, projection.chunk_positions or 0)


@dataclass(frozen=True, slots=True, eq=False)
class RankingStep:
    """See `kdcache.loss.steps.step.PositionStep`; the other attributes are those of `ranking_loss`."""

    teacher: SoftTargets[Tensor]
    scales_P: Tensor
    top: int
    strength: float
    measures: RankingMeasures = field(default_factory=RankingMeasures)

    def __call__(self, logits_CV: Tensor, start: int, want_gradient: bool) -> Found:
        part = self.teacher.slice(start, start + len(logits_CV))
        scales_C = widened(self.scales_P[start : start + len(logits_CV)])
        is_read_C = scales_C > 0
        union = union_of_tops(part, logits_CV, self.top)
        z_CK = widened(logits_CV.gather(1, union.ids_CK.clamp_min(0).long()))
        z_CK = z_CK.masked_fill(~is_read_C[:, None], 0.0)
        ranking, masses = d.SoftSpearman(self.strength), _as_masses(union, z_CK)
        losses_C = torch.where(is_read_C, torch_formulas.compute(ranking, masses) * scales_C, 0.0)
        self._watch(union, z_CK, is_read_C)
        if want_gradient:
            h_CK = torch_formulas.slopes(ranking, masses)[:, :-1] * scales_C[:, None]
            h_CK = torch.where(is_read_C[:, None] & (union.ids_CK >= 0), h_CK, 0.0)
            logits_CV.zero_().scatter_add_(1, union.ids_CK.clamp_min(0).long(), h_CK.to(logits_CV.dtype))
        return Found(losses_C, logits_CV)

    def _watch(self, union: UnionOfTops, z_CK: Tensor, is_read_C: Tensor) -> None:
        found, read_C1 = self.measures, is_read_C[:, None]
        is_ranked_CK = (union.ids_CK >= 0) & read_C1
        found.num_positions = found.num_positions + is_read_C.sum()
        found.num_ids = found.num_ids + is_ranked_CK.sum()
        found.num_dead = found.num_dead + (is_dead(z_CK, union.ids_CK >= 0, self.strength) & is_ranked_CK).sum()
        found.num_unknown = found.num_unknown + (union.is_unknown_CK.any(dim=1) & is_read_C).sum()
        found.num_common = found.num_common + (union.num_common_C * is_read_C).sum()
        found.num_first = found.num_first + (union.is_same_first_C & is_read_C).sum()


@dataclass(frozen=True, slots=True, eq=False)
class UnionOfTops:
    """The ids that are ranked at each position.

    Attributes:
        ids_CK: (C, 2 * top) the teacher's top, then those of the student's that are not in it; -1 for none. No id comes twice.
        log_p_CK: float64, the teacher's logprob; one value below its entries for ids that it does not have.
        is_unknown_CK: whether the teacher's entries lack the id.
        num_common_C: ids in both tops.
        is_same_first_C: whether both have the same first id.
    """

    ids_CK: Tensor
    log_p_CK: Tensor
    is_unknown_CK: Tensor
    num_common_C: Tensor
    is_same_first_C: Tensor


def union_of_tops(teacher: SoftTargets[Tensor], logits_CV: Tensor, top: int) -> UnionOfTops:
    """The union of the teacher's top ids and the student's, at each of C positions."""
    is_exact_CK, ids_CK = exact_entries(teacher), teacher.token_ids_PK.long()
    log_p_CK = widened(teacher.logprobs_PK.detach()).masked_fill(~is_exact_CK, -torch.inf)
    own_p_CK, columns_CK = log_p_CK.topk(min(top, log_p_CK.shape[1]), dim=1)
    own_CK = ids_CK.gather(1, columns_CK).masked_fill(torch.isneginf(own_p_CK), PADDING_ID)
    their_CK = logits_CV.topk(min(top, logits_CV.shape[1]), dim=1).indices
    is_common_CK = (their_CK[:, :, None] == own_CK[:, None, :]).any(dim=2)
    # Where the teacher has an entry of the id, below its top, or none.
    is_entry_CKK = (their_CK[:, :, None] == ids_CK[:, None, :]) & is_exact_CK[:, None, :]
    their_p_CK = torch.where(is_entry_CKK, log_p_CK[:, None, :], -torch.inf).amax(dim=2)
    is_unknown_CK = torch.isneginf(their_p_CK)
    their_p_CK = torch.where(is_unknown_CK, _below(log_p_CK, teacher)[:, None], their_p_CK)
    return UnionOfTops(
        ids_CK=torch.cat([own_CK, their_CK.masked_fill(is_common_CK, PADDING_ID)], dim=1),
        log_p_CK=torch.cat([own_p_CK, their_p_CK], dim=1),
        is_unknown_CK=torch.cat([torch.zeros_like(own_CK, dtype=torch.bool), is_unknown_CK], dim=1),
        num_common_C=is_common_CK.sum(dim=1),
        is_same_first_C=(own_CK[:, :1] == their_CK[:, :1]).any(dim=1),
    )


def _below(log_p_CK: Tensor, teacher: SoftTargets[Tensor]) -> Tensor:
    """(C,) the value of ids that have no entry: half of the most that one of them can have."""
    least_C = log_p_CK.masked_fill(torch.isneginf(log_p_CK), torch.inf).amin(dim=1)
    most_C = torch.minimum(least_C, widened(teacher.tail_mass_P).log())
    # No tail and no entry: as low as float32 has it.
    return torch.where(torch.isfinite(most_C), most_C, least_C.clamp(-1e4, 0.0) - 100.0) - math.log(2)


def _as_masses(union: UnionOfTops, z_CK: Tensor) -> Masses:
    """Both sides as `soft_spearman` takes them: it compares the logs of what has a teacher's mass above 0."""
    pad = torch.nn.functional.pad
    is_ranked_CK1 = pad(union.ids_CK >= 0, (0, 1))
    log_p_CK1, log_q_CK1 = (pad(torch.where(union.ids_CK >= 0, one_CK, 0.0), (0, 1)) for one_CK in (union.log_p_CK, z_CK))
    mass_CK1 = is_ranked_CK1.to(log_q_CK1.dtype)
    return Masses(log_p_CK1, mass_CK1, log_q_CK1, mass_CK1)


def is_dead(z_CK: Tensor, is_ranked_CK: Tensor, strength: float) -> Tensor:
    """(C, K) whether an id's soft rank has no derivative: its pool of the isotonic regression has no other id in it."""
    _, levels_CK = soft_ranks(z_CK / strength, is_ranked_CK)
    same_CKK = (levels_CK[:, :, None] == levels_CK[:, None, :]) & is_ranked_CK[:, None, :]
    return is_ranked_CK & (same_CKK.sum(dim=2) == 1)
