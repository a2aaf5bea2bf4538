"""Students trained from a cache in other trainers: the loader's batches, the fused loss and exact resume, in their terms.

README.md has an example for each. The names are resolved on first use: a trainer's package is imported only for its own.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kdcache.extras import needed_for

if TYPE_CHECKING:
    from kdcache.train.adapters._accelerate import AcceleratedStream as AcceleratedStream
    from kdcache.train.adapters._datasets import iterable_dataset as iterable_dataset
    from kdcache.train.adapters._lightning import KDDataModule as KDDataModule
    from kdcache.train.adapters._torchtitan import TitanDataLoader as TitanDataLoader
    from kdcache.train.adapters._transformers import KDMixin as KDMixin
    from kdcache.train.adapters._transformers import KDTrainer as KDTrainer
    from kdcache.train.adapters._trl import KDSFTTrainer as KDSFTTrainer
    from kdcache.train.adapters.stream import BatchStream as BatchStream
    from kdcache.train.adapters.stream import num_stream_batches as num_stream_batches
    from kdcache.train.adapters.student_loss import StudentLoss as StudentLoss

_EXPORTS = {
    "AcceleratedStream": "kdcache.train.adapters._accelerate:AcceleratedStream",
    "BatchStream": "kdcache.train.adapters.stream:BatchStream",
    "KDDataModule": "kdcache.train.adapters._lightning:KDDataModule",
    "KDMixin": "kdcache.train.adapters._transformers:KDMixin",
    "KDSFTTrainer": "kdcache.train.adapters._trl:KDSFTTrainer",
    "KDTrainer": "kdcache.train.adapters._transformers:KDTrainer",
    "StudentLoss": "kdcache.train.adapters.student_loss:StudentLoss",
    "TitanDataLoader": "kdcache.train.adapters._torchtitan:TitanDataLoader",
    "iterable_dataset": "kdcache.train.adapters._datasets:iterable_dataset",
    "num_stream_batches": "kdcache.train.adapters.stream:num_stream_batches",
}

_EXTRAS = {"AcceleratedStream": "accelerate", "KDDataModule": "lightning", "KDSFTTrainer": "trl", "KDTrainer": "accelerate"}
"""What brings a trainer and all that it needs, where one package's own extra would not."""

__all__ = [*_EXPORTS]  # noqa: PLE0604  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'kdcache.train.adapters' has no attribute {name!r}")
    module, _, attribute = _EXPORTS[name].partition(":")
    with needed_for(f"kdcache.train.adapters.{name}", _EXTRAS.get(name)):
        value = getattr(import_module(module), attribute)
    globals()[name] = value
    return value
