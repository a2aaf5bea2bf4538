"""vLLM's worker with a model that hands out inner states: they are chosen when it is loaded, before it is compiled."""

from __future__ import annotations

from typing import Any

from vllm.platforms import current_platform

from kdcache.teacher.vllm.layers import LAYERS, hand_out
from kdcache.teacher.vllm.worker import CaptureExtension

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as _Worker
else:
    from vllm.v1.worker.gpu_worker import Worker as _Worker


class LayeredWorker(_Worker, CaptureExtension):  # pyright: ignore[reportGeneralTypeIssues]
    """The platform's worker; `kdcache_layers` of the engine's `additional_config` names the layers.

    It names the extension as a base itself: vLLM refuses to add one that a worker has already, and an earlier engine of this
    process has added it to the platform's worker.
    """

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the model, then have it hand out the layers. What is wrong is kept as text, for `watch_layers` to tell."""
        super().load_model(*args, **kwargs)
        setattr(self, LAYERS, hand_out(self, self.vllm_config.additional_config[LAYERS]))
