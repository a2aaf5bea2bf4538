"""Caches made from caches, without asking a teacher: `run.derive` does it; the other modules are its operations."""
