"""Caches for trainers of drafters: files in the layouts of speculators and SpecForge, or shards read in place."""
