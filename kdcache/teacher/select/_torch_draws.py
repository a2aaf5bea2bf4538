"""The random selections, scalars and samplers' filters in torch operations whose shapes depend on no value.

A point's token is found in two steps, its strip and then the token, in whole units: `exact_weights` says how, and that the
bits are those of every other backend.

Shape letters: C positions, V vocabulary, K entries (padded), H columns of exact entries, D draws, L points, G strips, W tokens
of a strip.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kdcache.format.manifest import SelectionInfo
from kdcache.teacher.select.exact_weights import COEFFICIENTS, LOG2_E, LOWEST_WEIGHT_EXPONENT, MAGIC, STRIP, UNITS
from kdcache.teacher.select.uniforms import GOLDEN, MIX_1, MIX_2


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


def weights_of(logits_CV: Tensor, reference_C1: Tensor) -> Tensor:
    """(C, V) float32, `exact_weights` relative to a float32 logit of each row. One operation a step: nothing is fused."""
    scaled_CV = logits_CV.float().sub(reference_C1).mul_(LOG2_E)
    t_CV = scaled_CV + MAGIC
    f_CV = scaled_CV.sub_(t_CV - MAGIC)
    weights_CV = f_CV * COEFFICIENTS[0]
    for coefficient in COEFFICIENTS[1:-1]:
        weights_CV.add_(coefficient).mul_(f_CV)
    weights_CV.add_(COEFFICIENTS[-1])
    del scaled_CV, f_CV
    is_none_CV = t_CV < MAGIC + LOWEST_WEIGHT_EXPONENT
    return weights_CV.mul_(t_CV.view(torch.int32).bitwise_left_shift_(23).view(torch.float32)).masked_fill_(is_none_CV, 0.0)


def sum_strips(weights_CV: Tensor) -> Tensor:
    """(C, G) float32, in the order of `exact_weights`."""
    parts_CGLW = _strips_of(weights_CV).unflatten(-1, (4, STRIP // 4))
    sums_CGW = (parts_CGLW[:, :, 0] + parts_CGLW[:, :, 1]) + (parts_CGLW[:, :, 2] + parts_CGLW[:, :, 3])
    while sums_CGW.shape[-1] > 1:
        half = sums_CGW.shape[-1] // 2
        sums_CGW = sums_CGW[..., :half] + sums_CGW[..., half:]
    return sums_CGW[..., 0]


def _strips_of(weights_CV: Tensor) -> Tensor:
    """(C, G, W), filled up with 0."""
    return torch.nn.functional.pad(weights_CV, (0, -weights_CV.shape[1] % STRIP)).unflatten(-1, (-1, STRIP))


def units_of(weights: Tensor) -> Tensor:
    """int64 of float32 weights or sums."""
    return (weights.double() * UNITS).long()


def rest_of(weights_CV: Tensor, heads_CH: Tensor, num_exact_C: Tensor) -> Tensor:
    """The weights with 0 for exact entries, the first num_exact_C of a row of heads_CH; in place."""
    is_exact_CH = torch.arange(heads_CH.shape[1], device=heads_CH.device) < num_exact_C[:, None]
    return weights_CV.scatter_(-1, heads_CH, weights_CV.gather(-1, heads_CH).masked_fill_(is_exact_CH, 0.0))


class Cumulative(NamedTuple):
    """Weights that can be drawn from.

    Attributes:
        weights_CGW: float32, in strips.
        edges_CG: int64, cumulative sums of strips.
        mass_C1: float64, their probability.
    """

    weights_CGW: Tensor
    edges_CG: Tensor
    mass_C1: Tensor

    @classmethod
    def of(cls, weights_CV: Tensor, above_C1: Tensor) -> Cumulative:
        """Of weights relative to a token whose logprob is given."""
        sums_CG = sum_strips(weights_CV)
        mass_C1 = sums_CG.sum(dim=-1, keepdim=True, dtype=torch.float64) * above_C1.double().exp()
        return cls(_strips_of(weights_CV), units_of(sums_CG).cumsum(dim=-1), mass_C1)

    @property
    def units_C1(self) -> Tensor:
        """(C, 1) int64, the sum."""
        return self.edges_CG[:, -1:]

    def find(self, points_CL: Tensor) -> tuple[Tensor, Tensor]:
        """(C, L) int64: the token in whose stretch of the cumulative sum each point lies; and whether it can be drawn."""
        strips_CL = torch.searchsorted(self.edges_CG, points_CL, right=True).clamp_max_(self.edges_CG.shape[1] - 1)
        left_CL = points_CL - torch.nn.functional.pad(self.edges_CG, (1, 0)).gather(-1, strips_CL)
        weights_CLW = self.weights_CGW.gather(1, strips_CL[..., None].expand(-1, -1, STRIP))
        is_behind_CLW = units_of(weights_CLW).cumsum(dim=-1) <= left_CL[..., None]
        places_W = torch.arange(STRIP, device=points_CL.device)
        # The strip's sum and the sum of its tokens differ by rounding.
        last_CL = ((weights_CLW > 0) * places_W).amax(dim=-1)
        places_CL = torch.minimum(is_behind_CLW.sum(dim=-1), last_CL)
        return strips_CL * STRIP + places_CL, weights_CLW.gather(-1, places_CL[..., None])[..., 0] > 0


def draw(
    cumulative: Cumulative, total_units_C1: Tensor, selection: SelectionInfo, states_C: Tensor, num_columns: int
) -> Entries:
    """The estimates of a random kind, by falling count, then rising id; see `select_reference`."""
    rest_C1, mass_C1, params = cumulative.units_C1, cumulative.mass_C1, selection.params
    if selection.kind == "threshold":
        numbers_L = torch.arange(num_columns, device=states_C.device)
        points_CL = ((numbers_L + uniforms_of(states_C, 1)) * (params["tau"] * total_units_C1.double())).long()
        log_unit_C1 = torch.full_like(mass_C1, math.log(params["tau"]))
    else:
        uniforms_CL = uniforms_of(states_C, params["num_draws"]).sort(dim=-1).values
        points_CL = torch.minimum((uniforms_CL * rest_C1.double()).long(), rest_C1 - 1)
        mass_C1 = mass_C1 if selection.kind == "top_k_sampled" else torch.ones_like(mass_C1)
        log_unit_C1 = mass_C1.log() - math.log(params["num_draws"])
    ids_CL, is_some_CL = cumulative.find(points_CL.clamp_min(0))
    entries = _counted(ids_CL, is_some_CL & (points_CL < rest_C1), log_unit_C1, cumulative.weights_CGW[0].numel())
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
