"""The random selections, scalars and samplers' filters in torch operations whose shapes depend on no value.

A point's token is found in two steps: its block by the blocks' sums in float64, then the token by the block's cumulative sum in
float32, so that a token of 1e-9 is not lost in rounding.

Shape letters: C positions, V vocabulary, K entries (padded), H columns of exact entries, D draws, L points, N blocks, W tokens
of a block, X = N x W.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kdcache.format.manifest import SelectionInfo
from kdcache.teacher.select_reference import MIN_LOGPROB
from kdcache.teacher.uniforms import GOLDEN, MIX_1, MIX_2

BLOCK = 512
"""W: about the square root of a vocabulary, so that neither search is long."""


class Entries(NamedTuple):
    """(C, K) int64 ids, (C, K) float32 logprobs, of which the first num_C of a row count."""

    ids_CK: Tensor
    logprobs_CK: Tensor
    num_C: Tensor


def uniforms_of(states_C: Tensor, num_draws: int) -> Tensor:
    """(C, D) float64, bit for bit `uniforms.uniforms_of` of the states, given as int64."""
    draws_D = torch.arange(1, num_draws + 1, device=states_C.device)
    words_CD = _mix64(states_C[:, None] + _signed(GOLDEN) * draws_D)
    return _shifted(words_CD, 11).double() * 2.0**-53


def _mix64(x: Tensor) -> Tensor:
    x = (x ^ _shifted(x, 30)) * _signed(MIX_1)
    x = (x ^ _shifted(x, 27)) * _signed(MIX_2)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Shifted right with zeros, of int64, whose own shift repeats the sign."""
    return (x >> bits) & (2 ** (64 - bits) - 1)


def _signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word


def spread(logprobs_CV: Tensor, selection: SelectionInfo) -> list[Tensor]:
    """(C, 1) each: the entropy, if it is kept, and the normalisers at further temperatures."""
    columns = [(logprobs_CV / t).logsumexp(dim=-1, keepdim=True) for t in selection.temperatures]
    if selection.entropy:
        # Not -inf x 0; the exp is 0 long before.
        terms_CV = logprobs_CV.exp().mul_(logprobs_CV.clamp_min(-1000.0))
        columns.insert(0, -terms_CV.sum(dim=-1, keepdim=True))
    return columns


def rest_of(logprobs_CV: Tensor, heads_CH: Tensor, num_exact_C: Tensor) -> Tensor:
    """(C, V) probabilities, 0 for exact entries: the first num_exact_C of a row of heads_CH."""
    rest_CV = logprobs_CV.exp().masked_fill_(logprobs_CV <= MIN_LOGPROB, 0.0)
    is_exact_CH = torch.arange(heads_CH.shape[1], device=heads_CH.device) < num_exact_C[:, None]
    return rest_CV.scatter_(-1, heads_CH, rest_CV.gather(-1, heads_CH).masked_fill_(is_exact_CH, 0.0))


class Cumulative(NamedTuple):
    """Weights as two levels of cumulative sums.

    Attributes:
        weights_CV: float32.
        edges_CX: float32, (C, N x W): cumulative sums within blocks.
        sums_CN: float64, cumulative sums of blocks.
    """

    weights_CV: Tensor
    edges_CX: Tensor
    sums_CN: Tensor

    @classmethod
    def of(cls, weights_CV: Tensor) -> Cumulative:
        """Of weights >= 0."""
        padded_CX = torch.nn.functional.pad(weights_CV, (0, -weights_CV.shape[1] % BLOCK))
        edges_CNW = padded_CX.view(len(weights_CV), -1, BLOCK).cumsum(dim=-1)
        return cls(weights_CV, edges_CNW.flatten(1), edges_CNW[..., -1].double().cumsum(dim=-1))

    @property
    def totals_C1(self) -> Tensor:
        """(C, 1) float64."""
        return self.sums_CN[:, -1:]

    def find(self, points_CL: Tensor) -> Tensor:
        """(C, L) int64: the token in whose stretch of the cumulative sum each point lies."""
        points_CL = torch.minimum(points_CL, _just_below(self.totals_C1))
        blocks_CL = torch.searchsorted(self.sums_CN, points_CL, right=True).clamp_max_(self.sums_CN.shape[1] - 1)
        before_CL = torch.nn.functional.pad(self.sums_CN, (1, 0)).gather(-1, blocks_CL)
        starts_CL = blocks_CL * BLOCK
        # A block's sum in float64 and its last edge are the same number, but what is left of a point is rounded once more.
        left_CL = torch.minimum((points_CL - before_CL).float(), _just_below(self.edges_CX.gather(-1, starts_CL + BLOCK - 1)))
        step, found_CL = BLOCK // 2, starts_CL
        while step:
            found_CL = found_CL + step * (self.edges_CX.gather(-1, found_CL + step - 1) <= left_CL)
            step //= 2
        return found_CL.clamp_max(self.weights_CV.shape[1] - 1)


