"""Roles in a batch: each position has that of the token it predicts, as the record says, whichever way the batch was made."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from cache_making import make_cache, make_unit
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_reader import assert_same, make_record

import kdcache
from kdcache.config.loader import LoaderConfig, MaskConfig
from kdcache.format.record import SequenceRecord
from kdcache.loader.batches.assemble import BatchLayout, EntryColumns, assemble, assemble_reference
from kdcache.loader.batches.batch import NO_ROLE, Batch, stack_batches
from kdcache.loader.loader import Loader
from kdcache.loader.view import PackedView

PLAIN = LoaderConfig(seq_len=32, batch_rows=4, packing_buffer=8, num_threads=1)
MASKS = [MaskConfig(), MaskConfig(roles=("user", "assistant")), MaskConfig(drop_first=2, drop_first_of="turn")]
UNITS = [make_unit(unit, num_sequences=7) for unit in range(2)]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tmp_path_factory.mktemp("roles") / "cache", "packed", units=UNITS)


def expected_roles(batch: Batch, records: list[SequenceRecord]) -> list[int]:
    """Of each position that the batch has, by hand from the records of its sequences."""
    roles = []
    firsts = np.flatnonzero((batch.segment_ids_BT.reshape(-1) > 0) & (batch.position_ids_BT.reshape(-1) == 0))
    for place in batch.flat_positions_P.tolist():
        number = int(np.searchsorted(firsts, place, "right")) - 1
        t, sequence = place - int(firsts[number]), records[number].sequence
        roles.append(int(sequence.roles_N[t + 1]) if t + 1 < sequence.num_tokens else NO_ROLE)
    return roles


@pytest.mark.parametrize("mask", MASKS)
def test_roles_are_those_of_the_predicted_tokens_and_nothing_else_changes(path: Path, mask: MaskConfig) -> None:
    options = msgspec.structs.replace(PLAIN, mask=mask)
    with_roles = msgspec.structs.replace(options, with_roles=True)
    seen: set[int] = set()
    with kdcache.open(path) as cache, Loader(cache, options) as plain, Loader(cache, with_roles) as loader:
        for number, (batch, other) in enumerate(zip(loader, plain, strict=True)):
            numbers = [int(i) for row in loader._layout_of(0).batch(number).rows for i in row]
            assert batch.roles_P is not None
            assert batch.roles_P.dtype == np.uint8
            assert batch.roles_P.tolist() == expected_roles(batch, [cache[i] for i in numbers])
            assert_same(replace(batch, roles_P=None), other)
            seen |= set(batch.roles_P.tolist())
    assert seen >= {2, 3}
    assert (NO_ROLE in seen) == (mask.roles is None)


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(1, 6), max_size=4), min_size=1, max_size=4), st.sampled_from(MASKS))
def test_assembled_roles_equal_the_reference(rows: list[list[int]], mask: MaskConfig) -> None:
    records = [make_record(i, n, k=3, chat=True) for i, n in enumerate(n for row in rows for n in row)]
    layout = BatchLayout(tuple(map(len, rows)), 24, EntryColumns(3), mask, with_roles=True)
    batch = assemble(records, layout)
    assert batch.roles_P is not None
    assert_same(batch, assemble_reference(records, layout))


def test_rows_of_a_view_ranks_and_a_resume_without_roles_have_them_too(path: Path) -> None:
    options = msgspec.structs.replace(PLAIN, with_roles=True)
    with Loader(path, options) as loader:
        whole = list(loader)
    ranks = [Loader(path, options, rank=rank, world_size=2) for rank in range(2)]
    for batch, *shares in zip(whole, *ranks, strict=True):
        assert_same(stack_batches(shares), batch)
    view = PackedView(path, options)
    assert_same(stack_batches([view[row] for row in range(4)]), whole[0])
    with Loader(path, PLAIN) as first, Loader(path, options) as second:
        next(iter(first))
        second.load_state_dict(first.state_dict())
        assert_same(next(iter(second)), whole[1])
    for loader in ranks:
        loader.close()
    view.close()


def test_torch_batches_hand_roles_over(path: Path) -> None:
    pytest.importorskip("torch")
    from kdcache.loader.torch_batches import TorchLoader

    with Loader(path, msgspec.structs.replace(PLAIN, with_roles=True)) as loader:
        batch = next(iter(TorchLoader(loader)))
    with Loader(path, PLAIN) as loader:
        assert next(iter(TorchLoader(loader))).roles_P is None
    assert batch.roles_P is not None
    assert batch.to("meta").roles_P.shape == batch.flat_positions_P.shape  # pyright: ignore[reportOptionalMemberAccess]
