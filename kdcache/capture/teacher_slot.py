"""The teacher of a worker, loaded again when its engine does not survive a failure."""

from __future__ import annotations

from kdcache.capture.features import features_of
from kdcache.capture.generate import writer_of
from kdcache.capture.job import selection_info
from kdcache.config.capture import CaptureConfig
from kdcache.errors import CaptureError, ConfigError, KdcacheError
from kdcache.shown import get_logger
from kdcache.teacher import load_teacher
from kdcache.teacher.base import Teacher

log = get_logger(__name__)


class TeacherLostError(CaptureError):
    """The teacher did not survive a failure and cannot be replaced."""


class TeacherSlot:
    """Holds the teacher, or the one that was loaded in its stead. Close it."""

    def __init__(self, config: CaptureConfig) -> None:
        """Load the teacher; raises as `load_teacher`."""
        self._config = config
        self.teacher: Teacher = load_teacher(config.teacher)
        if config.generate is not None:
            try:
                writer_of(self.teacher)
            except ConfigError:
                self.teacher.close()
                raise

    def mend(self) -> None:
        """Load the teacher again after a failure, unless it still takes requests.

        Raises:
            TeacherLostError: it cannot be loaded again, or has changed.
        """
        try:
            self._ask_nothing()
            return
        except KdcacheError as error:
            log.warning("the teacher no longer takes requests (%s); loading it again", error)
        identity = self.teacher.identity
        self.teacher.close()
        try:
            self.teacher = load_teacher(self._config.teacher)
        except KdcacheError as error:
            raise TeacherLostError(
                f"the teacher failed and could not be loaded again: {error}; what is published is kept, and the same command "
                "resumes from there"
            ) from error
        if self.teacher.identity != identity:
            raise TeacherLostError(
                f"the teacher {identity.model!r} changed when it was reloaded after a failure; restore the one the capture was "
                "started with, or start another capture"
            )

    def close(self) -> None:
        """Give the model's memory back."""
        self.teacher.close()

    def _ask_nothing(self) -> None:
        """An engine that is gone refuses even an empty list."""
        list(self.teacher.score([], selection_info(self._config), features_of(self._config, self.teacher)))
