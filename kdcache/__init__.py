"""kdcache: run a teacher model once, offline; train any number of students from its cache as if it were live.

The public names are resolved on first use (PEP 562): `import kdcache` loads nothing heavy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdcache.config.loader import LoaderConfig as LoaderConfig
    from kdcache.config.loader import MaskConfig as MaskConfig
    from kdcache.config.loader import MixConfig as MixConfig
    from kdcache.errors import KdcacheError as KdcacheError
    from kdcache.format.manifest import Manifest as Manifest
    from kdcache.format.record import Distributions as Distributions
    from kdcache.format.record import SequenceRecord as SequenceRecord
    from kdcache.format.record import TokenSequence as TokenSequence
    from kdcache.format.soft_targets import SoftTargets as SoftTargets
    from kdcache.loader.cache import Cache as Cache
    from kdcache.loader.cache import open_cache as open  # noqa: F401
    from kdcache.loader.loader import Loader as Loader
    from kdcache.loader.torch_batches import TorchLoader as TorchLoader
    from kdcache.loader.view import PackedView as PackedView
    from kdcache.loss.chunks import Head as Head
    from kdcache.loss.fused import Projection as Projection
    from kdcache.loss.fused import fused_sparse_kd_loss as fused_sparse_kd_loss
    from kdcache.loss.modules import FusedSparseKD as FusedSparseKD
    from kdcache.loss.modules import SparseKD as SparseKD
    from kdcache.loss.prepare import LossSettings as LossSettings
    from kdcache.loss.sparse_kd import sparse_kd_loss as sparse_kd_loss
    from kdcache.loss.vocab_parallel import VocabPart as VocabPart
    from kdcache.loss.vocab_parallel import vocab_parallel_sparse_kd_loss as vocab_parallel_sparse_kd_loss
    from kdcache.store.writing.writer import CacheWriter as CacheWriter

__version__ = "0.1.0"

_EXPORTS = {
    "Cache": "kdcache.loader.cache:Cache",
    "CacheWriter": "kdcache.store.writing.writer:CacheWriter",
    "Distributions": "kdcache.format.record:Distributions",
    "FusedSparseKD": "kdcache.loss.modules:FusedSparseKD",
    "Head": "kdcache.loss.chunks:Head",
    "KdcacheError": "kdcache.errors:KdcacheError",
    "Loader": "kdcache.loader.loader:Loader",
    "LoaderConfig": "kdcache.config.loader:LoaderConfig",
    "LossSettings": "kdcache.loss.prepare:LossSettings",
    "Manifest": "kdcache.format.manifest:Manifest",
    "MaskConfig": "kdcache.config.loader:MaskConfig",
    "MixConfig": "kdcache.config.loader:MixConfig",
    "PackedView": "kdcache.loader.view:PackedView",
    "Projection": "kdcache.loss.fused:Projection",
    "SequenceRecord": "kdcache.format.record:SequenceRecord",
    "SoftTargets": "kdcache.format.soft_targets:SoftTargets",
    "SparseKD": "kdcache.loss.modules:SparseKD",
    "TokenSequence": "kdcache.format.record:TokenSequence",
    "TorchLoader": "kdcache.loader.torch_batches:TorchLoader",
    "VocabPart": "kdcache.loss.vocab_parallel:VocabPart",
    "fused_sparse_kd_loss": "kdcache.loss.fused:fused_sparse_kd_loss",
    "open": "kdcache.loader.cache:open_cache",
    "sparse_kd_loss": "kdcache.loss.sparse_kd:sparse_kd_loss",
    "vocab_parallel_sparse_kd_loss": "kdcache.loss.vocab_parallel:vocab_parallel_sparse_kd_loss",
}

__all__ = [*_EXPORTS, "__version__"]  # noqa: PLE0604  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'kdcache' has no attribute {name!r}")
    module, _, attribute = _EXPORTS[name].partition(":")
    from kdcache.extras import needed_for

    with needed_for(f"kdcache.{name}"):
        value = getattr(import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
