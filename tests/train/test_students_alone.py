"""A student reads each document as if it were alone, with an attention that does what its configuration asks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from kdcache.config.loader import LoaderConfig
from kdcache.config.train import StudentConfig
from kdcache.errors import ConfigError
from kdcache.loader.loader import Loader
from kdcache.train.adapters.student_loss import StudentLoss
from kdcache.train.body import hidden_states
from kdcache.train.packed import check_architecture
from kdcache.train.student import build_student

SMALL: dict[str, Any] = {
    "vocab_size": 520,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 3,
}
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
    "original_max_position_embeddings": 32,
    "factor": 8.0,
    "partial_rotary_factor": 1.0,
}
DYNAMIC: dict[str, Any] = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
CAPPED: dict[str, Any] = {
    "head_dim": 16,
    "attn_logit_softcapping": 2.0,
    "query_pre_attn_scalar": 1,
    "final_logit_softcapping": None,
}


def saved(folder: Path, kind: str, **fields: Any) -> Path:
    """Weights that are three times what they are made as, so that attention matters."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(SMALL | fields)), dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(3.0)
    model.save_pretrained(folder)
    return folder


def student(folder: Path, **settings: Any) -> PreTrainedModel:
    return build_student(StudentConfig(model=str(folder), init="pretrained", **settings), seed=0).eval()


def alone(folder: Path, ids: list[int]) -> torch.Tensor:
    """Hidden states by transformers, from a model that has read nothing else."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    return model.base_model(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0]


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "fields", "attention"),
    [
        ("phi3", {"original_max_position_embeddings": 32, "rope_parameters": LONGROPE}, "sdpa"),
        ("llama", {"max_position_embeddings": 32, "rope_parameters": DYNAMIC}, "sdpa"),
        ("gemma2", CAPPED, "eager"),
    ],
)
def test_each_document_is_read_as_if_it_were_alone(tmp_path: Path, kind: str, fields: dict[str, Any], attention: str) -> None:
    folder = saved(tmp_path / kind, kind, **fields)
    model = student(folder)
    check_architecture(model)
    assert model.config.get_text_config()._attn_implementation == attention
    lengths = [20, 100, 7, 64]
    documents = [[(3 * i + 7 * n) % 520 for i in range(n)] for n in lengths]
    packed_1T = torch.tensor([[token for document in documents for token in document]])
    positions_1T = torch.cat([torch.arange(n) for n in lengths])[None]
    for _ in range(2):  # and so they are after the long ones
        found = hidden_states(model, packed_1T, positions_1T)[0].split(lengths)
        for part, document in zip(found, documents, strict=True):
            torch.testing.assert_close(part, alone(folder, document), rtol=1e-4, atol=1e-5)
    # In rows of their own, with padding that counts as documents of one token.
    rows_BT, positions_BT = torch.zeros(4, 100, dtype=torch.int64), torch.zeros(4, 100, dtype=torch.int64)
    for row, document in enumerate(documents):
        rows_BT[row, : len(document)] = torch.tensor(document)
        positions_BT[row, : len(document)] = torch.arange(len(document))
    for part, document in zip(hidden_states(model, rows_BT, positions_BT), documents, strict=True):
        torch.testing.assert_close(part[: len(document)], alone(folder, document), rtol=1e-4, atol=1e-5)


def test_an_attention_that_leaves_something_out_is_refused_by_name_and_named_to_trainers(
    tmp_path: Path, small_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = saved(tmp_path / "gemma2", "gemma2", **CAPPED)
    with pytest.raises(ConfigError, match=r"student.attention is 'sdpa', which ignores part of what the config of Gemma2"):
        student(folder, attention="sdpa")
    given = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with Loader(small_cache, LoaderConfig(seq_len=64, batch_rows=2)) as loader, caplog.at_level("WARNING", "kdcache"):
        StudentLoss(given, loader)
    assert "load it with attn_implementation='eager'" in caplog.text


def test_a_student_that_takes_statistics_of_the_batch_is_refused(tmp_path: Path) -> None:
    model: Any = student(saved(tmp_path / "llama", "llama"))
    check_architecture(model)
    model.model.layers[0].register_forward_hook(lambda _, __, hidden_BTH: hidden_BTH - hidden_BTH.mean(dim=0, keepdim=True) / 2)
    with pytest.raises(ConfigError, match=r"when another row is in the batch|see each other"):
        check_architecture(model)
