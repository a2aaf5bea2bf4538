"""From a chunk of logits to what a record keeps: one definition, and the same on GPU and CPU.

- `reference` is the definition of every selection, `uniforms` its random numbers, `exact_weights` what decides a draw.
- `torch_selector` makes any selection of a chunk where the logits are; `torch_answers` draws the next token of an answer.
- `_torch_topk` and `_torch_draws` do it with torch operations; `_numba_topk` and `_numba_draws` on a CPU, in the vectors of
  `_numba_blocks` and `_numba_vectors`.
- `found` holds what was found, padded and ragged, and makes the record of it.
"""
