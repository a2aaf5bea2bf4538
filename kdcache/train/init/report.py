"""What was cut, in numbers: plain data, as `report.json` holds it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from kdcache.config.train import StudentConfig
from kdcache.teacher.checkpoint import resolved_revision, short_name, weights_digest
from kdcache.teacher.hf.activations import angular_distances, block_influence
from kdcache.teacher.hf.axes import FIELDS
from kdcache.train.body import model_size, text_config
from kdcache.train.evaluation.heldout import HeldoutSequence
from kdcache.train.evaluation.scores import heldout_nats_per_token
from kdcache.train.init.cut import Cut
from kdcache.train.init.layers import Statistics


@dataclass(frozen=True)
class Look:
    """What is known of one model.

    Attributes:
        sizes: parameters, layers, and the sizes of its configuration.
        heldout_nats_per_token: or None where no held-out text was given.
    """

    sizes: dict[str, int]
    heldout_nats_per_token: float | None


def look_at(model: PreTrainedModel, heldout: Sequence[HeldoutSequence] = ()) -> Look:
    """Count a model's parameters, and score it on held-out text if there is some."""
    text = text_config(model)
    sizes = model_size(model) | {"num_hidden_layers": int(text.num_hidden_layers)}
    for names in FIELDS.values():
        field = next((name for name in names if isinstance(getattr(text, name, None), int)), None)
        if field is not None:
            sizes[names[0]] = getattr(text, field)
    return Look(sizes, heldout_nats_per_token(model, heldout) if heldout else None)


def report_of(config: StudentConfig, cut: Cut, teacher: Look, student: Look, source: str | None) -> dict[str, Any]:
    """The report.

    Args:
        config: what was asked for.
        cut: what was done.
        teacher, student: both models.
        source: where the statistics came from.
    """
    return {
        "teacher": {
            "model": short_name(config.model),
            "revision": resolved_revision(config.model, config.revision),
            "weights_digest": weights_digest(config.model),
            **teacher.sizes,
        },
        "student": student.sizes,
        "share_of_non_embedding": student.sizes["non_embedding"] / max(teacher.sizes["non_embedding"], 1),
        "layers": list(cut.layers),
        "heads": None if cut.kept.heads is None else [heads.tolist() for heads in cut.kept.heads],
        "statistics": None if cut.statistics is None else _statistics(cut.statistics, source, len(cut.layers)),
        "heldout_nats_per_token": None
        if student.heldout_nats_per_token is None
        else {"teacher": teacher.heldout_nats_per_token, "student": student.heldout_nats_per_token},
    }


def _statistics(statistics: Statistics, source: str | None, num_kept: int) -> dict[str, Any]:
    angles = angular_distances(statistics)
    span = max(len(angles) - 1 - num_kept, 1)
    return {
        "source": source,
        "num_sequences": int(statistics["num_sequences"][0]),
        "num_positions": int(statistics["num_positions"][0]),
        "block_influence": [float(value) for value in block_influence(statistics)],
        # Of as many neighbouring layers as were left out, by the first of them.
        "angular_distance": [float(angles[layer, layer + span]) for layer in range(len(angles) - span)],
    }
