"""What is right and wrong with a cache: probes of its numbers, and comparisons with a live teacher."""
