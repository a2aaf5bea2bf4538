"""Fewer entries per position: exact cuts and random draws."""
