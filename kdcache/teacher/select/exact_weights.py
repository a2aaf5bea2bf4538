"""What decides a draw: weights that are the same bits on every processor, backend and device, counted as whole numbers.

The weight of a logit x is w = exp(x - m), m the largest that can be drawn, in float32 and in this order, every step rounded:

    s = (x - m) LOG2_E;  t = s + MAGIC;  f = s - (t - MAGIC);  w = 2^n (...((c0 f + c1) f + c2)... + c5)

with n from the last bits of t; 0 where n is below LOWEST_WEIGHT_EXPONENT. No step is fused with another, so processors without
fma agree. A vocabulary is cut into strips of STRIP tokens. A strip's sum is taken in float32 in one order: w_j + w_j+16 and
w_j+32 + w_j+48, then the two, then halves of the 16 that are left. Weights and strips' sums are cut to multiples of 1 / UNITS,
and everything after that is done in int64: cumulative sums are exact, in whatever order a GPU takes them.

A point is u times the sum, in float64, and cut. It lies in the first strip whose cumulative sum is above it, and there on the
first token whose own is; else on the strip's last token that has a weight, since a strip's sum and that of its tokens differ by
rounding. Whether a token has probability tau, and how many it takes to reach p, is asked of the same whole numbers.

What this costs: a weight below 1 / UNITS is never drawn, and 150,000 of them are 4e-8 of the largest one's mass.
"""

from __future__ import annotations

# 2^f = 1 + f p(f) for |f| <= 1/2, of least relative error (1e-7) for polynomials that are 1 at 0, found with Lawson's weights.
COEFFICIENTS = (1.326472717e-3, 9.671512642e-3, 5.550733743e-2, 2.402224209e-1, 6.931469776e-1, 1.0)
LOG2_E = 1.4426950408889634
MAGIC = 1.5 * 2**23 + 127
"""A float32 this large has no bits behind the point; the lowest ones are the biased exponent of 2^n."""

LOWEST_WEIGHT_EXPONENT = -100
STRIP = 64
UNITS = 2.0**42
"""Of the largest weight: 2^20 tokens of it still fit into int64."""

MIN_LOGPROB = -87.0
"""Tokens below e^-87 times the most probable one are never drawn."""
