"""What was cut from a teacher, as people read it; takes the plain data of `report.json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kdcache.report.table import Table

_WORDS = {
    "parameters": "parameters",
    "non_embedding": "without embeddings",
    "num_hidden_layers": "layers",
    "hidden_size": "hidden size",
    "intermediate_size": "neurons per layer",
    "num_attention_heads": "heads",
    "num_key_value_heads": "heads of keys and values",
}


def size_table(report: Mapping[str, Any]) -> Table:
    """Make a line per size, of the teacher and of the student; and their held-out losses, if they were measured."""
    teacher, student = report["teacher"], report["student"]
    lines = [_size_line(_WORDS[name], teacher[name], student[name]) for name in _WORDS if name in teacher and name in student]
    heldout = report["heldout_nats_per_token"]
    if heldout is not None:
        losses = [f"{heldout[name]:.4f}" for name in ("teacher", "student")]
        lines.append(["held-out nats per token, before any training", *losses, ""])
    return Table(["", "teacher", "student", "share"], lines)


def layer_table(report: Mapping[str, Any]) -> Table | None:
    """Make a line per layer of the teacher: its block influence, and which layer of the student it is; None if not measured."""
    statistics = report["statistics"]
    if statistics is None:
        return None
    index_of = {layer: index for index, layer in enumerate(report["layers"])}
    lines = [
        [str(layer), f"{influence:.4f}", str(index_of.get(layer, "left out"))]
        for layer, influence in enumerate(statistics["block_influence"])
    ]
    return Table(["layer", "block influence", "in the student"], lines)


def student_sentences(report: Mapping[str, Any]) -> list[str]:
    """Say which layers stay, and what decided."""
    kept = ", ".join(map(str, report["layers"]))
    sentences = [f"layers {kept} of the teacher's {report['teacher']['num_hidden_layers']}"]
    statistics = report["statistics"]
    if statistics is not None:
        sentences.append(
            f"measured on {statistics['num_sequences']:,} sequences, {statistics['num_positions']:,} tokens, of "
            f"{statistics['source']}"
        )
    return sentences


def _size_line(words: str, teacher: int, student: int) -> list[str]:
    return [words, f"{teacher:,}", f"{student:,}", f"{100 * student / teacher:.1f}%" if teacher else ""]
