"""The term `crd`: contrast with all sequences of the cache, whose pooled vectors are the teacher's bank (1910.10699)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from kdcache.errors import ConfigError, LossError
from kdcache.format.feature_vectors import FeatureVectors
from kdcache.format.manifest import Manifest
from kdcache.loader.torch_batches import TorchBatch, feature_tensors
from kdcache.loss.states.crd import contrast, moved, nce
from kdcache.loss.states.gathering import gathered
from kdcache.loss.states.vectors import full_precision
from kdcache.train.terms.base import Needs, Setting, StudentStates, Term
from kdcache.train.terms.vectors import (
    check_kind,
    check_pooled,
    check_positive,
    check_whole,
    feature_of,
    features_of_kind,
    generator_for,
    has_position_S,
    pooled_vectors,
    vectors_of,
)

_NAME = "crd"


class CrdTerm(Term):
    """Each sequence told apart from others of the whole cache, which is the teacher's bank (CRD).

    Noise-contrastive estimation in both directions, the mean over sequences.

    A sequence's vectors of both models, brought to `size` numbers of length 1, are told apart from `negatives` others. The
    student's are compared with the teacher's of the cache, embedded as of now, and the teacher's with a bank of the student's,
    which follows it with `momentum` and is kept in checkpoints.

    Memory: the teacher's bank as it is stored, on the host (a million vectors of 4096 float16 numbers: 8 GB), and the
    student's in float32, on the device (512 bytes for each sequence at size 128).

    Args:
        feature: name of the cache's feature: hidden states, pooled.
        layer: of the student, whose states are pooled alike: 0..L before the final norm, -1 after it.
        size: of the learned embeddings.
        negatives: drawn for each batch, with equal probabilities and with replacement, and shared by its sequences.
        temperature: what similarities are divided by.
        momentum: of the student's bank.
    """

    needed = "a pooled feature of kind `hidden`"
    several_teachers = "wrong"
    student_bank: Tensor
    normalizers: Tensor
    num_drawn: Tensor
    reads_weights = False

    def __init__(
        self,
        *,
        feature: str,
        layer: int = -1,
        size: int = 128,
        negatives: int = 16384,
        temperature: float = 0.07,
        momentum: float = 0.5,
    ) -> None:
        super().__init__()
        check_whole("layer", layer, least=-1)
        check_whole("size", size, least=1)
        check_whole("negatives", negatives, least=1)
        check_positive("temperature", temperature)
        if not 0 <= momentum < 1:
            raise ConfigError(f"momentum is {momentum!r}, but must be at least 0 and below 1")
        self.feature, self.layer, self.size, self.negatives = feature, layer, size, negatives
        self.temperature, self.momentum = temperature, momentum
        self.seed = 0

    @classmethod
    def examples(cls, manifest: Manifest) -> Iterable[dict[str, Any]]:
        """One for each pooled feature."""
        return [{"feature": name} for name in features_of_kind(manifest, "hidden", is_pooled=True)] or [
            {"feature": "hidden_last_mean"}
        ]

    def needs(self) -> Needs:
        """The feature and the student's layer."""
        return Needs(features=(self.feature,), layers=(self.layer,))

    def check(self, manifest: Manifest) -> None:
        """Refuse a feature that is not pooled hidden states."""
        info = feature_of(manifest, self.feature, _NAME)
        check_kind(info, "hidden", _NAME)
        check_pooled(info, _NAME)

    def set_up(self, setting: Setting) -> None:
        """Read the teacher's bank, and make the embeddings and the student's bank.

        Raises:
            ConfigError: a cache of fewer than two sequences with a vector.
        """
        self.seed = setting.seed
        found: FeatureVectors[Any] = setting.pooled_features(self.feature)
        self.bank = found if isinstance(found.values_FH, Tensor) else feature_tensors(found)
        # Sequences without a position have a vector of zeros, and are never trained on.
        self.drawable = _nonzero(self.bank)
        if len(self.drawable) < 2:
            raise ConfigError(f"loss term {_NAME!r} contrasts sequences, but the cache has {len(self.drawable)} with a vector")
        self.embed_student = self._embedding(setting.hidden_size, setting, "student")
        self.embed_teacher = self._embedding(self.bank.info.size, setting, "teacher")
        generator = generator_for(setting.seed, _NAME, "bank")
        bank = torch.rand(len(self.bank), self.size, generator=generator) * 2 - 1
        self.register_buffer("student_bank", functional.normalize(bank, dim=1).to(setting.device))
        self.register_buffer("normalizers", torch.full((2,), -1.0, device=setting.device))
        self.register_buffer("num_drawn", torch.zeros((), dtype=torch.int64, device=setting.device))

    def forward(self, student: StudentStates, batch: TorchBatch, weights_P: Tensor) -> Tensor:  # noqa: ARG002 - sequences count
        """The sum over this rank's sequences of both directions' losses; moves the student's bank. A collective.

        Raises:
            LossError: the batch does not tell which sequences it has.
        """
        if batch.sequence_indices_S is None:
            raise LossError(
                f"loss term {_NAME!r}: the batch does not tell which sequences of the cache it has; make it with a loader"
            )
        own = pooled_vectors(batch, student.layer_BTH(self.layer), vectors_of(batch, self.feature))
        with full_precision(own.student_SH):
            student_SH, teacher_SH = (
                functional.normalize(embed(found.float()), dim=1)
                for embed, found in ((self.embed_student, own.student_SH), (self.embed_teacher, own.teacher))
            )
            drawn = self._drawn()
            with torch.no_grad():
                told = functional.normalize(self.embed_teacher(self._teacher(drawn).to(teacher_SH.device)), dim=1)
            # Indexing copies: the bank may move before the backward pass.
            others_SH, others = self.student_bank[own.sequences_S], self.student_bank[drawn.to(self.student_bank.device)]
            scores = (
                contrast(student_SH, teacher_SH.detach(), told, self.temperature),
                contrast(teacher_SH, others_SH, others, self.temperature),
            )
            self._fix_normalizers(scores)
            losses = [
                nce(found, z, len(self.drawable)).sum() for found, z in zip(scores, self.normalizers.clone(), strict=True)
            ]
        if self.training:
            self._move(student_SH.detach(), own.sequences_S)
        return torch.stack(losses).sum()

    def count(self, batch: TorchBatch, weights_P: Tensor) -> Tensor:  # noqa: ARG002 - sequences count
        """How many sequences have a vector."""
        vectors = vectors_of(batch, self.feature)
        return has_position_S(batch, vectors.info)[vectors.slots_F].sum()

    def _embedding(self, size: int, setting: Setting, side: str) -> nn.Linear:
        made = nn.Linear(size, self.size, device="meta").to_empty(device="cpu")  # draws nothing from torch's own generator
        generator = generator_for(setting.seed, _NAME, side)
        with torch.no_grad():
            bound = size**-0.5
            made.weight.copy_((torch.rand(made.weight.shape, generator=generator) * 2 - 1) * bound)
            made.bias.copy_((torch.rand(made.bias.shape, generator=generator) * 2 - 1) * bound)
        return made.to(setting.device)

    def _drawn(self) -> Tensor:
        """Indices of the batch's negatives: the same on all ranks, a function of the seed and how often was drawn."""
        generator = generator_for(self.seed, _NAME, "negatives", int(self.num_drawn))
        if self.training:
            self.num_drawn += 1
        return self.drawable[torch.randint(len(self.drawable), (self.negatives,), generator=generator)]

    def _teacher(self, drawn: Tensor) -> Tensor:
        return self.bank.at(drawn).float32()

    @torch.no_grad()
    def _fix_normalizers(self, scores: tuple[Tensor, Tensor]) -> None:
        """At the first batch whose scores are finite: the number of sequences times the mean score, of all ranks."""
        if float(self.normalizers[0]) > 0:
            return
        sums = torch.stack([torch.stack([found.sum().float(), found.new_tensor(found.numel()).float()]) for found in scores])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums)
        found = len(self.drawable) * sums[:, 0] / sums[:, 1]
        if bool(found.isfinite().all()):  # else the batch had no sequence, or states that are no numbers
            self.normalizers.copy_(found)

    @torch.no_grad()
    def _move(self, student_SH: Tensor, sequences_S: Tensor) -> None:
        found_SH, indices_S = gathered(student_SH, sequences_S).tensors
        moved_SH = moved(self.student_bank[indices_S], found_SH, self.momentum)
        kept_S = moved_SH.isfinite().all(dim=1)  # a step that is skipped for its NaN must not stay in the bank
        self.student_bank[indices_S[kept_S]] = moved_SH[kept_S]


def _nonzero(bank: FeatureVectors[Tensor], size: int = 4096) -> Tensor:
    """(S,) indices of the vectors that are not all zeros, a few at a time."""
    parts = [bank.at(some).float32().any(dim=1) for some in torch.arange(len(bank)).split(size)]
    return torch.cat(parts).nonzero().flatten() if parts else torch.zeros(0, dtype=torch.int64)
