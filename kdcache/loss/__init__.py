"""Torch losses on top of the kernels: `sparse_kd` over given logits, `fused` with the student's output projection."""
