"""The random selections, scalars and samplers' filters in torch operations whose shapes depend on no value.

The token of a point is found in two steps, first its strip and then the token, in whole units. `exact_weights` says how, and
why every backend gets the same bits.
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
    """(C, K) int64 ids and (C, K) float32 logprobs, of which the first num_C of a position are there."""

    ids_CK: Tensor
    logprobs_CK: Tensor
    num_C: Tensor


def uniforms_of(states_C: Tensor, num_draws: int) -> Tensor:
    """(C, num_draws) float64, bit for bit `uniforms.uniforms_of` of the states, which are given as int64."""
    draws = torch.arange(1, num_draws + 1, device=states_C.device)
    words = _mix64(states_C[:, None] + _signed(GOLDEN) * draws)
    return _shifted(words, 11).double() * 2.0**-53


def _mix64(x: Tensor) -> Tensor:
    x = (x ^ _shifted(x, 30)) * _signed(MIX_1)
    x = (x ^ _shifted(x, 27)) * _signed(MIX_2)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """An int64 shifted right with zeros; its own shift repeats the sign."""
    return (x >> bits) & (2 ** (64 - bits) - 1)


def _signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word


def spread(logprobs_CV: Tensor, selection: SelectionInfo) -> list[Tensor]:
    """(C, 1) each: the entropy, if it is kept, and the normalisers at further temperatures."""
    columns = [(logprobs_CV / t).logsumexp(dim=-1, keepdim=True) for t in selection.temperatures]
    if selection.entropy:
        # Avoids -inf x 0; the exp is 0 long before.
        terms_CV = logprobs_CV.exp().mul_(logprobs_CV.clamp_min(-1000.0))
        columns.insert(0, -terms_CV.sum(dim=-1, keepdim=True))
    return columns


def weights_of(logits_CV: Tensor, reference_C1: Tensor) -> Tensor:
    """(C, V) float32: `exact_weights` relative to a float32 logit of each position. One operation
    per step: nothing is fused."""
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
    """(C, strips) float32, added in the order of `exact_weights`."""
    parts = _strips_of(weights_CV).unflatten(-1, (4, STRIP // 4))
    sums = (parts[:, :, 0] + parts[:, :, 1]) + (parts[:, :, 2] + parts[:, :, 3])
    while sums.shape[-1] > 1:
        half = sums.shape[-1] // 2
        sums = sums[..., :half] + sums[..., half:]
    return sums[..., 0]


def _strips_of(weights_CV: Tensor) -> Tensor:
    """(C, strips, STRIP), padded with 0."""
    return torch.nn.functional.pad(weights_CV, (0, -weights_CV.shape[1] % STRIP)).unflatten(-1, (-1, STRIP))


def units_of(weights: Tensor) -> Tensor:
    """Float32 weights or sums as int64 units."""
    return (weights.double() * UNITS).long()


def rest_of(weights_CV: Tensor, heads_CK: Tensor, num_exact_C: Tensor) -> Tensor:
    """Set the weights of exact entries to 0, in place: of each position the first num_exact_C of heads_CK."""
    is_exact_CK = torch.arange(heads_CK.shape[1], device=heads_CK.device) < num_exact_C[:, None]
    return weights_CV.scatter_(-1, heads_CK, weights_CV.gather(-1, heads_CK).masked_fill_(is_exact_CK, 0.0))


class Cumulative(NamedTuple):
    """Weights to draw from.

    Attributes:
        strips: (C, strips, STRIP) float32, the weights.
        edges: (C, strips) int64, cumulative sums of strips.
        mass_C1: float64, the probability of all of them.
    """

    strips: Tensor
    edges: Tensor
    mass_C1: Tensor

    @classmethod
    def of(cls, weights_CV: Tensor, above_C1: Tensor) -> Cumulative:
        """Make it from weights relative to a token whose logprob is given."""
        strip_sums = sum_strips(weights_CV)
        mass_C1 = strip_sums.sum(dim=-1, keepdim=True, dtype=torch.float64) * above_C1.double().exp()
        return cls(_strips_of(weights_CV), units_of(strip_sums).cumsum(dim=-1), mass_C1)

    @property
    def units_C1(self) -> Tensor:
        """(C, 1) int64: the total."""
        return self.edges[:, -1:]

    def find(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Find for each of (C, any) points the token in whose stretch it lies, and whether that can be drawn."""
        strip_indices = torch.searchsorted(self.edges, points, right=True).clamp_max_(self.edges.shape[1] - 1)
        left = points - torch.nn.functional.pad(self.edges, (1, 0)).gather(-1, strip_indices)
        weights = self.strips.gather(1, strip_indices[..., None].expand(-1, -1, STRIP))
        is_before = units_of(weights).cumsum(dim=-1) <= left[..., None]
        offsets = torch.arange(STRIP, device=points.device)
        # Rounding makes the strip's sum differ from the sum of its tokens.
        last = ((weights > 0) * offsets).amax(dim=-1)
        found = torch.minimum(is_before.sum(dim=-1), last)
        return strip_indices * STRIP + found, weights.gather(-1, found[..., None])[..., 0] > 0


