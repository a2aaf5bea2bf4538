"""Students cut from their teacher.

- `layers` says which layers are kept: pure functions of numbers.
- `shape` makes the configuration of a model with fewer layers.
- `cut` builds the student and copies the weights; `proof` compares it with the teacher on a few tokens.
"""
