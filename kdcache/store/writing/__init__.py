"""Publishing: how a unit of records becomes a shard and a line of the manifest."""
