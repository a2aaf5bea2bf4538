"""Progress, meters, heartbeats and signals of a running capture."""
