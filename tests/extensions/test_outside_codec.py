"""A codec that another package brings: the contract of every codec, and a cache from capture to verified reading."""

from __future__ import annotations

import pytest
from contracts import codec as contract

from kdcache.codec import get_codec


@pytest.mark.parametrize("check", contract.CHECKS, ids=lambda check: check.__name__)
def test_it_keeps_the_contract(toys, check):
    check(lambda vocab_size: get_codec("toy", {"vocab_size": vocab_size}))


def test_it_keeps_every_selection_and_refuses_unfit_parameters(toys):
    contract.check_selections("toy")
    contract.check_unfit_parameters("toy")
