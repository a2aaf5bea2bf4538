"""What an adapter's folder holds (PEFT's format), and which adapters can be captured. Standard library only.

vLLM applies the pairs of matrices of decoder layers. Other things that an adapter may hold it refuses, drops silently, or
applies where our projection does not pass. So anything but a layer's pair is refused here, by the names of the weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kdcache.errors import ConfigError
from kdcache.teacher.checkpoint import ADAPTER_FILE

WEIGHTS_FILE = "adapter_model.safetensors"
PAIR_SUFFIXES = (".lora_A.weight", ".lora_B.weight")
EMBEDDINGS = ("lm_head", "embed_tokens", "embed_out", "wte", "word_embeddings", "embed_in", "output_layer")
"""What models call their output projection and their embeddings. If they are one matrix, it depends on the library's release
whether an adapter of one applies to both."""

HIGHEST_RANK = 512
"""vLLM takes no higher rank."""

MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors format."""


def adapter_rank(adapter: str) -> int:
    """Check all that an adapter's folder holds, and give its highest rank.

    Raises:
        ConfigError: the folder holds no adapter, or it is anything but LoRA on layers with both matrices of each pair.
    """
    folder = Path(adapter)
    if not (folder / ADAPTER_FILE).is_file():
        raise _refusal(adapter, f"no {ADAPTER_FILE} is there", "a local folder as PEFT's save_pretrained writes it")
    fields = _fields(adapter, folder / ADAPTER_FILE)
    _refuse_other_kinds(adapter, fields)
    names = _weight_names(adapter, folder / WEIGHTS_FILE)
    embeddings = [name for name in names if _module(name).rpartition(".")[2] in EMBEDDINGS]
    if embeddings:
        raise _refusal(adapter, f"{embeddings[0]} changes the embeddings or the output projection", "LoRA on layers alone")
    others = [name for name in names if not name.endswith(PAIR_SUFFIXES)]
    if others or not names:
        found = f"among its weights is {others[0]}" if others else "it has no weights"
        raise _refusal(adapter, found, f"{' and '.join(PAIR_SUFFIXES)} alone")
    halves = set(names)
    for name in names:
        if not {f"{_module(name)}{suffix}" for suffix in PAIR_SUFFIXES} <= halves:
            raise _refusal(adapter, f"{name} has no other half", f"both of {' and '.join(PAIR_SUFFIXES)}")
    return _highest_rank(adapter, fields)


def _refuse_other_kinds(adapter: str, fields: dict[str, Any]) -> None:
    kind = fields.get("peft_type")
    if kind != "LORA":
        raise _refusal(adapter, f"its peft_type is {kind!r}", "'LORA'")
    for name in ("modules_to_save", "use_dora", "lora_bias", "trainable_token_indices", "layer_replication"):
        if fields.get(name):
            raise _refusal(adapter, f"its {name} is {fields[name]!r}", "LoRA on layers alone")
    if fields.get("bias", "none") != "none":
        raise _refusal(adapter, f"its bias is {fields['bias']!r}", "'none'")


def _highest_rank(adapter: str, fields: dict[str, Any]) -> int:
    ranks = [fields.get("r"), *(fields.get("rank_pattern") or {}).values()]
    bad = next((rank for rank in ranks if not isinstance(rank, int) or not 1 <= rank <= HIGHEST_RANK), None)
    if bad is not None or None in ranks:
        raise _refusal(adapter, f"its rank r is {bad!r}", f"a number from 1 to {HIGHEST_RANK}")
    return max(ranks)


def _fields(adapter: str, path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _refusal(adapter, f"{path.name} cannot be read ({error})", "JSON") from error
    if not isinstance(fields, dict):
        raise _refusal(adapter, f"{path.name} holds no fields", "a JSON object")
    return fields


def _weight_names(adapter: str, path: Path) -> list[str]:
    """Names in a safetensors file: 8 bytes of length, then that much JSON."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size)) if size <= MAX_HEADER_BYTES else None
    except (OSError, ValueError, RecursionError) as error:
        raise _refusal(adapter, f"{path.name} cannot be read ({error})", "weights in the safetensors format") from error
    if not isinstance(header, dict):
        raise _refusal(adapter, f"{path.name} has no header", "weights in the safetensors format")
    return sorted(name for name in header if name != "__metadata__")


def _module(name: str) -> str:
    """The part of a weight's name before `.lora_A.weight`, `.base_layer.weight`, `.weight` and the like."""
    for ending in (*PAIR_SUFFIXES, ".lora_embedding_A", ".lora_embedding_B", ".base_layer.weight", ".weight", ".bias"):
        if name.endswith(ending):
            return name.removesuffix(ending)
    return name


def _refusal(adapter: str, found: str, expected: str) -> ConfigError:
    return ConfigError(
        f"teacher.adapter {adapter!r}: {found}, expected {expected}; another adapter can be merged into its model, and the "
        "merged folder named as teacher.model"
    )
