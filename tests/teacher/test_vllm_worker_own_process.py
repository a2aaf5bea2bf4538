"""The worker route with the engine in a process of its own, as it is on GPUs by default."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.slow]

TESTS = Path(__file__).parent.parent

OWN_PROCESS = """
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = sys.argv[2:]
    from contracts.teacher import TeacherCase, answers_come_in_the_order_given, closing, position_t_has_read_tokens_up_to_t
    from contracts.teacher import every_selection_that_it_makes_is_the_definition_of_its_distribution as every_selection
    from dense_forward import dense_forward
    from kdcache.config.teacher import TeacherConfig, VllmConfig
    from kdcache.teacher import load_teacher

    folder = Path(sys.argv[1])
    worker = VllmConfig(route="worker")
    config = TeacherConfig(model=str(folder), backend="vllm", vllm=worker, tokens_per_forward=64, chunk_positions=24)
    teacher = load_teacher(config)
    print("CLIENT", type(teacher._engine.llm_engine.engine_core).__name__)
    case = TeacherCase(teacher, dense_forward(folder), 5e-5)
    for promise in (position_t_has_read_tokens_up_to_t, answers_come_in_the_order_given, every_selection, closing):
        promise(case)
        print("KEPT", promise.__name__)
"""


def test_an_engine_in_its_own_process_gives_every_selection_too(tiny_model_dir: Path, tmp_path: Path):
    script = tmp_path / "own_process.py"
    script.write_text(OWN_PROCESS)
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    command = [sys.executable, str(script), str(tiny_model_dir), str(TESTS), str(TESTS / "teacher")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "CLIENT SyncMPClient" in done.stdout  # and not the one of an engine in the same process
    assert done.stdout.count("KEPT") == 4
