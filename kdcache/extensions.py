"""Codecs, divergences, losses, teachers and input formats: ours by name, and those of other packages by entry point.

One table lists what kdcache brings, so that adding one inside the package takes its file and a line here. A package outside
adds one with a line of its `pyproject.toml`, and needs no change of kdcache:

    [project.entry-points."kdcache.codecs"]
    toy = "my_package.toy:ToyCodec"

The name on the left is what a config, the command line and a cache's manifest say. Nothing is imported before it is asked
for by name. A name of ours cannot be taken by another package.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal

from kdcache.errors import ConfigError
from kdcache.shown import shown

Kind = Literal["codecs", "divergences", "inputs", "losses", "teachers"]

OWN: dict[Kind, dict[str, str]] = {
    "codecs": {
        "raw": "kdcache.codec.raw:RawCodec",
        "packed": "kdcache.codec.packed:PackedCodec",
        "quantized": "kdcache.codec.quantized:QuantizedCodec",
        "archive": "kdcache.codec.archive.codec:ArchiveCodec",
    },
    "divergences": {},
    "inputs": {
        "txt": "kdcache.inputs.formats.text_files:TXT",
        "lines": "kdcache.inputs.formats.text_files:LINES",
        "jsonl": "kdcache.inputs.formats.text_files:JSONL",
        "parquet": "kdcache.inputs.formats.table_files:PARQUET",
        "arrow": "kdcache.inputs.formats.table_files:ARROW",
        "dataset": "kdcache.inputs.formats._datasets:DATASET",
    },
    "losses": {
        "divergence": "kdcache.train.terms.divergence:DivergenceTerm",
        "cross_entropy": "kdcache.train.terms.divergence:CrossEntropyTerm",
        "further_tokens": "kdcache.train.terms.further_tokens:FurtherTokens",
        "dpkd": "kdcache.train.terms.dpkd:DPKD",
        "ranking": "kdcache.train.terms.ranking:Ranking",
        "dual_space": "kdcache.train.terms.dual_space:DualSpace",
        "exact_kl": "kdcache.train.terms.exact_kl:ExactKL",
        "hidden_states": "kdcache.train.terms.hidden_states:HiddenStatesTerm",
        "relations": "kdcache.train.terms.relations:RelationsTerm",
        "attention": "kdcache.train.terms.attention:AttentionTerm",
        "rkd": "kdcache.train.terms.rkd:RkdTerm",
        "crd": "kdcache.train.terms.crd:CrdTerm",
    },
    "teachers": {
        "auto": "kdcache.teacher.auto:AutoBackend",
        "vllm": "kdcache.teacher.vllm:VllmBackend",
        "transformers": "kdcache.teacher.hf:HfBackend",
        "served": "kdcache.teacher.served:ServedBackend",
        "fake": "kdcache.teacher.fake:FakeBackend",
    },
}
"""kind -> name -> "module:attribute", for what kdcache itself brings."""


def names(kind: Kind) -> list[str]:
    """List every name of a kind: ours first, then those of installed packages, sorted."""
    outside = {point.name for point in entry_points(group=f"kdcache.{kind}")}
    return [*OWN[kind], *sorted(outside - OWN[kind].keys())]


def is_known(kind: Kind, name: str) -> bool:
    """Whether a name of this kind can be found; imports nothing."""
    return name in OWN[kind] or bool(_outside(kind, name))


def find(kind: Kind, name: str) -> Any:
    """Import what a name stands for.

    Args:
        kind: the group of entry points, without "kdcache.".
        name: as a config or a manifest has it.

    Returns:
        The class or function; what it must be is said where its kind is described.

    Raises:
        ConfigError: no package brings the name, two bring it, or the one that does cannot be imported.
    """
    if name in OWN[kind]:
        module, _, attribute = OWN[kind][name].partition(":")
        return getattr(import_module(module), attribute)
    points = _outside(kind, name)
    if not points:
        raise ConfigError(f"no installed package brings {name!r} to kdcache.{kind}; known are {', '.join(names(kind))}")
    if len(points) > 1:
        raise ConfigError(
            f"{' and '.join(sorted(map(_package, points)))} all bring {name!r} to kdcache.{kind}; uninstall all but one"
        )
    return _load(kind, points[0])


def _outside(kind: Kind, name: str) -> list[EntryPoint]:
    """The entry points of this name, once per package: a package may be found along two paths."""
    return list(_on_path(kind, name, tuple(sys.path)))


@lru_cache(maxsize=256)
def _on_path(kind: Kind, name: str, _path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    # Milliseconds, which a training would pay in each step: looked up once for each list of folders that Python searches.
    found = entry_points(group=f"kdcache.{kind}", name=name)
    return tuple({(_package(point), point.value): point for point in found}.values())


def _package(point: EntryPoint) -> str:
    return point.value if point.dist is None else f"{point.dist.name} {point.dist.version}"


def _load(kind: Kind, point: EntryPoint) -> Any:
    try:
        return point.load()
    # The module of a stranger may fail in any way.
    except Exception as error:
        raise ConfigError(
            f"{_package(point)} brings {point.name!r} to kdcache.{kind}, but {point.value} cannot be imported: "
            f"{type(error).__name__}: {shown(str(error))}"
        ) from error
