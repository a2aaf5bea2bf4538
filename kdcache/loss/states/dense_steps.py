"""Steps over whole logits that the fused loss runs: against another model's distribution, and against one id a position.

A few passes of torch over blocks of positions that stay in a CPU's cache; see `kdcache.loss.steps.step.PositionStep`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kdcache.kernels import divergences as d
from kdcache.kernels.divergences import torch_formulas
from kdcache.kernels.divergences.torch_formulas import Masses
from kdcache.loss.chunks import Product, write_logits
from kdcache.loss.steps.step import Found

# Logits that are worked on at a time.
_CPU_LOGITS, _DEVICE_LOGITS = 1 << 17, 1 << 24


@dataclass(frozen=True, slots=True, eq=False)
class DenseStep:
    """See `kdcache.loss.steps.step.PositionStep`.

    Attributes:
        teacher: makes the teacher's logits: as many ids as the student has, or fewer.
        divergence: over all ids.
        temperature: of both sides.
        scales_P: (P,) float64, what each position's loss is multiplied by; 0 where it is not read.
        tops_P: (P,) int64 that gets the teacher's most probable id at each position; None where nobody asks.
    """

    teacher: Product
    divergence: d.Divergence
    temperature: float
    scales_P: Tensor
    tops_P: Tensor | None = None
    buffer: list[Tensor] = field(default_factory=list)

    def __call__(self, logits_CV: Tensor, start: int, want_gradient: bool) -> Found:
        stop = start + len(logits_CV)
        teacher_CV = self._logits(start, stop, logits_CV)
        if self.tops_P is not None:
            self.tops_P[start:stop] = teacher_CV.argmax(dim=1)
        losses_C = self.scales_P.new_empty(len(logits_CV))
        for part in _blocks(logits_CV):
            scales_B = self.scales_P[start + part.start : start + part.stop]
            losses_C[part] = self._losses(logits_CV[part], teacher_CV[part], scales_B, want_gradient)
        return Found(losses_C, logits_CV)

    def _losses(self, student_BV: Tensor, teacher_BV: Tensor, scales_B: Tensor, want_gradient: bool) -> Tensor:
        """(B,) losses times their scales; the student's logits become the gradient."""
        t, is_read_B = self.temperature, scales_B > 0
        log_q_BV, log_p_BV = (_log_softmax(z_BV, t) for z_BV in (student_BV, teacher_BV))
        masses = Masses(log_p_BV, log_p_BV.exp(), log_q_BV, log_q_BV.exp())
        losses_B = torch_formulas.compute(self.divergence, masses).double()
        if want_gradient:
            h_BV = torch_formulas.slopes(self.divergence, masses)
            h_BV = torch.addcmul(h_BV, masses.q_PK1, h_BV.sum(dim=1, keepdim=True), value=-1)
            h_BV.mul_((t * scales_B).to(h_BV.dtype)[:, None]).masked_fill_(~is_read_B[:, None], 0.0)
            student_BV.copy_(h_BV)
        return torch.where(is_read_B, t * t * losses_B * scales_B, 0.0)

    def _logits(self, start: int, stop: int, student_CV: Tensor) -> Tensor:
        """(C, V) the teacher's, in the same memory for every chunk; -inf at ids that it does not have."""
        num_ids, dtype = len(self.teacher.weight_VH), self.teacher.logits_dtype
        if not self.buffer:  # the first chunk is the largest
            self.buffer.append(student_CV.new_full(student_CV.shape, -torch.inf, dtype=dtype))
        logits_CV = self.buffer[0][: len(student_CV)]
        write_logits(self.teacher, slice(start, stop), logits_CV[:, :num_ids])
        return logits_CV


@dataclass(frozen=True, slots=True, eq=False)
class TokenStep:
    """Cross entropy at temperature 1 with one id at each position; see `PositionStep`.

    Attributes:
        token_ids_P: (P,) integers in [0, V), anything where the scale is 0.
        scales_P: (P,) float64, of either sign: what each position's loss is multiplied by; 0 where it is not read.
        logprobs_P: (P,) float64 that gets each id's logprob; None where nobody asks.
        tops_P: (P,) int64 that gets the most probable id; None where nobody asks.
    """

    token_ids_P: Tensor
    scales_P: Tensor
    logprobs_P: Tensor | None = None
    tops_P: Tensor | None = None

    def __call__(self, logits_CV: Tensor, start: int, want_gradient: bool) -> Found:
        losses_C = self.scales_P.new_empty(len(logits_CV))
        for part in _blocks(logits_CV):
            losses_C[part] = self._losses(logits_CV[part], slice(start + part.start, start + part.stop), want_gradient)
        return Found(losses_C, logits_CV)

    def _losses(self, logits_BV: Tensor, positions: slice, want_gradient: bool) -> Tensor:
        scales_B = self.scales_P[positions]
        is_read_B = scales_B != 0
        token_ids_B1 = torch.where(is_read_B, self.token_ids_P[positions].long(), 0)[:, None]
        log_q_BV = _log_softmax(logits_BV, 1.0)
        logprobs_B = log_q_BV.gather(1, token_ids_B1)[:, 0].double()
        if self.logprobs_P is not None:
            self.logprobs_P[positions] = logprobs_B
        if self.tops_P is not None:
            self.tops_P[positions] = logits_BV.argmax(dim=1)
        if want_gradient:
            gradient_BV = log_q_BV.exp_()
            gradient_BV.scatter_add_(1, token_ids_B1, -torch.ones_like(token_ids_B1, dtype=gradient_BV.dtype))
            gradient_BV.mul_(scales_B.to(gradient_BV.dtype)[:, None]).masked_fill_(~is_read_B[:, None], 0.0)
            logits_BV.copy_(gradient_BV)
        return torch.where(is_read_B, -logprobs_B * scales_B, 0.0)


def _log_softmax(logits_BV: Tensor, temperature: float) -> Tensor:
    """Of the logits over T; float64 for float64, else float32."""
    working_BV = logits_BV if logits_BV.dtype == torch.float64 else logits_BV.float()
    return (working_BV if temperature == 1 else working_BV / temperature).log_softmax(dim=1)


def _blocks(logits_CV: Tensor) -> Iterator[slice]:
    at_a_time = _CPU_LOGITS if logits_CV.device.type == "cpu" else _DEVICE_LOGITS
    width = max(1, at_a_time // max(logits_CV.shape[1], 1))
    for start in range(0, len(logits_CV), width):
        yield slice(start, min(start + width, len(logits_CV)))
