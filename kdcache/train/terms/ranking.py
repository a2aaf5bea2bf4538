"""Ranking-loss KD (RLKD): the order of both sides' most probable ids."""

from __future__ import annotations

from torch import Tensor

from kdcache.errors import ConfigError
from kdcache.format.manifest import Manifest
from kdcache.format.selection import entries_of
from kdcache.loader.torch_batches import TorchBatch
from kdcache.loss.ranking import RankingMeasures, ranking_loss
from kdcache.train.terms.base import StudentStates, Term

MOST_IDS = 256
"""Of each side: the soft ranks of n ids compare every id with every other, at every position."""


class Ranking(Term):
    """1 - Spearman's correlation of soft ranks over the union of the teacher's top ids and the student's.

    RLKD adds half of a divergence over the whole vocabulary: give it as a `divergence` term of weight 0.5. Costs the fused
    loss's three products with a (V, H) matrix once more.

    Args:
        top: ids of each side: 15 for pre-training and 5 for fine-tuning in the paper's code.
        strength: how soft the ranks are; smaller is harder, and more ids get no gradient (`dead_share` in metrics.jsonl).
    """

    needed = "exact entries in order"

    def __init__(self, *, top: int = 15, strength: float = 1.0) -> None:
        super().__init__()
        if not isinstance(top, int) or top < 2:
            raise ValueError(f"top is {top!r}, but must be a whole number of at least 2: one id has no order")
        if not 0 < strength < 1e6:
            raise ValueError(f"strength is {strength!r}, but must be above 0 and below 1e6")
        self.top, self.strength = top, float(strength)
        self._found = RankingMeasures()

    def check(self, manifest: Manifest) -> None:
        selection = manifest.identity.selection
        if entries_of(selection.kind) == "unbiased":
            raise ConfigError(
                f"loss term 'ranking' needs exact entries in their order, but the selection {selection.kind!r} keeps draws "
                "alone; capture with 'top_k' or 'threshold'"
            )
        vocab_size = manifest.identity.teacher.vocab_size
        if self.top > vocab_size:
            raise ConfigError(f"loss term 'ranking': top is {self.top}, but the teacher's vocabulary has {vocab_size} ids")
        if self.top > MOST_IDS:
            raise ConfigError(
                f"loss term 'ranking': top is {self.top}, but may be at most {MOST_IDS} ids of each side; 15 is usual"
            )
        kept = selection.params.get("k")
        if selection.kind in ("top_k", "top_k_sampled") and kept is not None and kept < self.top:
            raise ConfigError(
                f"loss term 'ranking' compares the top {self.top} ids, but the cache keeps {kept}; set top to {kept}, or "
                "capture more"
            )

    def forward(self, student: StudentStates, batch: TorchBatch, weights_P: Tensor) -> Tensor:
        self._found = RankingMeasures()
        return ranking_loss(
            student.hidden_PH,
            student.projection,
            batch.teacher,
            top=self.top,
            strength=self.strength,
            weights=weights_P,
            reduction="sum",
            measures=self._found,
        )

    def measures(self) -> dict[str, float]:
        """Of the last forward: `dead_share` of the ranked ids have no gradient; at `unknown_share` of the positions the student
        ranks ids that the cache lacks; `common_share` of the teacher's top is in the student's; at `first_share` the first id
        is the same."""
        found, positions = self._found, max(float(self._found.num_positions), 1.0)
        return {
            "dead_share": float(found.num_dead) / max(float(found.num_ids), 1.0),
            "unknown_share": float(found.num_unknown) / positions,
            "common_share": float(found.num_common) / (positions * self.top),
            "first_share": float(found.num_first) / positions,
        }
