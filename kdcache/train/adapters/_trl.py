"""TRL's SFTTrainer, trained from a cache: what it would do to a dataset was done when the cache was captured."""

from __future__ import annotations

import copy
from typing import Any

from datasets import Dataset
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from kdcache.train.adapters._transformers import KDMixin


class _PlainSFT(SFTTrainer):
    """SFTTrainer with a dataset that nobody reads, since it insists on one."""

    def __init__(self, model: Any, args: SFTConfig, **others: Any) -> None:
        args = copy.copy(args)
        options: Any = args.dataset_kwargs or {}
        args.dataset_kwargs = {**options, "skip_prepare_dataset": True}
        super().__init__(model, args, train_dataset=Dataset.from_dict({"input_ids": [[0]], "labels": [[-100]]}), **others)


class KDSFTTrainer(KDMixin, _PlainSFT):
    """TRL's SFTTrainer with the batches of a cache and the fused loss, see KDMixin.

    Its own metrics of training (entropy, token accuracy) are not computed: they would need the logits. Packing, templates,
    masks and lengths are those of the cache and the loader's options.
    """
