"""Readers of text, JSON, Parquet, Arrow and `datasets`, compressed or not."""
