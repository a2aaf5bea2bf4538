"""What a model is worth beyond counting: the loss of the tokens' frequencies, from which retained nats are counted.

The unigram of a text: q(v) = (c(v) + 1) / (N + V), where c(v) of its N predicted tokens are v and V ids can come (Laplace). It
is counted in text that models were trained on, never in held-out text: a unigram of the held-out text itself knows its rare
words, and makes every model look worse by what no model could know.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kdcache.errors import MismatchError
from kdcache.loader.cache import open_cache
from kdcache.teacher.tokenizer import Tokenizer
from kdcache.train.evaluation.heldout import HeldoutSequence, read_heldout

MAX_TOKENS = 2_000_000
"""Counted at most, in sequences spread evenly over a cache: at more, the loss of 150,000 ids moves in the third digit."""


@dataclass(frozen=True, slots=True, eq=False)
class Unigram:
    """Token frequencies of a text.

    Attributes:
        logprobs_V: (V,) float64, natural logs.
        num_tokens: that were counted.
        source: the cache or file.
    """

    logprobs_V: NDArray[np.float64]
    num_tokens: int
    source: str

    def nll_S(self, sequences: Sequence[HeldoutSequence]) -> NDArray[np.float64]:
        """(S,) float64, nats: -log q summed over each sequence's predicted tokens."""
        return np.array([-self.logprobs_V[sequence.input_ids_N[1:]].sum() for sequence in sequences])


def count_unigram(ids: Iterable[ArrayLike], vocab_size: int, source: str) -> Unigram:
    """The unigram of sequences of token ids; the first token of each is not predicted and does not count."""
    counts_V = np.zeros(vocab_size, np.int64)
    for ids_N in ids:
        counts_V += np.bincount(np.asarray(ids_N, np.int64)[1:], minlength=vocab_size)[:vocab_size]
    num_tokens = int(counts_V.sum())
    return Unigram(np.log((counts_V + 1) / (num_tokens + vocab_size)), num_tokens, source)


def read_unigram(source: str, tokenizer: Tokenizer, *, vocab_size: int) -> Unigram:
    """Count a cache's text, or that of a file as `read_heldout` takes it.

    Args:
        source: a file that is there, or a cache's directory or address.
        tokenizer: makes ids of the file's texts.
        vocab_size: ids that can come.

    Raises:
        InputError: a file that cannot be read. CacheNotFoundError, CorruptCacheError, StorageError: see `open_cache`.
        MismatchError: the cache's ids are another tokenizer's.
    """
    if Path(source).is_file():
        windows = read_heldout(source, tokenizer, window=2**20, max_tokens=MAX_TOKENS)
        return count_unigram((window.input_ids_N for window in windows), vocab_size, source)
    with open_cache(source) as cache:
        theirs = cache.manifest.identity.tokenizer
        if theirs.fingerprint != tokenizer.identity.fingerprint:
            raise MismatchError(
                f"{source}: its ids are of the tokenizer {theirs.name!r}, not of the teacher's, {tokenizer.identity.name!r}; "
                "name a cache of the teacher's tokenizer, or a file of training text"
            )
        num_tokens_S = cache.num_tokens_S.astype(np.int64)
        share = min(1.0, MAX_TOKENS / max(1, int(num_tokens_S.sum())))
        # Each sequence with which the tokens kept so far would reach another whole multiple of 1 / share.
        kept_S = np.flatnonzero(np.diff(np.floor(np.arange(len(cache) + 1) * share)))
        return count_unigram((cache.reader.encoded(int(i)).sequence.input_ids_N for i in kept_S), vocab_size, source)