def _just_below(x: Tensor) -> Tensor:
    return torch.nextafter(x, torch.zeros_like(x))


def draw(cumulative: Cumulative, selection: SelectionInfo, states_C: Tensor, num_columns: int) -> Entries:
    """The estimates of a random kind, by falling count, then rising id; see `select_reference`."""
    totals_C1, params = cumulative.totals_C1, selection.params
    if selection.kind == "threshold":
        numbers_L = torch.arange(num_columns, device=states_C.device)
        points_CL = (numbers_L + uniforms_of(states_C, 1)) * params["tau"]
        log_unit_C1 = torch.full_like(totals_C1, math.log(params["tau"]))
    else:
        points_CL = uniforms_of(states_C, params["num_draws"]).sort(dim=-1).values * totals_C1
        mass_C1 = totals_C1 if selection.kind == "top_k_sampled" else torch.ones_like(totals_C1)
        log_unit_C1 = mass_C1.log() - math.log(params["num_draws"])
    ids_CL = cumulative.find(points_CL)
    # A parallel sum may put an edge before a token of weight 0.
    is_drawn_CL = (points_CL < totals_C1) & (cumulative.weights_CV.gather(-1, ids_CL) > 0)
    entries = _counted(ids_CL, is_drawn_CL, log_unit_C1, cumulative.weights_CV.shape[1])
    # One point each, or two by rounding where p is nearly tau.
    return entries._replace(logprobs_CK=log_unit_C1.expand_as(ids_CL).float()) if selection.kind == "threshold" else entries


def _counted(ids_CL: Tensor, is_drawn_CL: Tensor, log_unit_C1: Tensor, vocab_size: int) -> Entries:
    """Distinct ids of rising ones, with log_unit + log(count)."""
    num_points = ids_CL.shape[1]
    is_first_CL = is_drawn_CL & (torch.diff(ids_CL, prepend=ids_CL[:, :1] - 1) > 0)
    runs_CL = (is_first_CL.cumsum(dim=-1) - 1).clamp_min(0)
    counts_CL = torch.zeros_like(ids_CL).scatter_add_(-1, runs_CL, is_drawn_CL.long()).gather(-1, runs_CL)
    # One number that orders by falling count, then rising id; those that do not count come last.
    keys_CL = torch.where(is_first_CL, (num_points - counts_CL) * vocab_size + ids_CL, (num_points + 1) * vocab_size)
    keys_CL = keys_CL.sort(dim=-1).values
    counts_CL = (num_points - keys_CL // vocab_size).clamp_min(1)
    return Entries(keys_CL % vocab_size, (log_unit_C1 + counts_CL.log()).float(), is_first_CL.sum(dim=-1))


def join(exact: Entries, estimates: Entries, num_columns: int) -> Entries:
    """Exact entries, then estimates, in one row of columns."""
    columns_K = torch.arange(num_columns, device=exact.num_C.device)
    num_exact_C1, room = exact.num_C[:, None], estimates.ids_CK.shape[1] - 1
    behind_CK = exact.ids_CK.shape[1] + (columns_K - num_exact_C1).clamp(0, room)
    index_CK = torch.where(columns_K < num_exact_C1, columns_K, behind_CK)
    num_C = torch.minimum(exact.num_C + estimates.num_C, torch.full_like(exact.num_C, num_columns))
    return Entries(
        torch.cat([exact.ids_CK, estimates.ids_CK], dim=-1).gather(-1, index_CK),
        torch.cat([exact.logprobs_CK, estimates.logprobs_CK], dim=-1).gather(-1, index_CK),
        num_C,
    )


def apply_filters(logits_CV: Tensor, filters: dict[str, float]) -> Tensor:
    """Float32 logits as a sampler draws from them; `select_reference.filter_reference` is the definition."""
    logits_CV = logits_CV / filters.get("temperature", 1.0)
    if filters.get("min_p", 0.0) > 0:
        least_C1 = logits_CV.amax(dim=-1, keepdim=True) + math.log(filters["min_p"])
        logits_CV = logits_CV.masked_fill(logits_CV < least_C1, -torch.inf)
    k = int(filters.get("top_k", 0))
    if 0 < k < logits_CV.shape[1]:
        logits_CV = logits_CV.masked_fill(logits_CV < logits_CV.topk(k, dim=-1).values[:, -1:], -torch.inf)
    if filters.get("top_p", 1.0) < 1:
        rising_CV, ids_CV = logits_CV.sort(dim=-1, stable=True)
        is_out_CV = rising_CV.softmax(dim=-1).cumsum(dim=-1) <= 1 - filters["top_p"]
        is_out_CV[:, -1] = False
        logits_CV = rising_CV.masked_fill_(is_out_CV, -torch.inf).gather(-1, ids_CV.argsort(dim=-1))
    return logits_CV
