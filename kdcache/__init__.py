"""kdcache: run a teacher model once, offline; train any number of students from its cache as if it were live.

The public names are resolved on first use (PEP 562): `import kdcache` loads nothing heavy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdcache.capture.executors.run import run_capture as run_capture
    from kdcache.capture.executors.tally import CaptureSummary as CaptureSummary
    from kdcache.capture.watch.progress import CaptureProgress as CaptureProgress
    from kdcache.capture.watch.signals import StopRequest as StopRequest
    from kdcache.config.capture import CaptureConfig as CaptureConfig
    from kdcache.config.load import load_config as load_config
    from kdcache.config.loader import LoaderConfig as LoaderConfig
    from kdcache.config.loader import MaskConfig as MaskConfig
    from kdcache.config.loader import MixConfig as MixConfig
    from kdcache.config.remote import RemoteConfig as RemoteConfig
    from kdcache.config.teacher import TeacherConfig as TeacherConfig
    from kdcache.config.train import TrainConfig as TrainConfig
    from kdcache.errors import CacheNotFoundError as CacheNotFoundError
    from kdcache.errors import CaptureError as CaptureError
    from kdcache.errors import ConfigError as ConfigError
    from kdcache.errors import CorruptCacheError as CorruptCacheError
    from kdcache.errors import FormatError as FormatError
    from kdcache.errors import InputError as InputError
    from kdcache.errors import KdcacheError as KdcacheError
    from kdcache.errors import LossError as LossError
    from kdcache.errors import MismatchError as MismatchError
    from kdcache.errors import MissingDependencyError as MissingDependencyError
    from kdcache.errors import NotFiniteError as NotFiniteError
    from kdcache.errors import StateError as StateError
    from kdcache.errors import StorageError as StorageError
    from kdcache.errors import TeacherError as TeacherError
    from kdcache.errors import UnsupportedVersionError as UnsupportedVersionError
    from kdcache.format.manifest import Manifest as Manifest
    from kdcache.format.manifest import ShardInfo as ShardInfo
    from kdcache.format.record import Distributions as Distributions
    from kdcache.format.record import SequenceRecord as SequenceRecord
    from kdcache.format.record import TokenSequence as TokenSequence
    from kdcache.format.soft_targets import SoftTargets as SoftTargets
    from kdcache.loader.batches.batch import Batch as Batch
    from kdcache.loader.cache import Cache as Cache
    from kdcache.loader.cache import open_cache as open  # noqa: F401
    from kdcache.loader.loader import Loader as Loader
    from kdcache.loader.report import EpochReport as EpochReport
    from kdcache.loader.rows.layout import EpochCounts as EpochCounts
    from kdcache.loader.torch_batches import TorchBatch as TorchBatch
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
    from kdcache.store.verify import VerifyReport as VerifyReport
    from kdcache.store.verify import verify_cache as verify_cache
    from kdcache.store.writing.writer import CacheWriter as CacheWriter
    from kdcache.teacher import load_teacher as load_teacher
    from kdcache.teacher.base import Teacher as Teacher

__version__ = "0.1.0"

_EXPORTS = {
    "Batch": "kdcache.loader.batches.batch:Batch",
    "Cache": "kdcache.loader.cache:Cache",
    "CacheNotFoundError": "kdcache.errors:CacheNotFoundError",
    "CacheWriter": "kdcache.store.writing.writer:CacheWriter",
    "CaptureConfig": "kdcache.config.capture:CaptureConfig",
    "CaptureError": "kdcache.errors:CaptureError",
    "CaptureProgress": "kdcache.capture.watch.progress:CaptureProgress",
    "CaptureSummary": "kdcache.capture.executors.tally:CaptureSummary",
    "ConfigError": "kdcache.errors:ConfigError",
    "CorruptCacheError": "kdcache.errors:CorruptCacheError",
    "Distributions": "kdcache.format.record:Distributions",
    "EpochCounts": "kdcache.loader.rows.layout:EpochCounts",
    "EpochReport": "kdcache.loader.report:EpochReport",
    "FormatError": "kdcache.errors:FormatError",
    "FusedSparseKD": "kdcache.loss.modules:FusedSparseKD",
    "Head": "kdcache.loss.chunks:Head",
    "InputError": "kdcache.errors:InputError",
    "KdcacheError": "kdcache.errors:KdcacheError",
    "Loader": "kdcache.loader.loader:Loader",
    "LoaderConfig": "kdcache.config.loader:LoaderConfig",
    "LossError": "kdcache.errors:LossError",
    "LossSettings": "kdcache.loss.prepare:LossSettings",
    "Manifest": "kdcache.format.manifest:Manifest",
    "MaskConfig": "kdcache.config.loader:MaskConfig",
    "MismatchError": "kdcache.errors:MismatchError",
    "MissingDependencyError": "kdcache.errors:MissingDependencyError",
    "MixConfig": "kdcache.config.loader:MixConfig",
    "NotFiniteError": "kdcache.errors:NotFiniteError",
    "PackedView": "kdcache.loader.view:PackedView",
    "Projection": "kdcache.loss.fused:Projection",
    "RemoteConfig": "kdcache.config.remote:RemoteConfig",
    "SequenceRecord": "kdcache.format.record:SequenceRecord",
    "ShardInfo": "kdcache.format.manifest:ShardInfo",
    "SoftTargets": "kdcache.format.soft_targets:SoftTargets",
    "SparseKD": "kdcache.loss.modules:SparseKD",
    "StateError": "kdcache.errors:StateError",
    "StopRequest": "kdcache.capture.watch.signals:StopRequest",
    "StorageError": "kdcache.errors:StorageError",
    "Teacher": "kdcache.teacher.base:Teacher",
    "TeacherConfig": "kdcache.config.teacher:TeacherConfig",
    "TeacherError": "kdcache.errors:TeacherError",
    "TokenSequence": "kdcache.format.record:TokenSequence",
    "TorchBatch": "kdcache.loader.torch_batches:TorchBatch",
    "TorchLoader": "kdcache.loader.torch_batches:TorchLoader",
    "TrainConfig": "kdcache.config.train:TrainConfig",
    "UnsupportedVersionError": "kdcache.errors:UnsupportedVersionError",
    "VerifyReport": "kdcache.store.verify:VerifyReport",
    "VocabPart": "kdcache.loss.vocab_parallel:VocabPart",
    "fused_sparse_kd_loss": "kdcache.loss.fused:fused_sparse_kd_loss",
    "load_config": "kdcache.config.load:load_config",
    "load_teacher": "kdcache.teacher:load_teacher",
    "open": "kdcache.loader.cache:open_cache",
    "run_capture": "kdcache.capture.executors.run:run_capture",
    "sparse_kd_loss": "kdcache.loss.sparse_kd:sparse_kd_loss",
    "verify_cache": "kdcache.store.verify:verify_cache",
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
