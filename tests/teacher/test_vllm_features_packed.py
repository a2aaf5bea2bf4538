"""What passes between vLLM's worker and the teacher of hidden states: exact, whatever the model's dtype."""

from __future__ import annotations

import numpy as np
import pytest
from contracts.teacher import make_sequence

from kdcache.format.manifest import FeatureInfo
from kdcache.teacher.base import no_positions
from kdcache.teacher.features import pooled
from kdcache.teacher.vllm.wire import AskedFeatures, pack_asked, with_features

pytest.importorskip("torch")

import torch

from kdcache.teacher.vllm.worker_features import GroupFeatures, check_normed, take_at

H = 6
FEATURES = [
    FeatureInfo(name="last", layer=2, size=H),
    FeatureInfo(name="mean", layer=2, size=H, pooling="mean"),
    FeatureInfo(name="end", layer=2, size=H, pooling="last"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_come_back_to_their_sequences_exactly(dtype):
    sequences = [
        make_sequence(range(5)),
        make_sequence(range(4), [False] * 4),
        make_sequence(range(7), [True, False] * 3 + [True]),
    ]
    asked = [sequences[0], sequences[2]]
    hidden_XH = torch.randn((9, H), generator=torch.Generator().manual_seed(0)).to(dtype)
    group = GroupFeatures(pack_asked(AskedFeatures(FEATURES, 2), asked))
    # Two steps, not in the rows' order, and a row that is computed twice.
    states = group.states_of(hidden_XH)
    group.write(np.array([8, 3, 0]), take_at(states, np.array([1, 1, 1])))
    for rows in (np.array([8, 2, 3, 4]), np.array([0, 1, 5, 6, 7])):
        group.write(rows, take_at(states, rows))
    answers = [(sequence, no_positions()) for sequence in sequences]
    found = [answer.features for answer in with_features(answers, FEATURES, group.pack())]
    for features, rows_NH in zip(found, (hidden_XH[:5], hidden_XH[:0], hidden_XH[5:]), strict=True):
        expected_NH = rows_NH.float().numpy()
        np.testing.assert_array_equal(features["last"], expected_NH)
        for name, pooling in (("mean", "mean"), ("end", "last")):
            np.testing.assert_array_equal(features[name], pooled(expected_NH, pooling))
        assert all(values.dtype == np.float32 for values in features.values())


def test_a_layer_that_was_not_seen_or_only_in_part_is_an_error():
    inner = FeatureInfo(name="inner", layer=1, size=H)
    group = GroupFeatures(pack_asked(AskedFeatures([inner], 2), [make_sequence(range(3))]))
    with pytest.raises(RuntimeError, match="layer 1 was not seen on all 3 tokens"):
        group.states_of(torch.zeros(3, H))


def test_the_proof_lets_rounding_pass_and_nothing_else():
    hidden_XH = torch.randn((9, H), generator=torch.Generator().manual_seed(0))
    check_normed(hidden_XH.bfloat16(), hidden_XH)
    check_normed(torch.cat([hidden_XH, hidden_XH]), hidden_XH)
    with pytest.raises(RuntimeError, match="not what the final norm takes"):
        check_normed(hidden_XH.roll(1, 0), hidden_XH)
    with pytest.raises(RuntimeError, match="not seen"):
        check_normed(None, hidden_XH)
