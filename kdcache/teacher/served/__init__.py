"""Teachers behind a URL."""
