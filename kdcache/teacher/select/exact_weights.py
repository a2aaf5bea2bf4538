"""What decides a draw: weights with the same bits on every processor, backend and device, counted as whole numbers.

The weight of a logit x is w = exp(x - m), where m is the largest that can be drawn, computed in float32 in this order, every
step rounded:

    s = (x - m) LOG2_E;  t = s + MAGIC;  f = s - (t - MAGIC);  w = 2^n (...((c0 f + c1) f + c2)... + c5)

with n from the last bits of t; w is 0 where n is below LOWEST_WEIGHT_EXPONENT. No step is fused
with another, so processors without fused multiply-add agree. A vocabulary is cut into strips of
STRIP tokens. The sum of a strip is taken in float32 in one order: w_j + w_j+16 and w_j+32 + w_j+48,
then the sum of these two, then halves of the remaining 16. Weights and strip sums are truncated to
multiples of 1 / UNITS, and everything after that is int64: cumulative sums are exact, in whatever
order a GPU takes them.

A point is u times the total, in float64, truncated. It lies in the first strip whose cumulative sum
exceeds it, and there on the first token whose cumulative sum does. Rounding makes a strip's sum
differ from that of its tokens: a point beyond all of them lies on the strip's last token that has a
weight. The same whole numbers decide whether a token has probability tau, and how many tokens it
takes to reach p.

The cost: a weight below 1 / UNITS is never drawn, and 150,000 of them are 4e-8 of the mass of the largest.
"""

from __future__ import annotations

# 2^f = 1 + f p(f) for |f| <= 1/2: the least relative error (1e-7) of a polynomial that is 1 at 0, by Lawson's weights.
COEFFICIENTS = (1.326472717e-3, 9.671512642e-3, 5.550733743e-2, 2.402224209e-1, 6.931469776e-1, 1.0)
LOG2_E = 1.4426950408889634
MAGIC = 1.5 * 2**23 + 127
"""A float32 this large has no fractional bits; its lowest ones are the biased exponent of 2^n."""

LOWEST_WEIGHT_EXPONENT = -100
STRIP = 64
UNITS = 2.0**42
"""Units in the largest weight. The sum of 2^20 such tokens still fits into int64."""

MIN_LOGPROB = -87.0
"""Tokens below e^-87 times the most probable one are never drawn."""
