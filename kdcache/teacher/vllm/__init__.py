"""Teachers run by vLLM's offline engine, with the selection made inside its worker.

- `teacher` holds the contract, the choice between the two routes and the proof of the worker route.
- `engine` starts and ends the engine, `options` is what it is started with.
- `worker` selects inside the engine's worker, `worker_features` takes hidden states there, `wire` is what passes between them
  and the teacher.
- `internals` is all that is known of vLLM's internals; `signatures` lists the names of vLLM that we use, checked at the start
  and by `tools/check_vllm.py`.
- `requests` makes the requests of both routes and reads the public one's answers; `generate` has the engine write answers.
- `adapter` says which LoRA adapters are captured.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

from kdcache.teacher.backend import Backend

if TYPE_CHECKING:
    from kdcache.config.teacher import TeacherConfig

_PARALLEL = ("tensor_parallel_size", "pipeline_parallel_size", "prefill_context_parallel_size", "data_parallel_size")
"""Settings of vLLM whose product is the number of its GPUs (`ParallelConfig.world_size_across_dp`, 0.24 to 0.32); its
other kinds of parallelism share these."""


class VllmBackend(Backend):
    """The backend `vllm`."""

    teacher = "kdcache.teacher.vllm.teacher:VllmTeacher"
    packages, extra = ("vllm",), "vllm"

    def num_gpus(self, config: TeacherConfig) -> int:
        """See `Backend`. engine_options have the last word, as in the engine, which refuses a size that is not a number."""
        options: dict[str, Any] = {"tensor_parallel_size": config.vllm.tensor_parallel_size} | config.engine_options
        sizes = [options.get(name) for name in _PARALLEL]
        return prod(size for size in sizes if isinstance(size, int) and size > 0)
