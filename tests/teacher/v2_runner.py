"""Run as a program: vLLM's V2 model runner, the one that GPUs use, on a CPU in Triton's interpreter; labels by both routes.

Argument: a model's folder. Prints which runner it was, the largest difference between worker and public route and the largest
error against a float64 forward, in nats, and the largest error of the hidden states of all layers. The way to make the
interpreter do is for vLLM 0.32.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

LAYERS = (0, 1, 2, -1)
"""Of a model of two layers: 2 is before the final norm, -1 after it."""

os.environ |= {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1", "VLLM_CPU_CI_ENV": "1"}


class StubDriver:
    """What vLLM and Triton ask of a driver before a kernel runs; the interpreter needs no more."""

    @staticmethod
    def is_active() -> bool:
        return True

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: Any = None) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cpu", 0, 32)


def main(folder: Path) -> None:
    import triton.backends
    from triton.backends import Backend

    triton.backends.backends["cpu"] = Backend(compiler=None, driver=StubDriver)  # type: ignore[arg-type]
    import numpy as np
    from contracts.teacher import TeacherCase, largest_error, random_sequences, score, top_k
    from dense_forward import dense_forward
    from test_hf_features import expected_states

    from kdcache.config.capture import FeatureConfig
    from kdcache.config.teacher import TeacherConfig, VllmConfig
    from kdcache.teacher import load_teacher
    from kdcache.teacher.features import resolve_features

    teacher: Any = load_teacher(
        TeacherConfig(
            model=str(folder), backend="vllm", vllm=VllmConfig(route="worker"), tokens_per_forward=64, chunk_positions=24
        )
    )
    runner = teacher._llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    case = TeacherCase(teacher, dense_forward(folder), 5e-5)
    sequences = random_sequences(case, [150, 1, 2, 97, 33])
    ours, theirs = score(case, sequences, 16), list(teacher._score_publicly(sequences, top_k(16)))
    between = max(float(np.abs(a.logprobs_E - b.logprobs_E).max()) for a, b in zip(ours, theirs, strict=True))
    dense = max(largest_error(a, case.dense(s)) for a, s in zip(ours, sequences, strict=True))
    features = resolve_features([FeatureConfig(layer=layer) for layer in LAYERS], teacher.hidden_shape)
    hidden = 0.0
    for sequence, answer in zip(sequences, teacher.score(sequences, top_k(2), features), strict=True):
        states = expected_states(folder, sequence)
        for found, layer in zip(answer.features.values(), LAYERS, strict=True):
            hidden = max(hidden, float(np.abs(found - states[layer]).max()))
    kind = "V2" if hasattr(runner, "prompt_logprobs_worker") else "V1"
    teacher.close()
    print(f"RUNNER {kind} {between} {dense} {hidden}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
