"""A student cut from its teacher outside any training run: what `kdcache student` does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from kdcache.config.train import StudentConfig
from kdcache.errors import MismatchError
from kdcache.loader.cache import Cache, open_cache
from kdcache.teacher import load_tokenizer
from kdcache.teacher.tokenizer import Tokenizer
from kdcache.train.evaluation.heldout import read_heldout
from kdcache.train.init.folder import refuse_taken, write_student
from kdcache.train.init.from_teacher import cut_from_teacher
from kdcache.train.init.report import Look, look_at, report_of
from kdcache.train.init.texts import source_of


@dataclass(frozen=True, kw_only=True)
class StandaloneConfig:
    """What to make.

    Attributes:
        student: with `init: from_teacher`.
        out: folder of the student.
        cache: whose text or statistics decide where `student.statistics.data` is None; or None.
        heldout: file of text on which both are scored; or None.
        max_tokens: of it.
        dtype: of the weights; `auto` for the teacher's.
    """

    student: StudentConfig
    out: str
    cache: str | None = None
    heldout: str | None = None
    max_tokens: int = 20_000
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"


def make_student(config: StandaloneConfig) -> dict[str, Any]:
    """Cut the student, write its folder, and give the report.

    Raises:
        ConfigError: the teacher does not load or cannot be cut so, or the folder is taken.
        InputError: a text that cannot be read.
        MismatchError: the cache is another teacher's.
    """
    student, out = config.student, Path(config.out)
    refuse_taken(out)
    name = student.tokenizer or student.model
    tokenizer = load_tokenizer(name, student.revision)
    heldout = []
    if config.heldout is not None:
        window = student.statistics.window
        heldout = read_heldout(config.heldout, tokenizer, window=window, max_tokens=config.max_tokens)
    dtype = "auto" if config.dtype == "auto" else getattr(torch, config.dtype)
    looks: list[Look] = []
    with _opened(config.cache) as cache:
        _check_cache(cache, tokenizer)
        source = source_of(student, lambda: tokenizer, cache)
        measure = source.measure if source else None
        cut = cut_from_teacher(student, measure, dtype=dtype, look=lambda teacher: looks.append(look_at(teacher, heldout)))
    report = report_of(student, cut, looks[-1], look_at(cut.student, heldout), source.name if source else None)
    write_student(out, cut.student, report, tokenizer=name)
    return report


def _check_cache(cache: Cache | None, tokenizer: Tokenizer) -> None:
    if cache is not None and cache.manifest.identity.tokenizer.fingerprint != tokenizer.identity.fingerprint:
        theirs = cache.manifest.identity.tokenizer.name
        raise MismatchError(
            f"--cache: its token ids are those of the tokenizer {theirs!r}, which is not the teacher's; name a cache of this "
            "teacher, or a text with --data"
        )


@contextmanager
def _opened(cache: str | None) -> Iterator[Cache | None]:
    if cache is None:
        yield None
        return
    with open_cache(cache) as opened:
        yield opened
