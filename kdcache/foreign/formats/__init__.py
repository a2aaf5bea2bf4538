"""Readers of the caches that other projects write, one format per file."""
