"""From a chunk's logits to what any selection keeps of them, where the logits are. `select_reference` is the definition.

On a CPU the entries and sums come from numba kernels; elsewhere from torch operations of fixed shapes, so that the host never
waits, over a few positions at a time.

Shape letters: C positions of a chunk, V vocabulary, K columns, H columns of exact entries, D draws, S scalars, T temperatures.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kdcache.format.manifest import SelectionInfo
from kdcache.format.record import PADDING_ID
from kdcache.teacher import _draw_numba, _draw_torch, _topk_numba
from kdcache.teacher._topk_torch import MAX_ELEMENTS, bits_of, select_top_k
from kdcache.teacher.found import Layout, layout_of
from kdcache.teacher.uniforms import uniforms_of


class Selected(NamedTuple):
    """What was found at C positions; see `found.Found.from_padded`. NaN in a logprob or scalar where the model gave NaN.

    Attributes:
        token_ids_CK: int32; exact entries, then estimates, then anything.
        logprobs_CK: float32, nats.
        target_logprobs_C: float32, nats; means nothing where there is no target.
        counts_C2: int32, exact and all entries; (C, 0) where all K are exact.
        scalars_CS: float32.
    """

    token_ids_CK: Tensor
    logprobs_CK: Tensor
    target_logprobs_C: Tensor
    counts_C2: Tensor
    scalars_CS: Tensor


@dataclass(frozen=True)
class Selector:
    """A selection over a vocabulary, ready to be made chunk by chunk."""

    selection: SelectionInfo
    vocab_size: int

    @cached_property
    def layout(self) -> Layout:
        """Of what is found at a position."""
        return layout_of(self.selection, self.vocab_size)

    @property
    def seed(self) -> int | None:
        """Of the draws; None where there are none."""
        return self.selection.params.get("seed")

    def select(self, logits_CV: Tensor, targets_C: Tensor, states_C: Tensor) -> Selected:
        """Select.

        Args:
            logits_CV: any floating dtype; not changed.
            targets_C: int64 on the same device; negative where there is no target.
            states_C: int64, the bits of `uniforms.position_states`, on the same device; not looked at without a seed.

        Raises:
            ValueError: logits over another vocabulary.
        """
        if logits_CV.shape[-1] != self.vocab_size:
            raise ValueError(f"logits of {logits_CV.shape[-1]} tokens, but the vocabulary has {self.vocab_size}")
        layout, kind = self.layout, self.selection.kind
        if kind == "top_k" and not layout.num_scalars and not self.selection.filters:
            found, none = select_top_k(logits_CV, targets_C, layout.num_columns), logits_CV.new_empty((len(logits_CV), 0))
            return Selected(*found, none.int(), none.float())
        on_host = logits_CV.device.type == "cpu"
        parts = [
            (self._on_cpu if on_host else self.on_device)(self._filtered(logits_CV[rows]), targets_C[rows], states_C[rows])
            for rows in self._parts(len(logits_CV), on_host and not self.selection.filters)
        ]
        return parts[0] if len(parts) == 1 else Selected(*map(torch.cat, zip(*parts, strict=True)))

    def _parts(self, num_rows: int, at_once: bool) -> Iterator[slice]:
        """Rows at a time, so that what is made of them stays small."""
        widest = max(self.vocab_size, self.selection.params.get("num_draws", 0))
        size = num_rows if at_once else max(1, MAX_ELEMENTS // widest)
        return (slice(start, start + size) for start in range(0, num_rows, max(1, size)))

    def _filtered(self, logits_CV: Tensor) -> Tensor:
        filters = self.selection.filters
        return _draw_torch.apply_filters(logits_CV.float(), filters) if filters else logits_CV

    def _head_columns(self) -> int:
        """Columns in which exact entries may be; at least one."""
        params, kind = self.selection.params, self.selection.kind
        return self.layout.num_columns if kind == "threshold" else min(params.get("k", 1), self.vocab_size)

    def _on_cpu(self, logits_CV: Tensor, targets_C: Tensor, states_C: Tensor) -> Selected:
        bits_CV, num_threads, params = bits_of(logits_CV), torch.get_num_threads(), self.selection.params
        num_heads, num_columns = self._head_columns(), self.layout.num_columns
        top = _topk_numba.select_top_k(bits_CV, targets_C.numpy(), num_heads, num_threads=num_threads)
        heads_CH, head_logprobs_CH, target_logprobs_C, log_z_C = top
        ids_CK = np.full((len(bits_CV), num_columns), PADDING_ID, np.int32)
        logprobs_CK = np.full(ids_CK.shape, np.nan, np.float32)
        ids_CK[:, :num_heads], logprobs_CK[:, :num_heads] = heads_CH[:, :num_columns], head_logprobs_CH[:, :num_columns]
        counts_C2 = np.repeat(self._num_exact(torch.from_numpy(head_logprobs_CH)).numpy()[:, None], 2, axis=1)
        scalars_CS = np.empty((len(bits_CV), self.layout.num_scalars), np.float32)
        tops_C = np.take_along_axis(bits_CV, heads_CH[:, :1].astype(np.int64), axis=-1)
        tops_C = (tops_C.astype(np.int32) << _topk_numba.shift_of(bits_CV)).view(np.float32)[:, 0]
        uniforms_CD = np.sort(uniforms_of(states_C.numpy().view(np.uint64), self._num_uniforms()), axis=-1)
        inverse_T = 1.0 / np.array(self.selection.temperatures, np.float64)
        tau, is_ragged = float(params.get("tau", 0.0)), self.layout.is_ragged
        options = (tau, self.selection.kind == "top_k_sampled", is_ragged, self.selection.entropy, inverse_T)
        found = (ids_CK, logprobs_CK, counts_C2, scalars_CS)

        def work(rows: slice) -> None:
            known = (tops_C[rows], log_z_C[rows], uniforms_CD[rows])
            _draw_numba.draw_rows(bits_CV[rows], known, options, tuple(array[rows] for array in found))

        _topk_numba.in_parts(work, len(bits_CV), num_threads)
        counts_C2 = counts_C2 if is_ragged else counts_C2[:, :0]
        arrays = (ids_CK, logprobs_CK, target_logprobs_C, counts_C2, scalars_CS)
        return Selected(*map(torch.from_numpy, arrays))

    def _num_uniforms(self) -> int:
        if self.seed is None:
            return 0
        return 1 if self.selection.kind == "threshold" else self.selection.params["num_draws"]

    def _num_exact(self, logprobs_CH: Tensor) -> Tensor:
        """(C,) int32 exact entries, of the most probable tokens' logprobs."""
        params, kind = self.selection.params, self.selection.kind
        if kind == "threshold":
            return (logprobs_CH >= math.log(params["tau"])).sum(dim=-1, dtype=torch.int32)
        if kind == "top_p_k":
            short_CH = logprobs_CH.double().exp().cumsum(dim=-1) < params["p"]
            return (1 + short_CH.sum(dim=-1, dtype=torch.int32)).clamp_max(logprobs_CH.shape[1])
        fixed = 0 if kind == "sampled" else logprobs_CH.shape[1]
        return torch.full(logprobs_CH.shape[:1], fixed, dtype=torch.int32, device=logprobs_CH.device)

    def on_device(self, logits_CV: Tensor, targets_C: Tensor, states_C: Tensor) -> Selected:
        """`select` by torch operations, on any device: no shape depends on a value, so the host does not wait."""
        kind, num_columns = self.selection.kind, self.layout.num_columns
        heads_CH = logits_CV.topk(self._head_columns(), dim=-1).indices
        # Less the maximum first: a logit of 100 less its normaliser would be good to 1e-5 only.
        logprobs_CV = logits_CV.log_softmax(dim=-1, dtype=torch.float32)
        head_logprobs_CH = logprobs_CV.gather(-1, heads_CH)
        num_exact_C = self._num_exact(head_logprobs_CH)
        scalars = _draw_torch.spread(logprobs_CV, self.selection)
        target_logprobs_C = logprobs_CV.gather(-1, targets_C.clamp_min(0)[:, None])[:, 0]
        cumulative = _draw_torch.Cumulative.of(_draw_torch.rest_of(logprobs_CV, heads_CH, num_exact_C))
        del logprobs_CV
        entries = _draw_torch.Entries(heads_CH, head_logprobs_CH, num_exact_C)
        if self.seed is not None:
            drawn = _draw_torch.draw(cumulative, self.selection, states_C, num_columns)
            entries = _draw_torch.join(entries, drawn, num_columns)
        if self.layout.is_ragged:
            tail_C1 = cumulative.totals_C1 if kind != "sampled" else cumulative.totals_C1 * 0 + 1
            scalars = [tail_C1.float(), *scalars]
        counts_C2 = torch.stack([num_exact_C, entries.num_C.int()], dim=-1)
        return Selected(
            entries.ids_CK.int(),
            entries.logprobs_CK,
            target_logprobs_C,
            counts_C2 if self.layout.is_ragged else counts_C2[:, :0],
            torch.cat([head_logprobs_CH[:, :0], *scalars], dim=-1),
        )
