"""The grammar of terms, their weights, and what their sum is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from adapter_cases import OPTIONS, first_batches, make_student
from train_caches import train_config

from kdcache.config.load import convert_config
from kdcache.config.terms import TermConfig, WeightSchedule
from kdcache.config.train import LossConfig
from kdcache.errors import ConfigError
from kdcache.train.packed import logits_head
from kdcache.train.step import BatchLoss, student_loss
from kdcache.train.terms.schedule import weight_at

DIVERGENCE = {"term": "divergence", "options": {"divergence": "reverse_kl", "tail": "bucket"}}


def loss_config(**fields: Any) -> LossConfig:
    return convert_config(fields, LossConfig)
