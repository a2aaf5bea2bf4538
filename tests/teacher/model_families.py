"""Tiny random models of several architectures, in the Hugging Face layout, whose inner states are compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SIZES: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "dtype": "float32",
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {"tie_word_embeddings": False},
    "Qwen3": {"tie_word_embeddings": True},
    "Gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 16},
    "Gemma3Text": {"sliding_window": 8, "query_pre_attn_scalar": 16},
    "Phi3": {"head_dim": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "Cohere": {"bos_token_id": 1, "eos_token_id": 2},
    "GptOss": {"sliding_window": 8, "num_local_experts": 2, "num_experts_per_tok": 1},
}
"""Class prefix -> what differs: a norm of queries and keys, soft caps, sliding windows, one fused projection, sinks."""


def build_family(folder: Path, family: str, **changes: Any) -> Path:
    """Write a tiny model of a family into a folder; its norms have weights other than 1, so that before and after differ."""
    import torch
    import transformers

    config = getattr(transformers, f"{family}Config")(**SIZES | FAMILIES[family] | changes)
    causal = {"Gemma3Text": "Gemma3ForCausalLM"}.get(family, f"{family}ForCausalLM")
    torch.manual_seed(0)
    model = getattr(transformers, causal)(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1 and "norm" in name:
                weight.add_(0.3 * torch.randn(weight.shape, generator=generator))
            elif weight.dim() >= 2:
                weight.normal_(0.0, weight.shape[-1] ** -0.5, generator=generator)
    model.save_pretrained(folder)
    return folder
