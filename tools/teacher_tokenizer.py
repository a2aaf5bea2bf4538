"""A byte-level BPE tokenizer of the text's own, with a chat template, in the Hugging Face layout."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

BOS, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
TRAINING_CHARS = 20_000_000  # more changes few merges, and costs a second per 5 MB

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def train_tokenizer(texts: Sequence[str], vocab_size: int, seed: int) -> Any:
    """A transformers fast tokenizer with vocab_size ids, learned from the texts.

    <|endoftext|> begins each text (it is the BOS) and ends generation.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sample(texts, seed), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=BOS, pad_token=BOS, chat_template=CHAT_TEMPLATE
    )


def encode_all(tokenizer: Any, texts: Iterable[str]) -> NDArray[np.int32]:
    """All texts, one after another, each begun by its BOS. Shape (tokens,)."""
    encodings = tokenizer.backend_tokenizer.encode_batch_fast(list(texts))
    return np.concatenate([np.asarray(encoding.ids, dtype=np.int32) for encoding in encodings])


def num_bytes(tokenizer: Any, ids: NDArray[np.int32]) -> int:
    """Bytes of text that the ids stand for; special tokens stand for none."""
    length_V = np.zeros(len(tokenizer), dtype=np.int64)
    special = set(tokenizer.all_special_ids) | {tokenizer.convert_tokens_to_ids(token) for token in (TURN_START, TURN_END)}
    for token, token_id in tokenizer.get_vocab().items():
        # In a byte-level vocabulary every character of a token's name is one byte.
        length_V[token_id] = 0 if token_id in special else len(token)
    return int(length_V[ids].sum())


def _sample(texts: Sequence[str], seed: int) -> Iterator[str]:
    order = list(range(len(texts)))
    random.Random(f"{seed} tokenizer").shuffle(order)
    left = TRAINING_CHARS
    for index in order:
        if left <= 0:
            return
        left -= len(texts[index])
        yield texts[index]
