"""What `doctor`, `convert` and `verify --deep` share: which teacher to ask, by flags or by what a cache's manifest says."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from kdcache.errors import ConfigError

if TYPE_CHECKING:
    from kdcache.config.capture import TeacherConfig
    from kdcache.teacher.base import Teacher

BACKENDS = ("auto", "vllm", "transformers", "served", "fake")
DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_teacher_arguments(parser: argparse.ArgumentParser, *, what: str) -> None:
    """Declare --teacher, --backend and --dtype."""
    parser.add_argument("--teacher", metavar="MODEL", help=what)
    parser.add_argument("--backend", choices=BACKENDS, help="what runs the teacher (default: auto, or the capture's own)")
    parser.add_argument("--dtype", choices=DTYPES, help="of the teacher's weights (default: auto, or the capture's own)")


def teacher_config(args: argparse.Namespace, captured: Mapping[str, Any] | None = None) -> TeacherConfig:
    """The teacher's config: that of a capture, with what the flags say in its place.

    Raises:
        ConfigError: no model is named, or the manifest's section is not one of this version.
    """
    import msgspec

    from kdcache.config.capture import TeacherConfig

    fields = dict(captured or {})
    given = {"model": args.teacher, "backend": args.backend, "dtype": args.dtype}
    fields |= {name: value for name, value in given.items() if value is not None}
    if "model" not in fields:
        raise ConfigError("the cache does not say which model to load; name it with --teacher MODEL")
    try:
        return msgspec.convert(fields, TeacherConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(
            f"the teacher section of the cache's config is not one of this version: {error}; use --teacher"
        ) from error


@contextmanager
def loaded(config: TeacherConfig | None) -> Iterator[Teacher | None]:
    """The teacher, closed at the end; None for no config."""
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
    """An argparse type: a whole number that is not smaller."""

    def parse(text: str) -> int:
        value = int(text)
        if value < smallest:
            raise argparse.ArgumentTypeError(f"{value} is below {smallest}")
        return value

    parse.__name__ = "whole number"  # argparse shows it for text that is no number
    return parse