def draw(
    cumulative: Cumulative, total_units_C1: Tensor, selection: SelectionInfo, states_C: Tensor, num_columns: int
) -> Entries:
    """The estimates of a random kind, by falling count, then rising id; see `reference.select_reference`."""
    rest_C1, mass_C1, params = cumulative.units_C1, cumulative.mass_C1, selection.params
    if selection.kind == "threshold":
        indices = torch.arange(num_columns, device=states_C.device)
        points = ((indices + uniforms_of(states_C, 1)) * (params["tau"] * total_units_C1.double())).long()
        log_unit_C1 = torch.full_like(mass_C1, math.log(params["tau"]))
    else:
        uniforms = uniforms_of(states_C, params["num_draws"]).sort(dim=-1).values
        points = torch.minimum((uniforms * rest_C1.double()).long(), rest_C1 - 1)
        mass_C1 = mass_C1 if selection.kind == "top_k_sampled" else torch.ones_like(mass_C1)
        log_unit_C1 = mass_C1.log() - math.log(params["num_draws"])
    ids, is_some = cumulative.find(points.clamp_min(0))
    entries = _counted(ids, is_some & (points < rest_C1), log_unit_C1, cumulative.strips[0].numel())
    # One point per token; rounding may give two where p is nearly tau.
    return entries._replace(logprobs_CK=log_unit_C1.expand_as(ids).float()) if selection.kind == "threshold" else entries


def _counted(ids: Tensor, is_drawn: Tensor, log_unit_C1: Tensor, vocab_size: int) -> Entries:
    """The distinct ones of rising ids, with log_unit + log(count)."""
    num_points = ids.shape[1]
    is_first = is_drawn & (torch.diff(ids, prepend=ids[:, :1] - 1) > 0)
    runs = (is_first.cumsum(dim=-1) - 1).clamp_min(0)
    counts = torch.zeros_like(ids).scatter_add_(-1, runs, is_drawn.long()).gather(-1, runs)
    # One key orders by falling count, then rising id; those that do not count come last.
    keys = torch.where(is_first, (num_points - counts) * vocab_size + ids, (num_points + 1) * vocab_size)
    keys = keys.sort(dim=-1).values
    counts = (num_points - keys // vocab_size).clamp_min(1)
    return Entries(keys % vocab_size, (log_unit_C1 + counts.log()).float(), is_first.sum(dim=-1))


def join(exact: Entries, estimates: Entries, num_columns: int) -> Entries:
    """Exact entries, then estimates, in the same columns."""
    columns_K = torch.arange(num_columns, device=exact.num_C.device)
    num_exact_C1, room = exact.num_C[:, None], estimates.ids_CK.shape[1] - 1
    after_CK = exact.ids_CK.shape[1] + (columns_K - num_exact_C1).clamp(0, room)
    index_CK = torch.where(columns_K < num_exact_C1, columns_K, after_CK)
    num_C = torch.minimum(exact.num_C + estimates.num_C, torch.full_like(exact.num_C, num_columns))
    return Entries(
        torch.cat([exact.ids_CK, estimates.ids_CK], dim=-1).gather(-1, index_CK),
        torch.cat([exact.logprobs_CK, estimates.logprobs_CK], dim=-1).gather(-1, index_CK),
        num_C,
    )


def apply_filters(logits_CV: Tensor, filters: dict[str, float]) -> Tensor:
    """Float32 logits as a sampler draws from them; `reference.filter_reference` is the definition."""
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
