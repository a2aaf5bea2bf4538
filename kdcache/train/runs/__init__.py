"""A run's folder: checkpoints, digests, and what resuming needs."""
