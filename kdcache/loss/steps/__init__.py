"""From some positions' logits to their losses and gradients: one step per backend, with the same interface."""
