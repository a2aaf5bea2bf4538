"""Read object stores by byte ranges, and keep blocks of what was read."""
