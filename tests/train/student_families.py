"""Tiny models of many architectures, with random weights: whatever says something of single layers in its configuration."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
KINDS = ["sliding_attention", "full_attention"] * 2

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama_tied": ("Llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", {"sliding_window": 4}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "gemma2": ("Gemma2", {"head_dim": 16, "sliding_window": 4, "query_pre_attn_scalar": 16}),
    "gemma3": ("Gemma3Text", {"head_dim": 16, "sliding_window": 4, "layer_types": KINDS, "query_pre_attn_scalar": 16}),
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64}),
    "phi": ("Phi", {"qk_layernorm": True}),
    "phi3": ("Phi3", {"sliding_window": 4}),
    "olmo2": ("Olmo2", {}),
    "granite": ("Granite", {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0, 1, 0], "no_rope_layer_interval": 2}),
    "cohere2": ("Cohere2", {"sliding_window": 4, "layer_types": KINDS}),
    "gpt_neox": ("GPTNeoX", {}),
    "falcon": ("Falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False}),
    "gpt_oss": ("GptOss", {"head_dim": 16, "sliding_window": 4, "num_local_experts": 3, "num_experts_per_tok": 2}),
    "qwen3_moe": ("Qwen3Moe", {"mlp_only_layers": [1, 2], "num_experts": 3, "moe_intermediate_size": 24,
                               "num_experts_per_tok": 2}),
    "deepseek_v3": ("DeepseekV3", {"first_k_dense_replace": 2, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2,
                                   "topk_group": 1, "moe_intermediate_size": 16, "q_lora_rank": 16, "kv_lora_rank": 16,
                                   "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4}),
}  # fmt: skip


def tiny(name: str, **changes: Any) -> PreTrainedModel:
    """The model of a family, in float32, eager where it has no sdpa; its weights are as strong as a trained model's."""
    kind, fields = FAMILIES[name]
    config_class = getattr(transformers, f"{kind}Config")
    settings = {**SIZES, **fields, **changes}
    if "n_embd" in fields:
        settings = {key: value for key, value in settings.items() if key not in SIZES or key.endswith(("vocab_size", "_id"))}
    torch.manual_seed(0)
    attention = "eager" if name == "gpt_oss" else "sdpa"
    model = transformers.AutoModelForCausalLM.from_config(
        config_class(**settings), dtype=torch.float32, attn_implementation=attention
    )
    with torch.no_grad():
        for weight in model.parameters():
            scale = 0.3 if weight.dim() == 1 else (1.5 / weight.shape[-1] ** 0.5)
            weight.add_(torch.randn(weight.shape) * scale)
    return model.eval()


def ids(model: PreTrainedModel, length: int = 24) -> torch.Tensor:
    """(2, T) ids of two texts."""
    return torch.randint(0, 96, (2, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    """(2, T, V) of the two texts."""
    return model(input_ids=ids(model), use_cache=False).logits
