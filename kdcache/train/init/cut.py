"""A student cut from its teacher: some layers, some of their width, with copies of the weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedModel

from kdcache.config.cut import LayersConfig, WidthConfig
from kdcache.errors import ConfigError
from kdcache.teacher.hf.axes import axes_of
from kdcache.train.body import text_config
from kdcache.train.init.build import with_layers
from kdcache.train.init.layers import Statistics, chosen_layers
from kdcache.train.init.narrow import check_cuttable, narrowed
from kdcache.train.init.proof import prove_layers
from kdcache.train.init.width import Kept, chosen_width


@dataclass(frozen=True, eq=False)
class Cut:
    """What was cut.

    Attributes:
        student: a model of its own, in the teacher's dtype, in evaluation mode.
        layers: the teacher's layers that it has.
        kept: channels, neurons and heads that it has.
        statistics: what decided, or None where nothing had to be measured.
    """

    student: PreTrainedModel
    layers: tuple[int, ...]
    kept: Kept
    statistics: Statistics | None


def cut_student(
    teacher: PreTrainedModel,
    layers: LayersConfig | None = None,
    width: WidthConfig | None = None,
    statistics: Callable[[], Statistics] | None = None,
) -> Cut:
    """Cut a student from its teacher.

    Args:
        teacher: in evaluation mode; it is not changed.
        layers: which of its layers are kept; None for all.
        width: how wide they are; None as wide as they were.
        statistics: gives what the teacher does with some text; asked for once, and only where the choice depends on it.

    Raises:
        ConfigError: the teacher does not have these layers or sizes, or what they make is not what the teacher makes of them.
    """
    num_layers = int(text_config(teacher).num_hidden_layers)
    asked = _Once(statistics, num_layers)
    kept_layers = chosen_layers(layers, num_layers, asked)
    student = with_layers(teacher, kept_layers)
    prove_layers(teacher, student, kept_layers)
    kept = Kept()
    if width is not None and width != WidthConfig():
        axes = axes_of(student)
        check_cuttable(width, axes, student)
        kept = chosen_width(width, axes, asked(), kept_layers)
        student = narrowed(student, axes, kept)
    return Cut(student, kept_layers, kept, asked.given)


class _Once:
    """Statistics that are asked for at most once."""

    def __init__(self, ask: Callable[[], Statistics] | None, num_layers: int) -> None:
        self._ask, self._num_layers = ask, num_layers
        self.given: Statistics | None = None

    def __call__(self) -> Statistics:
        if self._ask is None:
            raise ConfigError(
                "student: what the teacher does with some text decides what is kept here; name the text as "
                "student.statistics.data, or with --data or --cache of `kdcache student`"
            )
        if self.given is None:
            given = self._ask()
            if len(given["block_influence"]) != self._num_layers:
                measured = len(given["block_influence"])
                raise ConfigError(
                    f"student: the statistics are those of a model of {measured} layers, but the teacher has "
                    f"{self._num_layers}; name the teacher that they were measured on, or a text as student.statistics.data"
                )
            self.given = given
        return self.given
