"""Sequences of a record batch: decoded one by one, or as addresses for compiled loops; digests checked on every read."""
