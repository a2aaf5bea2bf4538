"""What `archive` predicts with: the numbers that its coder and the model of its contexts share, in whatever way they are run.

A **node** is a probability that learns: p of 22 bits that the next bit is 1, and n, how often it was asked (at most
MOST_ASKED), kept as p * 1024 + n; at first NEW_NODE. After a bit, p moves towards it by the share RATES[n] / 2^16 of the way:
1 / (n + 1.5).
"""

from __future__ import annotations

import numpy as np

# Compiled into _numba_decode.py and _numba_encode.py, whose copies on disk do not notice a change here. None may change: caches
# hold their streams.
NEW_NODE = (1 << 21) << 10
MOST_ASKED = 254
RATES = np.array([(2 << 16) // (2 * n + 3) for n in range(MOST_ASKED + 1)], np.int64)

SHARES = np.array([(n << 10) // (n + 3) for n in range(MOST_ASKED + 1)], np.int64)
"""Of 2^10, how much a node for a class of entries counts against the one for all entries, by how often it was asked."""

LEAST_P = 32
"""Of 2^16: no bit is ever held to be surer than this, so that none costs more than 11 bits."""

MOST_TREE_BITS = 18
"""Nodes are kept for this many leading bits of an id; of a wider id the last bits are held to be even."""

NUM_CLASSES = 6
CLASS_TREE_BITS = 5
"""Classes of entries have nodes of their own for the leading bits of an id: exact entries of ranks 0, 1 to 3, 4 to 15, 16 and
more; estimates of several draws; estimates of one draw, or at tau."""

VALUE_STRIDE = 192
NUM_LENGTHS = 32
MOST_LEARNED_LENGTH = 16
"""Nodes of a context for whole numbers: 32 for the length in bits, in unary; then, for each length up to 16, eight for the
three bits after the leading one. Further bits are held to be even."""

DELTAS, EXACTS, TAILS, OUTSIDES, NUM_CONTEXTS = 0, 70, 102, 166, 168
"""First contexts: differences of codes (2 kinds of entries x 7 ranks x 5 differences before), numbers of exact entries (32,
by that of entries), tails (64), codes of targets outside the support (and how many there are)."""

MOST_ENTRIES_PER_BYTE = 64
"""A shorter stream is filled with zeros: what is decoded takes memory in proportion to what is stored."""
