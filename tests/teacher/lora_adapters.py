"""LoRA adapters in PEFT's format, written by hand, and what they make of their model: the merged weights are the definition."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

RANK, ALPHA = 4, 12
MODULES = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")


def write_adapter(
    folder: Path, base: Path, seed: int = 0, *, prefix: str = "model.layers", wider: int = 0, **fields: Any
) -> Path:
    """An adapter on the layers of the model in `base`.

    Args:
        folder: made.
        base: of the model.
        seed: of the weights.
        prefix: what the layers are called.
        wider: inputs that it has more than the model's layers.
        fields: further ones of adapter_config.json.
    """
    import torch
    from safetensors.torch import load_file, save_file

    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in load_file(base / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if module.endswith(MODULES):
            target = f"base_model.model.{module.replace('model.layers', prefix)}"
            num_out, num_in = weight.shape
            tensors[f"{target}.lora_A.weight"] = torch.randn(RANK, num_in + wider, generator=generator) / num_in**0.5
            tensors[f"{target}.lora_B.weight"] = torch.randn(num_out, RANK, generator=generator) / 8
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    told = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA, "bias": "none"}
    told |= {"base_model_name_or_path": str(base), "target_modules": [name.rpartition(".")[2] for name in MODULES]}
    (folder / "adapter_config.json").write_text(json.dumps(told | fields))
    return folder


def merge(base: Path, adapter: Path, folder: Path) -> Path:
    """The model in `base` with the adapter added to its weights: W + alpha/r B A."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(base, folder)
    weights, pairs = load_file(base / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    for name in pairs:
        if name.endswith(".lora_A.weight"):
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            product = pairs[name.replace("lora_A", "lora_B")].double() @ pairs[name].double()
            merged = weights[f"{module}.weight"].double() + ALPHA / RANK * product
            weights[f"{module}.weight"] = merged.float().contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
