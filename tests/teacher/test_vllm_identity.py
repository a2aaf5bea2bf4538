"""What a real vLLM engine says of itself: each setting that moves numbers shows as a difference, and no other."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from agreement import measure_agreement
from contracts.teacher import TeacherCase, random_sequences
from dense_forward import dense_forward

from kdcache.config.teacher import TeacherConfig, VllmConfig
from kdcache.errors import TeacherError
from kdcache.format.manifest import CodecInfo, Identity, SelectionInfo, TeacherIdentity, TokenizerIdentity
from kdcache.teacher import load_teacher

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.slow]

COMMIT = "c" * 40


@pytest.fixture(scope="module")
def plain(tiny_model_dir: Path) -> TeacherIdentity:
    return identity_of(tiny_model_dir)


def identity_of(folder: Path, **changes: object) -> TeacherIdentity:
    teacher = load_teacher(TeacherConfig(model=str(folder), backend="vllm", **changes))  # pyright: ignore[reportArgumentType]
    teacher.close()
    return teacher.identity


def differences(mine: TeacherIdentity, theirs: TeacherIdentity) -> dict[str, str]:
    """Field -> `mine != theirs`, as a refused resume shows them."""

    def capture_of(teacher: TeacherIdentity) -> Identity:
        return Identity(
            teacher=teacher,
            tokenizer=TokenizerIdentity(name="t", fingerprint="t", vocab_size=2),
            selection=SelectionInfo(kind="top_k", params={"k": 1}),
            codec=CodecInfo(codec_id="raw", params={}),
            input_fingerprint="i",
        )

    lines = capture_of(mine).differences(capture_of(theirs))
    return {name.removeprefix("teacher."): sides for name, _, sides in (line.partition(": ") for line in lines)}


def test_the_engines_settings_are_named(plain: TeacherIdentity):
    options = plain.engine_options
    named = {name: options[name] for name in ("device", "head_dtype", "attention_backend", "kv_cache_dtype", "lora")}
    assert named == {
        "device": "cpu",
        "head_dtype": "float32",
        "attention_backend": "auto",
        "kv_cache_dtype": "auto",
        "lora": False,
    }
    assert (options["tensor_parallel_size"], options["pipeline_parallel_size"]) == (1, 1)
    assert (options["enforce_eager"], options["compilation"], options["speculative"]) == (True, "NONE", None)
    assert options["rope"] == {"rope_theta": 10000.0, "rope_type": "default"}


def test_room_scheduling_and_logging_are_not_compared(plain: TeacherIdentity, tiny_model_dir: Path):
    options = {"max_num_seqs": 7, "max_model_len": 200, "enable_chunked_prefill": True, "disable_log_stats": False, "seed": 3}
    other = identity_of(
        tiny_model_dir,
        vllm=VllmConfig(route="public", gpu_memory_utilization=0.5),
        tokens_per_forward=200,
        engine_options=options,
    )
    assert other.context_length == 199
    assert differences(plain, other) == {}


def test_what_moves_numbers_is_a_difference(plain: TeacherIdentity, tiny_model_dir: Path):
    overrides = {"head_dtype": "bfloat16", "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}}
    options = {"enable_lora": True, "hf_overrides": overrides, "block_size": 64}
    in_8_bits = {"engine_options.kv_cache_dtype": "'auto' != 'fp8_e5m2'"}
    try:
        other = identity_of(tiny_model_dir, engine_options=options | {"kv_cache_dtype": "fp8_e5m2"})
    except TeacherError as error:
        if "FP8 KV cache on CPU requires x86 with AVX-512" not in str(error):
            raise
        other, in_8_bits = identity_of(tiny_model_dir, engine_options=options), {}
    assert differences(plain, other) == in_8_bits | {
        "engine_options.head_dtype": "'float32' != 'bfloat16'",
        "engine_options.lora": "False != True",
        "engine_options.hf_overrides.head_dtype": "None != 'bfloat16'",
        "engine_options.hf_overrides.rope_parameters.rope_theta": "None != 500.0",
        "engine_options.hf_overrides.rope_parameters.rope_type": "None != 'default'",
        "engine_options.rope.rope_theta": "10000.0 != 500.0",
        "engine_options.block_size": "None != 64",
    }


def test_quantised_weights_are_another_teacher_and_run_in_the_worker(
    plain: TeacherIdentity, tiny_model_dir: Path, tmp_path: Path
):
    folder = quantise(tiny_model_dir, tmp_path / "tiny-llama")
    teacher = load_teacher(TeacherConfig(model=str(folder), backend="vllm", strict=True))
    found = differences(plain, teacher.identity)
    assert found.pop("weights_digest")
    assert found == {"quantization": "None != 'compressed-tensors'"}
    case = TeacherCase(teacher, dense_forward(tiny_model_dir), 1.0)
    agreement = measure_agreement(case, random_sequences(case, [60, 100]), 16)
    print(f"8-bit weights and activations against a float64 forward of the whole ones: {agreement}")
    assert 1e-3 < agreement.mean_error_nats < 0.1
    teacher.close()


def quantise(source: Path, folder: Path) -> Path:
    """A copy with the linear layers' weights in 8 bits, a scale per row, and activations quantised token by token.

    Weights reach 63, not 127: AVX2 adds pairs of products in 16 bits, and twice 255 x 64 is the most that they hold.
    """
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, folder)
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if ".layers." in name and weight.dim() == 2:
            scale = weight.abs().amax(dim=1, keepdim=True) / 63
            tensors[name], tensors[f"{name}_scale"] = (weight / scale).round().to(torch.int8), scale
        else:
            tensors[name] = weight
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    eight_bits = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": eight_bits | {"strategy": "channel", "dynamic": False},
        "input_activations": eight_bits | {"strategy": "token", "dynamic": True},
    }
    method = {"quant_method": "compressed-tensors", "format": "int-quantized", "quantization_status": "compressed"}
    fields = json.loads((folder / "config.json").read_text())
    fields["quantization_config"] = method | {"ignore": ["lm_head"], "config_groups": {"group_0": group}}
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def test_the_commit_of_a_hub_id_is_named_though_none_was_asked_for(tiny_model_dir: Path, tmp_path: Path):
    hub = tmp_path / "hub/models--org--tiny"
    shutil.copytree(tiny_model_dir, hub / "snapshots" / COMMIT)
    (hub / "refs").mkdir()
    (hub / "refs/main").write_text(COMMIT)
    code = """
from kdcache.config.teacher import TeacherConfig, VllmConfig
from kdcache.teacher import load_teacher
teacher = load_teacher(TeacherConfig(model="org/tiny", backend="vllm", vllm=VllmConfig(route="public")))
teacher.close()
print("IDENTITY", teacher.identity.model, teacher.identity.revision, teacher.identity.weights_digest)
"""
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert f"IDENTITY org/tiny {COMMIT} None" in done.stdout, done.stderr[-2000:]
