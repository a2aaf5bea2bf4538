"""What `make_kernel_inputs` refuses: each of these would be a silently wrong loss, or a read outside a row."""

from __future__ import annotations

import numpy as np
import pytest

from kdcache.errors import LossError
from kdcache.kernels.base import Objective, make_kernel_inputs

GOOD = {"token_ids_PK": [[1, 2], [0, -1]], "logprobs_PK": [[-1.0, -2.0], [-1.0, -np.inf]], "tail_mass_P": [0.5, 0.6]}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"token_ids_PK": [[1, 5], [0, -1]]}, "position 0 has the token id 5, which is outside the student's vocabulary of 5"),
        ({"token_ids_PK": [[1, 2], [2**32, -1]]}, "position 1 has the token id 4294967296"),
        ({"token_ids_PK": [[1, 2], [0, -2]]}, "position 1 has the token id -2"),
        ({"token_ids_PK": [[2, 2], [0, -1]]}, "position 0 has the token id 2, twice"),
        ({"token_ids_PK": [1, 2]}, "shape"),
        ({"logprobs_PK": [[-1.0], [-1.0]]}, r"logprobs has the shape \(2, 1\), but token_ids make it \(2, 2\)"),
        ({"logprobs_PK": [[-1.0, 0.3], [-1.0, -2.0]]}, "position 0 has the logprob 0.3, above 0"),
        ({"tail_mass_P": [0.5, 1.5]}, "position 1 has the tail mass 1.5"),
        ({"tail_mass_P": [np.nan, 0.5]}, "position 0 has the tail mass nan"),
        ({"tail_mass_P": [0.5]}, "tail_mass has the shape"),
        ({"target_ids_P": [5, 0]}, "position 0 has the target id 5"),
        ({"target_ids_P": [0, -1]}, "position 1 has the target id -1"),
        ({"weights_P": [1.0, -0.5]}, "position 1 has the weight -0.5"),
        ({"weights_P": [np.nan, 0.5]}, "position 0 has the weight nan"),
    ],
)
def test_impossible_targets_are_refused_with_the_position(change, sentence):
    with pytest.raises(LossError, match=sentence):
        make_kernel_inputs(**{**GOOD, **change}, vocab_size=5)


def test_padding_may_hold_any_logprob_and_repeat():
    targets = make_kernel_inputs([[3, -1, -1]], [[-1.0, 7.0, np.nan]], [0.5], vocab_size=5)
    assert targets.token_ids_PK.dtype == np.int32


def test_arrays_of_other_layouts_are_brought_into_the_kernels_layout():
    ids_PK = np.asfortranarray(np.array([[1, 2], [3, 4]], np.int64))
    ids_PK.flags.writeable = False
    targets = make_kernel_inputs(ids_PK, np.zeros((4, 2))[::2] - 1, [0.5, 0.5], vocab_size=5)
    for array in (targets.token_ids_PK, targets.logprobs_PK, targets.tail_mass_P, targets.target_ids_P, targets.weights_P):
        assert array.flags.c_contiguous
        assert array.flags.writeable


@pytest.mark.parametrize(
    "options",
    [{"tail": "ghost"}, {"alpha": -0.1}, {"alpha": 1.1}, {"alpha": float("nan")}, {"temperature": -1}, {"temperature": np.inf}],
)
def test_impossible_objectives_are_refused(options):
    with pytest.raises(LossError, match=next(iter(options))):
        Objective(**options)
