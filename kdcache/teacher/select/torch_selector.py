"""From a chunk's logits to what any selection keeps of them, on the device that holds the logits.

The definition is `reference.select_reference`. On a CPU the entries and sums come from numba kernels; elsewhere from torch
operations of fixed shapes, so that the host never waits, over a few positions at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from kdcache.format.manifest import SelectionInfo
from kdcache.format.record import PADDING_ID
from kdcache.teacher.select import _numba_draws, _numba_topk, _torch_draws
from kdcache.teacher.select._torch_topk import MAX_ELEMENTS, bits_of, select_top_k
from kdcache.teacher.select.exact_weights import MIN_LOGPROB, STRIP
from kdcache.teacher.select.found import Layout, Selected, layout_of
from kdcache.teacher.select.uniforms import uniforms_of


@dataclass(frozen=True)
class Selector:
    """A selection over a vocabulary, to be made chunk by chunk."""

    selection: SelectionInfo
    vocab_size: int

    @cached_property
    def layout(self) -> Layout:
        """The layout of what is found at a position."""
        return layout_of(self.selection, self.vocab_size)

    @property
    def seed(self) -> int | None:
        """The seed of the draws; None where nothing is drawn."""
        return self.selection.params.get("seed")

    def select(self, logits_CV: Tensor, target_ids_C: Tensor, states_C: Tensor) -> Selected[Tensor]:
        """Select at every position of a chunk.

        Args:
            logits_CV: any floating dtype; not changed.
            target_ids_C: int64 on the same device; negative where nothing follows.
            states_C: int64, the bits of `uniforms.position_states`, on the same device; unused without a seed.

        Raises:
            ValueError: logits over another vocabulary.
        """
        if logits_CV.shape[-1] != self.vocab_size:
            raise ValueError(f"logits of {logits_CV.shape[-1]} tokens, but the vocabulary has {self.vocab_size}")
        layout, kind = self.layout, self.selection.kind
        if kind == "top_k" and not layout.num_scalars and not self.selection.filters:
            return select_top_k(logits_CV, target_ids_C, layout.num_columns)
        on_host = logits_CV.device.type == "cpu"
        parts = [
            (self._on_cpu if on_host else self.on_device)(self._filtered(logits_CV[part]), target_ids_C[part], states_C[part])
            for part in self._parts(len(logits_CV), on_host and not self.selection.filters)
        ]
        return parts[0] if len(parts) == 1 else Selected(*map(torch.cat, zip(*parts, strict=True)))

    def _parts(self, num_positions: int, at_once: bool) -> Iterator[slice]:
        """Positions at a time, so that what is made of them stays small."""
        widest = max(self.vocab_size, STRIP * self.selection.params.get("num_draws", 0))
        size = num_positions if at_once else max(1, MAX_ELEMENTS // widest)
        return (slice(start, start + size) for start in range(0, num_positions, max(1, size)))

    def _filtered(self, logits_CV: Tensor) -> Tensor:
        filters = self.selection.filters
        return _torch_draws.apply_filters(logits_CV.float(), filters) if filters else logits_CV

    def _head_columns(self) -> int:
        """How many columns may hold exact entries; at least one."""
        params, kind = self.selection.params, self.selection.kind
        return self.layout.num_columns if kind == "threshold" else min(params.get("k", 1), self.vocab_size)

    def _on_cpu(self, logits_CV: Tensor, target_ids_C: Tensor, states_C: Tensor) -> Selected[Tensor]:
        bits_CV, num_threads, params = bits_of(logits_CV), torch.get_num_threads(), self.selection.params
        num_heads, num_columns, is_ragged = self._head_columns(), self.layout.num_columns, self.layout.is_ragged
        num_found = min(num_heads + 1, self.vocab_size) if self.selection.kind == "top_k_sampled" else num_heads
        top = _numba_topk.select_top_k(bits_CV, target_ids_C.numpy(), num_found, num_threads=num_threads)
        heads_CK, head_logprobs_CK, target_logprobs_C, log_z_C = top
        ids_CK = np.full((len(bits_CV), num_columns), PADDING_ID, np.int32)
        logprobs_CK = np.full(ids_CK.shape, np.nan, np.float32)
        kept = slice(min(num_heads, num_columns))
        ids_CK[:, kept], logprobs_CK[:, kept] = heads_CK[:, kept], head_logprobs_CK[:, kept]
        counts_C2 = np.full((len(bits_CV), 2), 0 if self.selection.kind == "sampled" else num_heads, np.int32)
        scalars = np.empty((len(bits_CV), self.layout.num_scalars), np.float32)
        ends_C2 = np.take_along_axis(bits_CV, heads_CK[:, [0, num_found - 1]].astype(np.int64), axis=-1)
        ends_C2 = (ends_C2.astype(np.int32) << _numba_topk.shift_of(bits_CV)).view(np.float32)
        has_rest_C = (num_found > num_heads) & np.isfinite(ends_C2[:, 1])
        references_C = np.where(has_rest_C, ends_C2[:, 1], ends_C2[:, 0])
        uniforms = np.sort(uniforms_of(states_C.numpy().view(np.uint64), self._num_uniforms()), axis=-1)
        inverse_temperatures = 1.0 / np.array(self.selection.temperatures, np.float64)
        mass = (float(params.get("tau", 0.0)), float(params.get("p", 0.0)))
        settings = (*mass, self.selection.kind == "top_k_sampled", is_ragged, self.selection.entropy, inverse_temperatures)
        found = (ids_CK, logprobs_CK, counts_C2, scalars)

        def work(part: slice) -> None:
            known = (ends_C2[part, 0], references_C[part], log_z_C[part], uniforms[part])
            _numba_draws.draw_positions(bits_CV[part], known, settings, tuple(array[part] for array in found))

        _numba_topk.in_parts(work, len(bits_CV), num_threads)
        counts_C2 = counts_C2 if is_ragged else counts_C2[:, :0]
        arrays = (ids_CK, logprobs_CK, target_logprobs_C, counts_C2, scalars)
        return Selected(*map(torch.from_numpy, arrays))

    def _num_uniforms(self) -> int:
        if self.seed is None:
            return 0
        return 1 if self.selection.kind == "threshold" else self.selection.params["num_draws"]

    def _num_exact(self, weights_CK: Tensor, total_units_C1: Tensor) -> Tensor:
        """(C,) int32: how many entries are exact, from the most probable tokens' weights and the total in units."""
        params, kind, units_CK = self.selection.params, self.selection.kind, _torch_draws.units_of(weights_CK)
        if kind == "threshold":
            is_exact_CK = units_CK.double() >= params["tau"] * total_units_C1.double()
            return is_exact_CK.int().cumprod(dim=-1).sum(dim=-1, dtype=torch.int32)
        if kind == "top_p_k":
            short_CK = units_CK.cumsum(dim=-1).double() < params["p"] * total_units_C1.double()
            return (1 + short_CK.sum(dim=-1, dtype=torch.int32)).clamp_max(weights_CK.shape[1])
        fixed = 0 if kind == "sampled" else weights_CK.shape[1]
        return torch.full(weights_CK.shape[:1], fixed, dtype=torch.int32, device=weights_CK.device)

    def on_device(self, logits_CV: Tensor, target_ids_C: Tensor, states_C: Tensor) -> Selected[Tensor]:
        """`select` by torch operations, on any device. No shape depends on a value, so the host does not wait."""
        kind, num_columns, num_heads = self.selection.kind, self.layout.num_columns, self._head_columns()
        num_found = min(num_heads + 1, self.vocab_size) if kind == "top_k_sampled" else num_heads
        found_CK = logits_CV.topk(num_found, dim=-1).indices
        heads_CK = found_CK[:, :num_heads]
        # Subtracts the maximum first: a logit of 100 minus its normaliser would be good to 1e-5 only.
        logprobs_CV = logits_CV.log_softmax(dim=-1, dtype=torch.float32)
        found_logprobs_CK = logprobs_CV.gather(-1, found_CK)
        scalars = _torch_draws.spread(logprobs_CV, self.selection)
        target_logprobs_C = logprobs_CV.gather(-1, target_ids_C.clamp_min(0)[:, None])[:, 0]
        del logprobs_CV
        num_exact_C = torch.full_like(heads_CK[:, 0], num_heads, dtype=torch.int32)
        entries = _torch_draws.Entries(heads_CK, found_logprobs_CK[:, :num_heads], num_exact_C)
        if self.layout.is_ragged:
            # Relative to the largest that can be drawn: the one after the exact entries, if it is known how many there are.
            is_after = num_found > num_heads
            tops_C1, edges_C1 = (logits_CV.gather(-1, found_CK[:, at]).float() for at in (slice(1), slice(-1, None)))
            has_rest_C1 = edges_C1.isfinite() & is_after
            reference_C1 = torch.where(has_rest_C1, edges_C1, tops_C1)
            above_C1 = torch.where(has_rest_C1, found_logprobs_CK[:, -1:], found_logprobs_CK[:, :1])
            weights_CV = _torch_draws.weights_of(logits_CV, reference_C1)
            total_units_C1 = _torch_draws.units_of(_torch_draws.sum_strips(weights_CV)).sum(dim=-1, keepdim=True)
            num_exact_C = self._num_exact(weights_CV.gather(-1, heads_CK), total_units_C1)
            rest_CV = _torch_draws.rest_of(weights_CV, heads_CK, num_exact_C)
            rest_CV.masked_fill_(reference_C1 - tops_C1 <= MIN_LOGPROB, 0.0)
            cumulative = _torch_draws.Cumulative.of(rest_CV, above_C1)
            entries = entries._replace(num_C=num_exact_C)
            if self.seed is not None:
                drawn = _torch_draws.draw(cumulative, total_units_C1, self.selection, states_C, num_columns)
                entries = _torch_draws.join(entries, drawn, num_columns)
            mass_C1 = cumulative.mass_C1 if kind != "sampled" else cumulative.mass_C1 * 0 + 1
            scalars = [mass_C1.float(), *scalars]
        counts_C2 = torch.stack([num_exact_C, entries.num_C.int()], dim=-1)
        return Selected(
            entries.ids_CK.int(),
            entries.logprobs_CK,
            target_logprobs_C,
            counts_C2 if self.layout.is_ragged else counts_C2[:, :0],
            torch.cat([found_logprobs_CK[:, :0], *scalars], dim=-1),
        )
