"""The term `attention`: the student's heads look where the teacher's do, from the teacher's top keys of each head."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from kdcache.errors import ConfigError
from kdcache.format.feature_vectors import FeatureVectors
from kdcache.format.manifest import Manifest
from kdcache.loader.torch_batches import TorchBatch
from kdcache.loss.states.attention import ATTENTION_LOSSES, AttentionScores, TopKeys, attention_loss
from kdcache.loss.states.vectors import zero_of
from kdcache.teacher.hf.attention_calls import AttentionCall, prove_calls
from kdcache.train.body import text_config
from kdcache.train.terms.base import Needs, Setting, StudentStates, Term
from kdcache.train.terms.relations import check_layer
from kdcache.train.terms.vectors import (
    COUNTED,
    SequenceSlots,
    check_choice,
    check_kind,
    feature_of,
    features_of_kind,
    sequences_in,
    vectors_of,
    weights_of,
)

_NAME = "attention"
_PROBE_TOKENS = 16


class AttentionTerm(Term):
    """KL between a layer's attention and the teacher's, at the top keys of each head and the rest as one key.

    The mean over heads and positions.

    The student's attention is the softmax of what its attention function is called with, which is compared with its eager
    attention before training.

    Args:
        feature: name of the cache's feature, of kind `attention`.
        layer: of the student, counted from 1; -1 for the last.
        loss: `kl`, in nats, or `normalized_mse`, see `attention_loss`.
        heads: which head of the teacher each of the student's heads learns from, counted from 0; null for the same one, or for
            heads evenly spread where the numbers differ.
        positions: which queries count: `supervised` ones, by their weights, or `all` that were captured by 1.
    """

    needed = "a feature of kind `attention`"
    several_teachers = "right"

    def __init__(
        self,
        *,
        feature: str,
        layer: int = -1,
        loss: str = "kl",
        heads: Sequence[int] | None = None,
        positions: str = "supervised",
    ) -> None:
        super().__init__()
        check_choice("loss", loss, ATTENTION_LOSSES)
        check_choice("positions", positions, COUNTED)
        self.feature, self.layer, self.loss, self.positions = feature, check_layer(layer), loss, positions
        self.heads = None if heads is None else tuple(heads)
        self.reads_weights = positions != "all"

    @classmethod
    def examples(cls, manifest: Manifest) -> Iterable[dict[str, Any]]:
        """One for each feature of attention."""
        return [{"feature": name} for name in features_of_kind(manifest, "attention")] or [{"feature": "attention"}]

    def needs(self) -> Needs:
        """The feature, and the call of the student's attention."""
        return Needs(features=(self.feature,), heads=(("attention", self.layer),))

    def check(self, manifest: Manifest) -> None:
        """Refuse a feature that is not of attention, and heads that the teacher does not have."""
        info = feature_of(manifest, self.feature, _NAME)
        check_kind(info, "attention", _NAME)
        wrong = next((head for head in self.heads or () if not 0 <= head < (info.num_heads or 0)), None)
        if wrong is not None:
            raise ConfigError(
                f"loss term {_NAME!r}: heads names the teacher's head {wrong!r}, but feature {info.name!r} has heads 0 to "
                f"{(info.num_heads or 0) - 1}"
            )

    def set_up(self, setting: Setting) -> None:
        """Spread the teacher's heads over the student's, and prove on a few tokens that the student's attention is known.

        Raises:
            ConfigError: `heads` is not one for each of the student's, or the student's attention is not such a softmax.
        """
        self.layer = setting.num_layers if self.layer == -1 else self.layer
        num_heads = feature_of(setting.manifest, self.feature, _NAME).num_heads or 1
        if self.heads is None:
            self.heads = tuple(head * num_heads // setting.num_heads for head in range(setting.num_heads))
        if len(self.heads) != setting.num_heads:
            raise ConfigError(
                f"loss term {_NAME!r}: heads has {len(self.heads)} of the teacher's heads, but the student has "
                f"{setting.num_heads} heads, each of which learns from one"
            )
        if setting.student is not None:
            _prove(setting.student, self.layer)

    def forward(self, student: StudentStates, batch: TorchBatch, weights_P: Tensor) -> Tensor:
        """The sum over positions of weight * loss."""
        vectors, call = vectors_of(batch, self.feature), student.attention(self.layer)
        weights = weights_of(batch, weights_P, vectors, self.positions)
        slots, num_slots = vectors.slots_F.tolist(), batch.input_ids_BT.shape[1]
        total = zero_of(call.query_BhTd, call.key_BhKd)
        for sequence in sequences_in(batch, vectors):
            positions = [slot - sequence.slots.start for slot in slots[sequence.vectors]]
            if not positions:
                continue
            b, start = divmod(sequence.slots.start, num_slots)
            tokens = slice(start, start + sequence.slots.stop - sequence.slots.start)
            pair = call.query_BhTd[b, :, tokens], call.key_BhKd[b, :, tokens]
            kept = self._top_keys(vectors, sequence, positions)
            total = total + attention_loss(self.loss, pair, kept, _scores(call, b, tokens), weights[sequence.vectors])
        return total

    def count(self, batch: TorchBatch, weights_P: Tensor) -> Tensor:
        """The weight of the positions that have a vector."""
        return weights_of(batch, weights_P, vectors_of(batch, self.feature), self.positions).sum()

    def _top_keys(self, vectors: FeatureVectors[Tensor], sequence: SequenceSlots, positions: list[int]) -> TopKeys:
        """The teacher's, one head for each of the student's."""
        some = vectors.at(torch.arange(sequence.vectors.start, sequence.vectors.stop, device=vectors.slots_F.device))
        masses = some.heads()
        distances: Any = some.distances_FH
        heads = list(self.heads or ())
        distances = distances.view(masses.shape)
        return TopKeys(masses[:, heads].transpose(0, 1), distances[:, heads].transpose(0, 1), positions)


def _scores(call: AttentionCall, b: int, tokens: slice) -> AttentionScores:
    """What the layer makes of the products within one sequence."""
    options, mask = call.options, call.mask
    if mask is not None:
        mask = mask[b if len(mask) > 1 else 0][:, tokens, tokens]
    scale = options.get("scaling")
    return AttentionScores(
        scale=call.query_BhTd.shape[-1] ** -0.5 if scale is None else float(scale),
        softcap=options.get("softcap"),
        window=options.get("sliding_window"),
        sinks=options.get("s_aux"),
        mask=mask,
    )


def _prove(model: Any, layer: int) -> None:
    was_training = model.training
    ids_1T = torch.arange(1, 1 + _PROBE_TOKENS, device=model.device)[None] % text_config(model).vocab_size
    try:
        prove_calls(model.eval(), [layer], ids_1T)
    except ConfigError as error:
        raise ConfigError(f"loss term {_NAME!r} does not know the student's attention: {error}") from error
    finally:
        model.train(was_training)
