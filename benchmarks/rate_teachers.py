"""Distributions to measure codecs and selections on: of a trained model, or of a stand-in that needs no training.

The stand-in is an n-gram model of the running Python's standard library: trigrams that back off to bigrams, words two back and
words said lately, those to single words; absolute discounting throughout. Its vocabulary is words with their space before them,
by falling frequency, so that ids and supports have the statistics of Zipf's law and contexts come again as in text. It is no
language model: figures from it are to compare codecs, not to predict a teacher's.

Its ids fall by frequency, which is easy on codes for ids. Scattered, the words stand at places of the whole vocabulary that a
key chooses, each as likely, never-seen ids between them: an id's neighbours tell nothing. Tokenizers of 128k to 152k ids, most
of which one language never uses, lie between the two; scattered is the hard end.

Shape letters: S sequences, T positions of each, V vocabulary, N tokens of the training text.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
from teacher_text import split_of, standard_library

WORD = re.compile(r" ?[A-Za-z]+|\d|\n +|\s|[^\w\s]+|_+|.")
DISCOUNT = 0.75
NUM_LATELY = 400
SCATTER_KEY = 0


@dataclass(frozen=True)
class Teacher:
    """A teacher and the text it is asked about.

    Attributes:
        name: for the tables.
        vocab_size: V.
        ids_ST: (S, T) int32.
        logprobs_TV: sequence number -> (T, V) float32, its distribution after each token.
    """

    name: str
    vocab_size: int
    ids_ST: NDArray[np.int32]
    logprobs_TV: Callable[[int], NDArray[np.float32]]


def stand_in(
    *, vocab_size: int, num_sequences: int, num_tokens: int, max_words: int | None = None, scattered: bool = False
) -> Teacher:
    """The n-gram model, and sequences of documents that it has not counted.

    Args:
        scattered: whether ids are by a keyed permutation of the vocabulary, in place of by frequency.
        max_words: of the text that are counted; None for all.
    """
    documents = standard_library()
    words = [w for d in documents if split_of(d.source) == "train" for w in WORD.findall(d.text)][:max_words]
    asked = [w for d in documents if split_of(d.source) != "train" for w in WORD.findall(d.text)]
    ranks = {word: rank for rank, (word, _) in enumerate(Counter(words).most_common(vocab_size))}
    counted_N, asked_N = _ids(words, ranks, vocab_size), _ids(asked, ranks, vocab_size)
    model = _NGrams(counted_N, vocab_size)
    ids_ST = asked_N[: num_sequences * num_tokens].reshape(num_sequences, num_tokens)
    name = f"stand-in (n-grams of {len(counted_N):,} words, {vocab_size:,} ids{', scattered' if scattered else ''})"
    if not scattered:
        return Teacher(name, vocab_size, ids_ST, lambda s: model.logprobs_TV(ids_ST[s]))
    rank_V = np.random.default_rng(SCATTER_KEY).permutation(vocab_size)
    id_V = np.argsort(rank_V).astype(np.int32)
    return Teacher(name, vocab_size, id_V[ids_ST], lambda s: model.logprobs_TV(ids_ST[s])[:, rank_V])


def trained(folder: Path, *, num_sequences: int, num_tokens: int) -> Teacher:
    """A model that transformers reads, asked about the text that tools/train_teacher held out, or the standard library."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    num_tokens = min(num_tokens, model.config.max_position_embeddings)
    ids_ST = _tokens(_texts(folder), tokenizer, num_sequences * num_tokens).reshape(-1, num_tokens)

    def logprobs_TV(sequence: int) -> NDArray[np.float32]:
        with torch.inference_mode():
            logits_TV = model(torch.from_numpy(ids_ST[sequence : sequence + 1]).long()).logits[0]
            return torch.log_softmax(logits_TV.float(), -1).numpy()

    return Teacher(f"{folder.name} ({model.config.vocab_size:,} ids)", model.config.vocab_size, ids_ST, logprobs_TV)


def _texts(folder: Path) -> Iterator[str]:
    import json

    heldout = folder / "text" / "heldout.jsonl"
    if heldout.is_file():
        yield from (json.loads(line)["text"] for line in heldout.read_text(encoding="utf-8").splitlines())
    else:
        yield from (d.text for d in standard_library() if split_of(d.source) != "train")


def _tokens(texts: Iterator[str], tokenizer, needed: int) -> NDArray[np.int32]:
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) >= needed:
            return np.array(ids[:needed], np.int32)
    raise SystemExit(f"the text has {len(ids)} tokens, {needed} are needed: ask for fewer or shorter sequences")


def _ids(words: list[str], ranks: dict[str, int], vocab_size: int) -> NDArray[np.int32]:
    """Ids by frequency; words without one share the last ids, by length and first letter, as hashed vocabularies do."""
    spare = min(1000, vocab_size // 4)
    return np.array([ranks.get(w, vocab_size - 1 - (31 * len(w) + ord(w[-1])) % spare) for w in words], np.int32)


class _NGrams:
    """Counts of words after contexts, looked up by context."""

    def __init__(self, counted_N: NDArray[np.int32], vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._single_V = (np.bincount(counted_N, minlength=vocab_size) + 0.3).astype(np.float64)
        self._single_V /= self._single_V.sum()
        a, b, w = (counted_N[i : len(counted_N) - 2 + i].astype(np.int64) for i in range(3))
        self._after = {name: _Table(key, w) for name, key in (("b", b), ("a", a), ("ab", a * vocab_size + b))}

    def logprobs_TV(self, ids_T: NDArray[np.int32]) -> NDArray[np.float32]:
        """(T, V) after each token."""
        rows = np.empty((len(ids_T), self._vocab_size), np.float32)
        for t in range(len(ids_T)):
            rows[t] = np.log(self._row(ids_T[: t + 1].astype(np.int64)))
        return rows

    def _row(self, read: NDArray[np.int64]) -> NDArray[np.float64]:
        b, a = int(read[-1]), int(read[-2]) if len(read) > 1 else 0
        lately = read[-NUM_LATELY:]
        p_V = 0.85 * self._single_V
        p_V += 0.15 / len(lately) * np.bincount(lately, minlength=self._vocab_size)
        p_V = self._after["a"].interpolated(a, p_V)
        p_V = self._after["b"].interpolated(b, p_V)
        return self._after["ab"].interpolated(a * self._vocab_size + b, p_V)


class _Table:
    """Which words followed each context how often."""

    def __init__(self, contexts_N: NDArray[np.int64], words_N: NDArray[np.int64]) -> None:
        order = np.argsort(contexts_N, kind="stable")
        self._contexts, starts = np.unique(contexts_N[order], return_index=True)
        self._starts = np.append(starts, len(order))
        self._words = words_N[order]

    def interpolated(self, context: int, below_V: NDArray[np.float64]) -> NDArray[np.float64]:
        """Absolute discounting: (count - D) / total, and what that takes given to the distribution below."""
        place = int(np.searchsorted(self._contexts, context))
        if place == len(self._contexts) or self._contexts[place] != context:
            return below_V
        words, counts = np.unique(self._words[self._starts[place] : self._starts[place + 1]][-5000:], return_counts=True)
        total = counts.sum()
        mixed_V = below_V * (DISCOUNT * len(words) / total)
        mixed_V[words] += (counts - DISCOUNT) / total
        return mixed_V
