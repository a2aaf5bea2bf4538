"""Arithmetic on arrays: one meaning (`reference`), several backends. README.md holds the decisions."""
