"""Teachers run by transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kdcache.teacher.backend import Backend

if TYPE_CHECKING:
    from kdcache.config.teacher import TeacherConfig


class HfBackend(Backend):
    """The backend `transformers`."""

    teacher = "kdcache.teacher.hf.teacher:HfTeacher"
    packages, extra = ("torch", "transformers"), "transformers"

    def num_gpus(self, config: TeacherConfig) -> int:  # noqa: ARG002
        """See `Backend`."""
        return 1

    def spreads(self, config: TeacherConfig) -> bool:
        """See `Backend`: with a `device_map` it takes what it is given."""
        return "device_map" in config.engine_options
