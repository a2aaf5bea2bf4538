"""What is known of a kind of teacher before one is loaded. Nothing here imports an engine."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from kdcache.errors import TeacherError
from kdcache.extras import require

if TYPE_CHECKING:
    from kdcache.config.teacher import TeacherConfig
    from kdcache.teacher.base import Teacher
    from kdcache.teacher.features import HiddenShape


class Backend:
    """A kind of teacher, as `teacher.backend` names it.

    To add one, write a subclass and a `Teacher`, and enter the subclass in `kdcache.extensions.OWN`, or from another package
    as an entry point of the group `kdcache.teachers`. The subclass is asked before anything is loaded, on machines without
    the engine too: its module imports nothing heavy.

    Attributes:
        teacher: `module:Class` of its `Teacher`, which is called with the config. It is imported when a teacher is loaded.
        packages: those that it needs, of `kdcache.extras.EXTRAS`, the decisive one last.
        extra: the extra of kdcache that brings them.
        name: in a config.
    """

    teacher: str = ""
    packages: tuple[str, ...] = ()
    extra: str | None = None

    def __init__(self, name: str) -> None:
        self.name = name

    def load(self, config: TeacherConfig) -> Teacher:
        """Load the model that a config names; raises as `kdcache.teacher.load_teacher`."""
        return self.teacher_class(f"teacher.backend {self.name!r}")(config)

    def num_gpus(self, config: TeacherConfig) -> int:  # noqa: ARG002
        """How many GPUs one teacher computes on, on a machine that has them."""
        return 0

    def spreads(self, config: TeacherConfig) -> bool:  # noqa: ARG002
        """Whether it takes every GPU that it is given, however many `num_gpus` says it needs."""
        return False

    def tokenizer_name(self, config: TeacherConfig) -> str:
        """The tokenizer of a config that names none, for `kdcache.teacher.load_tokenizer`."""
        return config.model

    def hidden_shape(self, config: TeacherConfig) -> HiddenShape | None:
        """The hidden states that the model will have; None where that is not known before it is loaded."""
        from kdcache.teacher.features import stated_shape

        return stated_shape(config)

    def teacher_class(self, purpose: str) -> Any:
        """The class of its teachers.

        Args:
            purpose: what needs it: the beginning of a sentence.

        Raises:
            MissingDependencyError: a package is not installed.
            TeacherError: a package is installed and does not import.
        """
        return import_class(self.teacher, self.packages, purpose=purpose, extra=self.extra)


def import_class(path: str, packages: Sequence[str], *, purpose: str, extra: str | None) -> Any:
    """What `module:Class` names, after a look whether the packages that it needs are there.

    Args:
        path: `module:Class`.
        packages: that it needs, the decisive one last.
        purpose: what needs them: the beginning of a sentence.
        extra: that brings them.

    Raises:
        MissingDependencyError: one is not installed.
        TeacherError: they are installed, but the module does not import.
    """
    require(*packages, purpose=purpose, extra=extra)
    module, _, name = path.partition(":")
    try:
        return getattr(import_module(module), name)
    # A build for other hardware or another torch fails in many ways: ImportError, OSError, RuntimeError.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        what = f"{packages[-1]} is installed but" if packages else module
        raise TeacherError(f"{purpose}: {what} does not import: {reason}") from error
