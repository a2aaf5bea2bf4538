"""Students cut from their teacher.

- `cut` does it all; `layers` and `width` say what is kept: pure functions of numbers that `measure` takes from the teacher.
- `shape` makes the configuration of a model with fewer layers, `build` the model; `narrow` makes its layers less wide.
- `proof` compares a student of some layers with the teacher that skips the others, on a few tokens.
- `from_teacher` loads the teacher, `texts` finds what it is measured on, `report` says in numbers what was cut.
- `initial` is for training runs and `standalone` for `kdcache student`; `folder` writes what they leave.
"""
