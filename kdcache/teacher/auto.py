"""The backend `auto`: vLLM where it is installed and imports, else transformers."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from kdcache.errors import TeacherError
from kdcache.shown import get_logger
from kdcache.teacher import find_backend
from kdcache.teacher.backend import Backend

if TYPE_CHECKING:
    from kdcache.config.teacher import TeacherConfig
    from kdcache.teacher.base import Teacher

log = get_logger(__name__)


class AutoBackend(Backend):
    """Chooses when a teacher is loaded, and says on the log what it chose. Before that it counts GPUs as vLLM does."""

    def load(self, config: TeacherConfig) -> Teacher:
        """See `Backend`; with `strict`, a vLLM that is installed and does not import is an error."""
        return find_backend(self._choose(strict=config.strict)).load(config)

    def num_gpus(self, config: TeacherConfig) -> int:
        """See `Backend`."""
        return find_backend("vllm").num_gpus(config)

    def spreads(self, config: TeacherConfig) -> bool:
        """See `Backend`."""
        return find_backend("transformers").spreads(config)

    def _choose(self, *, strict: bool) -> str:
        if find_spec("vllm") is None:
            log.info("teacher.backend auto: vllm is not installed, using transformers")
            return "transformers"
        try:
            find_backend("vllm").teacher_class("teacher.backend 'auto'")
        except TeacherError as error:
            if strict:
                raise
            log.warning("teacher.backend auto: using transformers, as %s", error)
            return "transformers"
        log.info("teacher.backend auto: using vllm")
        return "vllm"
