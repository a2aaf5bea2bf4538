"""What is made once for a whole cache, before its first unit: what features are fitted to, and sidecars that are asked for.

It is made from a sample that is a function of the plan, so every worker would make the same; the first one to publish manifest
0 decides, and all others, and every later run, take what is there. A worker that is killed before that leaves nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.capture.features import features_of
from kdcache.capture.generate import write_sequences
from kdcache.capture.job import Job, check_fits, first_manifest, recorded_moment, selection_info
from kdcache.capture.requests import Request, make_requests
from kdcache.codec.features.fit import SAMPLE_VECTORS, FittedFeature, fit_feature, needs_fit
from kdcache.config.capture import CaptureConfig
from kdcache.errors import FormatError, InputError, MismatchError
from kdcache.format.manifest import FeatureInfo
from kdcache.format.output_projection import OUTPUT_PROJECTION
from kdcache.format.record import TokenSequence
from kdcache.format.sidecar import SidecarFile, make_sidecar
from kdcache.shown import get_logger
from kdcache.store import chain
from kdcache.store.writing.writer import CacheWriter
from kdcache.teacher.base import Teacher
from kdcache.teacher.generation import Prompt
from kdcache.teacher.sidecars import ACTIVATION_STATISTICS, SidecarTeacher, no_sidecar

log = get_logger(__name__)

STATISTICS_SEQUENCES = 256
"""Sequences that `activation_statistics` are of."""

MAX_SAMPLE_TOKENS = 2**19
"""Tokens after which a sample ends, however few vectors it has given: a pooled feature has one per sequence."""

_GROUP = 32
"""Sequences that the teacher is asked about at once."""

Beat = Callable[[], None]


def open_cache_writer(job: Job, teacher: Teacher, beat: Beat = lambda: None) -> CacheWriter:
    """Open the job's cache for writing; start it, with all that is made once, if it does not exist.

    Args:
        job: the capture.
        teacher: of the job.
        beat: called as the work proceeds.

    Raises:
        ConfigError: the teacher does not fit the config. MismatchError: the cache belongs to another capture.
    """
    check_fits(job.config, teacher)
    _check_sidecars(job.config, teacher)
    features, sidecars = features_of(job.config, teacher), list[SidecarFile]()
    if not chain.manifest_numbers(job.path):
        fitted = fitted_features(job, teacher, features, beat)
        features = tuple(fitted[feature.name].info if feature.name in fitted else feature for feature in features)
        sidecars = [sidecar for each in fitted.values() for sidecar in each.sidecars]
        sidecars += [make_sidecar(name, *_make(name, job, teacher, beat)) for name in job.config.sidecars]
    manifest = first_manifest(job, teacher.identity, features)
    writer = CacheWriter.open(job.path, manifest, record_batch_bytes=job.config.shards.record_batch_bytes, sidecars=sidecars)
    _add_missing(job, teacher, writer, beat)
    # Of processes that start at once, one has started the cache: its moment counts.
    started = recorded_moment(chain.newest_manifest(job.path)) if job.tokenizer.reads_clock else None
    if started is not None:
        job.tokenizer.set_clock(started)
    return writer


def fitted_features(
    job: Job, teacher: Teacher, features: Sequence[FeatureInfo], beat: Beat = lambda: None
) -> dict[str, FittedFeature]:
    """Fit the features that need it to the teacher's vectors on a sample of the input: name -> fit."""
    asked = [feature for feature in features if needs_fit(feature)]
    if not asked:
        return {}
    parts: dict[str, list[NDArray[np.float32]]] = {feature.name: [] for feature in asked}
    counts, num_tokens = dict.fromkeys(parts, 0), 0
    sample = sample_sequences(job, teacher)
    while min(counts.values()) < SAMPLE_VECTORS and num_tokens < MAX_SAMPLE_TOKENS:
        group = list(islice(sample, _GROUP))
        if not group:
            break
        for answer in teacher.score(group, selection_info(job.config), asked):
            for name, found in parts.items():
                found.append(answer.features[name])
                counts[name] += len(answer.features[name])
        num_tokens += sum(sequence.num_tokens for sequence in group)
        beat()
    log.info("features: fitted to %s vectors of %d tokens", min(counts.values()), num_tokens)
    empty = {feature.name: np.zeros((0, feature.full_size), np.float32) for feature in asked}
    return {f.name: fit_feature(f, np.concatenate([empty[f.name], *parts[f.name]])[:SAMPLE_VECTORS]) for f in asked}


def sample_sequences(job: Job, teacher: Teacher) -> Iterator[TokenSequence]:
    """Sequences of the plan, unit after unit, in an order that the plan's fingerprint decides within each unit.

    An item that cannot be read is left out here: its own unit says so.
    """
    random = np.random.default_rng(int(job.plan.fingerprint[:16], 16))
    for unit in job.plan.units:
        requests: list[Request] = []
        for item in job.reader.read(unit):
            with suppress(InputError, MismatchError):
                requests += make_requests([item], job.tokenizer, job.config, teacher.identity.vocab_size)[0]
        order = random.permutation(len(requests))
        for start in range(0, len(order), _GROUP):
            chosen = [requests[index] for index in order[start : start + _GROUP]]
            prompts = [asked for asked in chosen if isinstance(asked, Prompt)]
            if prompts:
                yield from write_sequences(prompts, teacher, job.config, job.tokenizer, lambda _: None)
            yield from (asked for asked in chosen if isinstance(asked, TokenSequence))


def _check_sidecars(config: CaptureConfig, teacher: Teacher) -> None:
    if not config.sidecars:
        return
    if not isinstance(teacher, SidecarTeacher):
        raise no_sidecar(config.sidecars[0], f"the {teacher.identity.engine} teacher")
    if ACTIVATION_STATISTICS in config.sidecars:
        teacher.activation_statistics([])


def _make(name: str, job: Job, teacher: Teacher, beat: Beat) -> tuple[dict[str, NDArray[Any]], tuple[str, ...]]:
    """The arrays of a sidecar, and those of them that are bits of bfloat16."""
    assert isinstance(teacher, SidecarTeacher)
    if name == OUTPUT_PROJECTION:
        found = teacher.output_projection()
        beat()
        return found.arrays(), found.bfloat16_names
    sequences = list(islice(sample_sequences(job, teacher), STATISTICS_SEQUENCES))
    beat()
    return teacher.activation_statistics(sequences), ()


def _add_missing(job: Job, teacher: Teacher, writer: CacheWriter, beat: Beat) -> None:
    """Add the sidecars that a later run asks for and the cache does not have yet."""
    for name in missing_sidecars(job.config, writer):
        arrays, bfloat16 = _make(name, job, teacher, beat)
        try:
            writer.add_sidecar(name, arrays, bfloat16=bfloat16)
        except FormatError:
            # Another worker was first, and its numbers differ in their last bits: those that are there count.
            if name in missing_sidecars(job.config, writer):
                raise


def missing_sidecars(config: CaptureConfig, writer: CacheWriter) -> list[str]:
    """Those that the config asks for and the newest manifest does not have."""
    there = {sidecar.name for sidecar in writer.manifest.sidecars}
    return [name for name in config.sidecars if name not in there]
