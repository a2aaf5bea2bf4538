"""A cache of ours, seen as any other: the same probes, and what `verify` finds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from kdcache.foreign.base import Finding, ForeignCache, ForeignSequence
from kdcache.foreign.judge.deep import exact_supports
from kdcache.foreign.judge.doctor import Examination, ExamineConfig, Progress, examine_opened
from kdcache.format.manifest import Manifest, SelectionInfo
from kdcache.format.record import SequenceRecord
from kdcache.store.reader import open_reader
from kdcache.store.verify import verify_cache
from kdcache.teacher.base import Teacher

DOUBTS = ("alignment_unclear", "foreign_positions", "foreign_sequences", "few_hits")
"""Doubts that the text raises: it may be one that the teacher knows nothing of."""

FEW_IMPOSSIBLE = 0.01


def examine_own(
    path: str | Path, config: ExamineConfig, *, teacher: Teacher | None = None, progress: Progress | None = None
) -> Examination:
    """Verify a cache of ours and put the probes to it.

    Raises:
        CacheNotFoundError, CorruptCacheError: no manifest can be read. TeacherError: the teacher fails.
    """
    report = verify_cache(path)
    mended = f"`kdcache repair {path}` sets damaged units aside, so that they can be made again"
    damage = tuple(Finding("damaged", "fatal", f"{problem}; {mended}") for problem in report.problems)
    manifest = report.manifest
    teller = manifest.identity.teacher
    state = "complete" if manifest.is_complete else f"{len(manifest.shards):,} of {manifest.plan.num_units:,} units so far"
    facts = {
        "teacher": f"{teller.model}, {teller.dtype}, by {teller.engine} {teller.engine_version}",
        "selection": f"{manifest.identity.selection.kind} {manifest.identity.selection.params}",
        "plan": state,
        "verified": f"{report.num_positions:,} positions"
        + (
            ""
            if math.isnan(report.cached_nll)
            else f", NLL {report.cached_nll:.6f} (teacher's own {report.teacher_nll:.6f}), {_left_out(manifest)}"
        ),
    }
    read = partial(_sequences, path) if report.is_sound else partial(iter, ())
    cache = ForeignCache(
        format="kdcache", title="cache of kdcache", path=str(path), values="logprobs", read=read, facts=facts,
        vocab_size=teller.vocab_size, findings=damage,
    )  # fmt: skip
    tokenizer_size = config.tokenizer_size or manifest.identity.tokenizer.vocab_size
    found = examine_opened(cache, replace(config, tokenizer_size=tokenizer_size), teacher=teacher, progress=progress)
    selection = manifest.identity.selection
    is_aligned = _knows_its_alignment(manifest)
    return replace(found, findings=tuple(_for_own(finding, selection, is_aligned=is_aligned) for finding in found.findings))


def _left_out(manifest: Manifest) -> str:
    return f"{manifest.total('num_impossible_targets'):,} of {manifest.total('num_targets'):,} targets left out"


def _knows_its_alignment(manifest: Manifest) -> bool:
    """Whether a teacher gave the targets' logprobs at capture, so that the NLL kept then shows where positions belong."""
    is_converted = "converted_from" in manifest.notes
    return not is_converted and manifest.total("num_impossible_targets") <= FEW_IMPOSSIBLE * manifest.total("num_targets")


def _for_own(finding: Finding, selection: SelectionInfo, *, is_aligned: bool) -> Finding:
    """Soften what is not a defect of ours.

    The capture compared the NLL, so where positions belong is known; a selection may keep no exact entry on purpose, or hold
    what a sampler's filters left.
    """
    if is_aligned and finding.name in DOUBTS:
        sentence = "the text alone does not show where positions belong, as it is not one that this teacher would write"
        return replace(finding, severity="note", sentence=f"{sentence}; the NLL that was kept at capture agrees, and shows it")
    if finding.name in ("renormalised", "temperature_applied") and selection.filters:
        why = f"the distributions are those after the sampler's filters {selection.filters}, as asked for at capture"
        return replace(finding, severity="note", sentence=why)
    return finding if finding.name != "no_positions" else replace(finding, severity="note")


def _sequences(path: str | Path) -> Iterator[ForeignSequence]:
    with open_reader(path) as reader:
        for index in range(len(reader)):
            yield own_sequence(reader[index])


def own_sequence(record: SequenceRecord) -> ForeignSequence:
    """A record's exact entries as a foreign sequence."""
    positions = exact_supports(record.distributions)
    return ForeignSequence(
        source=record.sequence.source,
        input_ids_N=record.sequence.input_ids_N.astype(np.int64),
        positions_P=record.sequence.positions_P,
        counts_P=np.bincount(positions.position_E, minlength=positions.num_positions).astype(np.int64),
        token_ids_E=positions.ids_E,
        values_E=positions.logprobs_E,
    )
