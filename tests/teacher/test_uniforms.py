"""The random numbers of a selection: pinned for ever, uniform, and the same in torch."""

from __future__ import annotations

import numpy as np
import pytest

from kdcache.teacher.select.uniforms import position_states, uniforms_of

KEY = bytes(range(16))


def test_the_numbers_of_version_1_never_change():
    # A change here would make a resumed capture store other entries than the rest of its cache has.
    states_P = position_states(7, KEY, np.array([0, 1, 4095]))
    assert [hex(state) for state in states_P] == ["0x8bf244b2f5d71f42", "0xdce38e424f2f0220", "0xe1ffe174ae309385"]
    np.testing.assert_array_equal(uniforms_of(states_P[:1], 3), [[0.38311579761002945, 0.8086330440846299, 0.1835766590355289]])
    assert hex(position_states(-1, bytes(16), np.array([0]))[0]) == "0x1eb51e50dc56952a"


def test_seed_key_position_and_draw_each_give_other_numbers():
    states = [
        int(position_states(seed, key, np.array([t]))[0])
        for seed in (0, 1, -1, 2**63 - 1, -(2**63))
        for key in (KEY, KEY[::-1], bytes(16), bytes(15) + b"\1", b"\1" + bytes(15))
        for t in range(20)
    ]
    assert len(set(states)) == 5 * 5 * 20
    uniforms = uniforms_of(np.array(states, np.uint64), 20)
    assert len(np.unique(uniforms)) == uniforms.size


def test_the_numbers_are_uniform_over_positions_and_over_draws():
    positions = np.arange(40_000)
    over_positions = uniforms_of(position_states(0, KEY, positions), 1)[:, 0]
    over_draws = uniforms_of(position_states(0, KEY, positions[:1]), 40_000)[0]
    for uniforms in (over_positions, over_draws):
        assert uniforms.min() >= 0
        assert uniforms.max() < 1
        # Kolmogorov's distance x sqrt(n): above 2.2 once in ten thousand.
        distance = np.abs(np.sort(uniforms) - (np.arange(len(uniforms)) + 0.5) / len(uniforms)).max()
        assert distance * np.sqrt(len(uniforms)) < 2.2
        assert abs(np.corrcoef(uniforms[:-1], uniforms[1:])[0, 1]) < 4.5 / np.sqrt(len(uniforms))


def test_torch_makes_the_same_bits():
    torch = pytest.importorskip("torch")
    from kdcache.teacher.select import _torch_draws

    states_P = position_states(3, KEY, np.arange(50))
    found = _torch_draws.uniforms_of(torch.from_numpy(states_P.view(np.int64)), 40)
    np.testing.assert_array_equal(found.numpy(), uniforms_of(states_P, 40))
