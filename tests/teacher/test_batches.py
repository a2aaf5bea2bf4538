from __future__ import annotations

import pytest
from contracts.teacher import make_sequence

from kdcache.teacher.batches import batches_by_length, groups_of_tokens


@pytest.mark.parametrize("lengths", [[], [5], [5, 6, 4], [10, 10, 1], [30, 2, 2], [2, 30, 2]])
def test_groups_are_whole_in_order_and_bounded(lengths: list[int]):
    sequences = [make_sequence(range(length)) for length in lengths]
    groups = [list(group) for group in groups_of_tokens(sequences, 10)]
    assert [sequence for group in groups for sequence in group] == sequences
    assert all(len(group) == 1 or sum(s.num_tokens for s in group) <= 10 for group in groups)
    assert all(groups)


def test_batches_hold_every_index_once_and_bound_the_padded_size():
    lengths = [3, 50, 7, 7, 120, 1, 40, 2]
    batches = list(batches_by_length(lengths, 100))
    assert sorted(index for batch in batches for index in batch) == list(range(8))
    for batch in batches:
        longest = max(lengths[index] for index in batch)
        assert len(batch) == 1 or len(batch) * longest <= 100
    assert batches[0] == [4]
