"""Tokenizers, chat templates, and which tokens of a rendered chat are whose."""
