"""From a config to a cache: inputs are planned as units, and each unit becomes a shard with what the teacher says."""
