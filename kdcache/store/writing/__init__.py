"""Publish units: how records become a shard and a line of the manifest."""
