"""A tiny Llama-shaped teacher in the Hugging Face layout, made here in a few seconds: nothing is downloaded.

Its logits spread as a trained model's do (standard deviation about 2.5), and its layers are strong enough that a distribution
depends on the whole prefix, not on the last token alone: a test of alignment has something to find.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

VOCAB_SIZE = 520
"""Ids of the model: eight more than the tokenizer's, as in many real checkpoints."""

TOKENIZER_VOCAB_SIZE = 512
MAX_POSITIONS = 256
LOGITS_STD = 2.5
SPECIAL_TOKENS = ("<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>")

CHAT_TEMPLATE = (
    "<s>{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)

TEXT_FILES = ("this.py", "textwrap.py", "heapq.py", "bisect.py", "abc.py", "string.py")
"""Modules of the running Python's standard library that the tokenizer is trained on."""


def stdlib_texts() -> list[str]:
    """The sources of TEXT_FILES."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    return [(folder / name).read_text("utf-8") for name in TEXT_FILES]


def build_tiny_model(folder: Path, *, seed: int = 0, vocab_size: int = VOCAB_SIZE, **config_changes: object) -> Path:
    """Write a float32 LlamaForCausalLM of hidden size 64 with 2 layers, and its tokenizer, into a folder.

    Args:
        folder: made if it is not there.
        seed: of the weights.
        vocab_size: ids of the model.
        config_changes: further fields of `LlamaConfig`.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write_tokenizer(folder)
    _write_weights(folder, seed, vocab_size, config_changes)
    return folder


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENIZER_VOCAB_SIZE,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(stdlib_texts(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)


def _write_weights(folder: Path, seed: int, vocab_size: int, config_changes: dict[str, object]) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    settings: dict[str, object] = {
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": MAX_POSITIONS,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "tie_word_embeddings": False,
        "dtype": "float32",
    }
    config = LlamaConfig(**(settings | config_changes))  # pyright: ignore[reportArgumentType]
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                std = 1.0 if "embed_tokens" in name else weight.shape[1] ** -0.5
                # The state after the final norm has mean square 1, so a row of norm LOGITS_STD gives logits of that deviation.
                std *= LOGITS_STD if "lm_head" in name else 1.0
                weight.normal_(0.0, std, generator=generator)
    model.save_pretrained(folder)
