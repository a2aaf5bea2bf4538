"""The unigram that retained nats are counted from: its formula, where it is counted, and what is not counted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from kdcache.errors import CacheNotFoundError, MismatchError
from kdcache.loader.cache import open_cache
from kdcache.teacher import load_tokenizer
from kdcache.train.evaluation import unigram as module
from kdcache.train.evaluation.heldout import HeldoutSequence
from kdcache.train.evaluation.unigram import count_unigram, read_unigram


def test_the_formula_on_two_sequences() -> None:
    # Predicted are 1 1 and 2; of V = 4 ids: (2 + 1) / 7 for 1, 2 / 7 for 2, 1 / 7 for 0 and 3.
    found = count_unigram([[0, 1, 1], [3, 2]], 4, "two")
    assert found.num_tokens == 3
    assert np.exp(found.logprobs_V) == pytest.approx([1 / 7, 3 / 7, 2 / 7, 1 / 7])
    sequence = HeldoutSequence(np.array([2, 1, 3]), num_bytes=2, text=0)
    assert found.nll_S([sequence]) == pytest.approx([-np.log(3 / 7) - np.log(1 / 7)])


def test_a_cache_is_counted_whole_and_beyond_the_limit_in_part(
    small_cache: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(str(tiny_model_dir))
    size = tokenizer.identity.vocab_size
    with open_cache(small_cache) as cache:
        ids = np.concatenate([cache[i].sequence.input_ids_N[1:] for i in range(len(cache))])
        num_tokens, num_sequences = int(cache.num_tokens_S.sum()), len(cache)
    found = read_unigram(str(small_cache), tokenizer, vocab_size=size)
    assert found.num_tokens == len(ids) == num_tokens - num_sequences
    assert np.exp(found.logprobs_V) == pytest.approx((np.bincount(ids, minlength=size) + 1) / (len(ids) + size))
    monkeypatch.setattr(module, "MAX_TOKENS", num_tokens // 2)
    part = read_unigram(str(small_cache), tokenizer, vocab_size=size)
    assert 0.3 * len(ids) < part.num_tokens < 0.7 * len(ids)


def test_a_file_of_text_is_counted_too_and_what_is_neither_is_said(tiny_model_dir: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_model_dir))
    file = tmp_path / "text.jsonl"
    file.write_text(json.dumps({"input_ids": [5, 6, 6]}) + "\n")
    found = read_unigram(str(file), tokenizer, vocab_size=8)
    assert np.exp(found.logprobs_V[6]) == pytest.approx(3 / 10)
    with pytest.raises(CacheNotFoundError):
        read_unigram(str(tmp_path / "nothing"), tokenizer, vocab_size=8)


def test_a_cache_of_another_tokenizer_is_refused(
    small_cache: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(str(tiny_model_dir))
    other = type("Other", (), {"identity": type("Of", (), {"fingerprint": "0" * 64, "name": "other", "vocab_size": 520})})
    assert tokenizer.identity.fingerprint != "0" * 64
    with pytest.raises(MismatchError, match="not of the teacher's, 'other'"):
        read_unigram(str(small_cache), other, vocab_size=520)  # pyright: ignore[reportArgumentType]
