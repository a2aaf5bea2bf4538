"""Teachers run by transformers."""
