"""Everything that a finding may tell a user to do, in one table: a test follows each line of it.

A repair that is not here is refused when the finding is made; flags in sentences are compared with it by the tests.
"""

from __future__ import annotations

from collections.abc import Mapping

TEACHER = "--teacher MODEL"

ADVICE: Mapping[str, tuple[str, ...]] = {
    "alignment_unclear": (TEACHER,),
    "broken_tails": ("--repair tails", "--config FILE"),
    "displaced_entries": ("--repair k+1",),
    "duplicate_ids": ("--repair duplicates",),
    "few_hits": (TEACHER,),
    "foreign_positions": (TEACHER,),
    "foreign_sequences": (TEACHER,),
    "ids_outside_vocabulary": ("--vocab-size V",),
    "k_plus_1_entries": ("--repair k+1",),
    "many_hits": (TEACHER,),
    "named_logits": ("--values logprobs",),
    "negated_logprobs": ("--values nll",),
    "no_tokens": ("--column tokens=NAME", "--tokenizer NAME"),
    "other_logarithms": (TEACHER,),
    "padding": ("--column attention_mask=NAME",),
    "padded_vocabulary_ids": ("--vocab-size V",),
    "probabilities": ("--values probs",),
    "shifted_positions": ("--shift -1", "--shift +1"),
    "temperature_applied": (TEACHER,),
    "wrong_config": ("--config FILE",),
}
"""Finding -> what its sentence or its repair may name, as a user writes it but for NAME, FILE, MODEL and V. What is undecided
may be taken on trust by `--accept` besides."""
