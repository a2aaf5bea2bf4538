"""The student that a training run begins with, or began with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from kdcache.config.train import TrainConfig
from kdcache.loader.cache import Cache
from kdcache.teacher import load_tokenizer
from kdcache.train.init.folder import initial_again, keep_initial
from kdcache.train.init.from_teacher import cut_from_teacher
from kdcache.train.init.report import Look, look_at, report_of
from kdcache.train.init.texts import source_of
from kdcache.train.runs.checkpoint import newest_checkpoint
from kdcache.train.runs.run_folder import CHECKPOINTS, STUDENT, RunFolder
from kdcache.train.student import build_student


@dataclass(frozen=True)
class Initial:
    """A student before its first step.

    Attributes:
        model: in float32 on the CPU.
        report: what was cut from the teacher just now; None for a student that was not, or was before.
    """

    model: PreTrainedModel
    report: dict[str, Any] | None = None

    def keep(self, folder: RunFolder) -> None:
        """Note in the run's directory what was cut, so that a resumed run need not ask the teacher again."""
        if self.report is not None:
            keep_initial(folder.student, self.model, self.report)


def initial_student(config: TrainConfig, cache: Cache, device: torch.device) -> Initial:
    """Build, load or cut the student; a run with a checkpoint gets the one that it began with.

    Args:
        config: of the run.
        cache: what it trains on, whose text a teacher may be measured on.
        device: where a teacher is measured.

    Raises:
        ConfigError: see `build_student`.
        StateError: the run cannot be resumed, since what was cut is not known any more.
    """
    if config.student.init != "from_teacher":
        return Initial(build_student(config.student, seed=config.seed))
    torch.manual_seed(config.seed)  # for dropout
    out = Path(config.out)
    if newest_checkpoint(out / CHECKPOINTS) is not None:
        return Initial(initial_again(out / STUDENT, config.student))
    student = config.student
    name = student.tokenizer or student.model
    source = source_of(student, lambda: load_tokenizer(name, student.revision), cache, device)
    looks: list[Look] = []
    cut = cut_from_teacher(student, source.measure if source else None, look=lambda teacher: looks.append(look_at(teacher)))
    return Initial(cut.student, report_of(student, cut, looks[-1], look_at(cut.student), source.name if source else None))
