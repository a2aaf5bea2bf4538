"""What passes between vLLM's worker and the teacher of hidden states: exact, whatever the model's dtype."""

from __future__ import annotations

import numpy as np
import pytest
from contracts.teacher import make_sequence

from kdcache.format.manifest import FeatureInfo
from kdcache.teacher.base import no_positions
from kdcache.teacher.features import pooled
from kdcache.teacher.vllm.wire import AskedFeatures, pack_asked, pack_requests, with_features

pytest.importorskip("torch")

import torch

from kdcache.teacher.vllm.internals import Span
from kdcache.teacher.vllm.worker_features import GroupFeatures, check_normed

H = 6
FEATURES = [
    FeatureInfo(name="last", layer=-1, size=H),
    FeatureInfo(name="mean", layer=-1, size=H, pooling="mean"),
    FeatureInfo(name="end", layer=-1, size=H, pooling="last"),
    FeatureInfo(name="all", layer=-1, size=H, positions="all", stride=2),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_come_back_to_their_sequences_exactly(dtype):
    sequences = [
        make_sequence(range(5)),
        make_sequence(range(4), [False] * 4),
        make_sequence(range(7), [True, False] * 3 + [True]),
    ]
    states = [torch.randn((s.num_tokens, H), generator=torch.Generator().manual_seed(0)).to(dtype) for s in sequences]
    group, requests = GroupFeatures(pack_asked(AskedFeatures(FEATURES), sequences)), pack_requests(sequences)
    # Three steps, of which one computes again what another has computed, and one has a request that is not ours.
    steps = [[(2, 0, 3), (0, 0, 5)], [(2, 2, 2), (1, 0, 4)], [(2, 4, 3)]]
    for step in steps:
        spans, parts = [Span({"other": 1}, 0, 0, 2)], [torch.zeros((2, H), dtype=dtype)]
        for request, position, length in step:
            spans.append(Span(requests[request], sum(map(len, parts)), position, length))
            parts.append(states[request][position : position + length])
        group.take(torch.cat(parts), spans, chunk=2)
    problem, *packed = group.pack()
    assert problem is None
    answers = [(sequence, no_positions()) for sequence in sequences]
    found = [answer.features for answer in with_features(answers, FEATURES, packed)]
    for features, sequence, state_NH in zip(found, sequences, states, strict=True):
        expected_NH = state_NH.float().numpy()
        np.testing.assert_array_equal(features["all"], expected_NH[::2])
        expected_PH = expected_NH[sequence.supervised_N]
        np.testing.assert_array_equal(features["last"], expected_PH)
        for name, pooling in (("mean", "mean"), ("end", "last")):
            np.testing.assert_array_equal(features[name], pooled(expected_PH, pooling))
        assert all(values.dtype == np.float32 for values in features.values())


def test_a_vector_that_was_never_computed_is_an_error():
    sequences = [make_sequence(range(5))]
    group, (request,) = GroupFeatures(pack_asked(AskedFeatures(FEATURES), sequences)), pack_requests(sequences)
    group.take(torch.zeros((3, H)), [Span(request, 0, 0, 3)], chunk=8)
    assert group.pack() == ["the engine's worker never computed 2 vectors of 'last'"]


def test_a_layer_that_was_not_seen_or_only_in_part_is_an_error():
    inner, sequences = FeatureInfo(name="inner", layer=1, size=H), [make_sequence(range(3))]
    group, (request,) = GroupFeatures(pack_asked(AskedFeatures([inner]), sequences)), pack_requests(sequences)
    with pytest.raises(RuntimeError, match="layer 1 was not seen on all 3 tokens"):
        group.take(torch.zeros(3, H), [Span(request, 0, 0, 3)], chunk=8)


def test_the_proof_lets_rounding_pass_and_nothing_else():
    hidden_XH = torch.randn((9, H), generator=torch.Generator().manual_seed(0))
    check_normed(hidden_XH.bfloat16(), hidden_XH)
    check_normed(torch.cat([hidden_XH, hidden_XH]), hidden_XH)
    with pytest.raises(RuntimeError, match="not what the final norm takes"):
        check_normed(hidden_XH.roll(1, 0), hidden_XH)
    with pytest.raises(RuntimeError, match="not seen"):
        check_normed(None, hidden_XH)
