"""The codec `archive`: entropy-coded entries, the smallest form."""
