"""Which adapters are taken, by what lies in their folders; and that one belongs to a model's digest. No engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from lora_adapters import RANK, write_adapter

from kdcache.config.capture import TeacherConfig
from kdcache.errors import ConfigError
from kdcache.teacher import load_teacher
from kdcache.teacher.checkpoint import weights_digest
from kdcache.teacher.vllm.adapter import adapter_rank


@pytest.fixture
def adapter(tiny_model_dir: Path, tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter", tiny_model_dir)


def rewrite(adapter: Path, **fields: Any) -> str:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return str(adapter)


def rename(adapter: Path, old: str, new: str) -> str:
    """With one of its weights under another name."""
    from safetensors.torch import load_file, save_file

    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if old in name)
    save_file({key.replace(old, new) if key == name else key: value for key, value in tensors.items()}, path)
    return str(adapter)


def test_an_adapter_of_layers_is_taken_with_its_highest_rank(adapter: Path):
    assert adapter_rank(str(adapter)) == RANK
    assert adapter_rank(rewrite(adapter, rank_pattern={"q_proj": 24})) == 24


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"peft_type": "IA3"}, "its peft_type is 'IA3', expected 'LORA'"),
        ({"modules_to_save": ["lm_head"]}, r"its modules_to_save is \['lm_head'\], expected LoRA on layers alone"),
        ({"use_dora": True}, "its use_dora is True"),
        ({"bias": "all"}, "its bias is 'all', expected 'none'"),
        ({"r": None}, "its rank r is None, expected a number from 1 to 512"),
        ({"r": 1000}, "its rank r is 1000"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_adapters_of_other_kinds_are_refused(adapter: Path, fields: dict[str, Any], found: str):
    with pytest.raises(ConfigError, match=f"{found}.* can be merged into its model"):
        adapter_rank(rewrite(adapter, **fields))


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ("model.layers.0.mlp.down_proj.", "lm_head.", r"lm_head\.lora_\w\.weight changes the embeddings or the output"),
        (
            "layers.0.mlp.down_proj.lora_A.weight",
            "embed_tokens.lora_embedding_A",
            "embed_tokens.lora_embedding_A changes the emb",
        ),
        ("model.layers.0.mlp.down_proj.lora_A", "lm_head.base_layer", "lm_head.base_layer.weight changes the embeddings"),
        ("lora_A.weight", "lora_magnitude_vector", "lora_magnitude_vector, expected .lora_A.weight and .lora_B.weight"),
        ("layers.0.mlp.down_proj.lora_A", "layers.7.mlp.down_proj.lora_A", "has no other half"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_weights_that_are_no_pair_of_a_layer_are_refused_by_name(adapter: Path, old: str, new: str, found: str):
    with pytest.raises(ConfigError, match=found):
        adapter_rank(rename(adapter, old, new))


def test_folders_without_an_adapter_are_refused(tmp_path: Path, adapter: Path):
    with pytest.raises(ConfigError, match=r"no adapter_config\.json is there, expected a local folder as PEFT's"):
        adapter_rank(str(tmp_path))
    (adapter / "adapter_model.safetensors").write_bytes(b"\x08")
    with pytest.raises(ConfigError, match=r"adapter_model\.safetensors cannot be read"):
        adapter_rank(str(adapter))
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ConfigError, match="expected weights in the safetensors format"):
        adapter_rank(str(adapter))
    (adapter / "adapter_config.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"adapter_config\.json holds no fields"):
        adapter_rank(str(adapter))


def test_backends_that_put_no_adapter_on_refuse_it(tiny_model_dir: Path, adapter: Path):
    for backend in ("transformers", "served", "fake"):
        fields = {"model": str(tiny_model_dir), "backend": backend, "adapter": str(adapter)}
        fields |= {"server": {"url": "http://localhost:1/v1"}} if backend == "served" else {}
        with pytest.raises(
            msgspec.ValidationError, match=f"adapter is for backend 'vllm' on its worker route, not for '{backend}'"
        ):
            msgspec.convert(fields, TeacherConfig)
    with pytest.raises(msgspec.ValidationError, match="not for 'vllm' on route 'public'"):
        msgspec.convert({"model": "m", "backend": "vllm", "vllm": {"route": "public"}, "adapter": "a"}, TeacherConfig)


def test_where_auto_leads_to_transformers_an_adapter_is_refused_too(
    tiny_model_dir: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
):
    import kdcache.teacher.auto

    find_spec = kdcache.teacher.auto.find_spec
    monkeypatch.setattr(kdcache.teacher.auto, "find_spec", lambda name: None if name == "vllm" else find_spec(name))
    with pytest.raises(ConfigError, match=r"the transformers teacher cannot apply one; merge it"):
        load_teacher(TeacherConfig(model=str(tiny_model_dir), adapter=str(adapter)))


def test_an_adapter_belongs_to_the_digest_of_its_model_also_beside_a_hub_id(tiny_model_dir: Path, adapter: Path):
    def digests() -> list[str | None]:
        return [weights_digest(model, str(adapter)) for model in (str(tiny_model_dir), "org/name")]

    first = digests()
    assert len({*first, weights_digest(str(tiny_model_dir)), None}) == 4
    assert digests() == first
    rewrite(adapter, lora_alpha=1)
    assert not set(digests()) & set(first)
