"""Reading object stores by byte ranges, and the blocks that are kept."""
