"""Which sequences share a packed row, and which rows a batch."""
