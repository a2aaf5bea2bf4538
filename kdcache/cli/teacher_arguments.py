"""What `doctor`, `convert` and `verify --deep` share: which teacher is asked, from the user's flags and config only."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from kdcache import extensions
from kdcache.config.describe import choices_of, type_at
from kdcache.config.renamed import new_name
from kdcache.config.teacher import TeacherConfig
from kdcache.errors import ConfigError
from kdcache.shown import shown

if TYPE_CHECKING:
    from kdcache.teacher.base import Teacher

_MOST = 100
"""Characters of a setting that are shown."""


def add_teacher_arguments(parser: argparse.ArgumentParser, *, what: str) -> None:
    """Declare --teacher, --teacher-config, --backend and --dtype."""
    parser.add_argument("--teacher", metavar="MODEL", help=what)
    parser.add_argument(
        "--teacher-config", metavar="CONFIG.yaml", help="your capture config, whose section `teacher` says how to run it"
    )
    parser.add_argument("--backend", choices=extensions.names("teachers"), help="what runs the teacher (default: auto)")
    parser.add_argument(
        "--dtype", choices=choices_of(type_at(TeacherConfig, ["dtype"])), help="of the teacher's weights (default: auto)"
    )


def add_sample_arguments(parser: argparse.ArgumentParser, *, prefix: str = "") -> None:
    """Declare --num-sequences and --seed: about what the teacher is asked."""
    parser.add_argument(
        "--num-sequences", type=at_least(1), default=16, metavar="N",
        help=f"{prefix}sequences to ask the teacher about, chosen at random (default: 16)",
    )  # fmt: skip
    parser.add_argument("--seed", type=at_least(0), default=0, metavar="N", help=f"{prefix}seed of that choice (default: 0)")


def asks_teacher(args: argparse.Namespace) -> bool:
    """Whether the flags name a teacher."""
    return args.teacher is not None or args.teacher_config is not None


def teacher_config(args: argparse.Namespace) -> TeacherConfig:
    """The teacher's config, from the flags and the user's own file only.

    Never from a cache: a model can run code, read files and call servers, and the cache's author would choose which.

    Raises:
        ConfigError: no model is named, or the file has no valid section `teacher`.
    """
    from kdcache.config.load import convert_config, read_yaml_mapping

    fields: dict[str, Any] = {}
    if args.teacher_config is not None:
        section = read_yaml_mapping(args.teacher_config).get("teacher")
        if not isinstance(section, dict):
            raise ConfigError(f"{args.teacher_config}: no section `teacher`; expected a capture config")
        fields = dict(section)
    given = {"model": args.teacher, "backend": args.backend, "dtype": args.dtype}
    fields |= {name: value for name, value in given.items() if value is not None}
    return convert_config(fields, TeacherConfig, where=args.teacher_config or "--teacher")


def captured_teacher(captured: Any) -> dict[str, Any]:
    """How the cache's manifest says its teacher was run, to be shown and compared; empty if it says nothing."""
    return {str(name): value for name, value in captured.items()} if isinstance(captured, Mapping) else {}


def unnamed_teacher(cache: str, captured: Any) -> ConfigError:
    """The error for flags that name no teacher."""
    said = captured_teacher(captured)
    names = [name for name in ("model", "revision", "backend", "dtype") if said.get(name)]
    says = ", ".join(f"{name} {shown(repr(said[name]), _MOST)}" for name in names)
    return ConfigError(
        f"{cache}: name the teacher to ask with --teacher MODEL or --teacher-config CONFIG.yaml; it is never taken from the "
        f"cache, since a model can run code and call servers (the cache says: {says or 'nothing'})"
    )


def setting_differences(config: TeacherConfig, captured: Any) -> list[str]:
    """A line for each setting in which the cache's teacher differs from the one that will be asked."""
    import msgspec

    ours, theirs = _settings(msgspec.to_builtins(config)), _settings(captured_teacher(captured))
    return [
        f"note: according to the cache, its teacher had {shown(name, _MOST)} {shown(repr(value), _MOST)}; "
        f"asked with {shown(repr(ours.get(name)), _MOST)}"
        for name, value in sorted(theirs.items())
        if value != ours.get(name)
    ]


def _settings(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Setting -> value, those of a backend's section by path; settings that were renamed since under their new names.

    A server's address and key are left out: they are not settings of the teacher.
    """
    found: dict[str, Any] = {}
    for name, value in fields.items():
        if name in ("vllm", "fake") and isinstance(value, Mapping):
            found |= {f"{name}.{field}": setting for field, setting in value.items()}
        elif name != "server":
            found[(new_name(f"teacher.{name}") or name).removeprefix("teacher.")] = value
    return found


@contextmanager
def loaded(config: TeacherConfig | None) -> Iterator[Teacher | None]:
    """Load the teacher and close it at the end; None for no config."""
    if config is None:
        yield None
        return
    from kdcache.teacher import load_teacher

    teacher = load_teacher(config)
    try:
        yield teacher
    finally:
        teacher.close()


def at_least(smallest: int) -> Any:
    """An argparse type: a whole number of at least this size."""

    def parse(text: str) -> int:
        value = int(text)
        if value < smallest:
            raise argparse.ArgumentTypeError(f"{value} is below {smallest}")
        return value

    parse.__name__ = "whole number"  # argparse shows it for text that is not a number
    return parse
