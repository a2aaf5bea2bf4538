"""ModelOpt's recipe in our grammar: pairs of layers with one projector, as large as the KL in each batch, as a constant."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from states_cases import batch_of, states_of, tiny
from torch import nn

from kdcache import extensions
from kdcache.config.load import convert_config
from kdcache.config.train import LossConfig
from kdcache.train.terms.base import Term
from kdcache.train.terms.engine import LossTerms

NUMBERS = json.loads((Path(__file__).parents[2] / "loss/states/oracle_numbers.json").read_text())["modelopt"]


class Given(Term):
    """A mean of given values, which are learned."""

    def __init__(self, *, values):
        super().__init__()
        self.given = nn.Parameter(torch.tensor(values))

    def forward(self, student, batch, weights_P):
        return self.given.mean() * weights_P.sum()


def test_balanced_pairs_are_modelopts_total(monkeypatch):
    monkeypatch.setitem(extensions.OWN["losses"], "given", "test_modelopt_recipe:Given")
    terms = [
        {"term": "given", "options": {"values": [0.8]}},
        {"term": "given", "options": {"values": [0.3, 0.1]}, "balance": "equal"},
        {"term": "cross_entropy", "weight": 0},
    ]
    loss_of, batch, student = LossTerms(convert_config({"terms": terms}, LossConfig)), batch_of([[7]]), tiny(0)
    total = loss_of(states_of(student, batch), batch)
    assert float(total.detach()) == pytest.approx(NUMBERS["balanced"], rel=1e-6)
    total.backward()
    kl, pairs = (term.given.grad for term in loss_of.members())
    torch.testing.assert_close(kl, torch.tensor([1.0]))
    # The scale is a constant: 0.8 / 0.2, over the two pairs.
    torch.testing.assert_close(pairs, torch.tensor([2.0, 2.0]))
