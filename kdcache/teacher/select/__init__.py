"""From a chunk of logits to what a record keeps: one definition, and the same on GPU and CPU."""
