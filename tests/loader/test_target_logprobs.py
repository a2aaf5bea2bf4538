"""Batches with the teacher's logprobs of the target ids, for losses that need them among the entries."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from cache_making import make_cache, make_unit
from memory_reader import assert_same, make_record

import kdcache
from kdcache.config.loader import LoaderConfig, MaskConfig
from kdcache.loader.batches.assemble import BatchLayout, EntryColumns, assemble, assemble_reference
from kdcache.loader.batches.batch import NO_TARGET, stack_batches
from kdcache.loader.loader import Loader

PLAIN = LoaderConfig(seq_len=32, batch_rows=4, packing_buffer=8, num_threads=1)
ASKED = msgspec.structs.replace(PLAIN, with_target_logprobs=True)
UNITS = [make_unit(unit, num_sequences=7) for unit in range(2)]


@pytest.mark.parametrize("codec_id", ["packed", "raw"])
def test_a_batch_holds_the_logprob_of_each_target_id_and_else_nothing_changes(tmp_path: Path, codec_id: str) -> None:
    path = make_cache(tmp_path / "cache", codec_id, units=UNITS)
    with kdcache.open(path) as cache, Loader(cache, ASKED) as loader, Loader(cache, PLAIN) as plain:
        for batch, other in zip(loader, plain, strict=True):
            assert other.teacher.target_logprobs_P is None
            assert_same(replace(batch, teacher=replace(batch.teacher, target_logprobs_P=None)), other)
            found_P, indices_S = batch.teacher.target_logprobs_P, batch.sequence_indices_S
            assert found_P is not None
            assert indices_S is not None
            np.testing.assert_array_equal(np.isnan(found_P), batch.target_ids_P == NO_TARGET)
            records = [cache[int(index)] for index in indices_S]
            expected = [record.distributions.target_logprobs(record.sequence.target_ids_P) for record in records]
            np.testing.assert_array_equal(found_P, np.concatenate(expected))


@pytest.mark.parametrize("mask", [MaskConfig(), MaskConfig(drop_first=2)])
def test_assembled_ones_equal_the_reference(mask: MaskConfig) -> None:
    records = [make_record(i, n, k=3, chat=True) for i, n in enumerate((5, 6, 1, 4))]
    layout = BatchLayout((2, 0, 2), 24, EntryColumns(3, has_target_logprobs=True), mask)
    batch = assemble(records, layout)
    assert batch.teacher.target_logprobs_P is not None
    assert_same(batch, assemble_reference(records, layout))


def test_ranks_share_them(tmp_path: Path) -> None:
    path = make_cache(tmp_path / "cache", "packed", units=UNITS)
    ranks = [Loader(path, ASKED, rank=rank, world_size=2) for rank in range(2)]
    with Loader(path, ASKED) as loader:
        for batch, *shares in zip(loader, *ranks, strict=True):
            assert_same(stack_batches(shares), batch)
    for loader in ranks:
        loader.close()
