"""How good a student is: held-out text, scores, comparisons with intervals."""
