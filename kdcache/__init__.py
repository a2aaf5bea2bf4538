"""kdcache: run a teacher model once, offline; train any number of students from its cache as if it were live.

The public names are resolved on first use (PEP 562): `import kdcache` loads nothing heavy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdcache.capture.executors.run import run_capture as run_capture
    from kdcache.capture.executors.tally import CaptureSummary as CaptureSummary
    from kdcache.capture.sequences import CutCounts as CutCounts
    from kdcache.capture.watch.progress import CaptureProgress as CaptureProgress
    from kdcache.capture.watch.signals import Interrupted as Interrupted
    from kdcache.capture.watch.signals import StopRequest as StopRequest
    from kdcache.config.capture import CaptureConfig as CaptureConfig
    from kdcache.config.capture import GenerateConfig as GenerateConfig
    from kdcache.config.capture import InputConfig as InputConfig
    from kdcache.config.capture import RunConfig as RunConfig
    from kdcache.config.capture import ShardConfig as ShardConfig
    from kdcache.config.cut import LayersConfig as LayersConfig
    from kdcache.config.cut import StatisticsConfig as StatisticsConfig
    from kdcache.config.cut import WidthConfig as WidthConfig
    from kdcache.config.features import FeatureConfig as FeatureConfig
    from kdcache.config.features import ProjectionConfig as ProjectionConfig
    from kdcache.config.load import load_config as load_config
    from kdcache.config.loader import LoaderConfig as LoaderConfig
    from kdcache.config.loader import MaskConfig as MaskConfig
    from kdcache.config.loader import MixConfig as MixConfig
    from kdcache.config.remote import RemoteConfig as RemoteConfig
    from kdcache.config.selection import CodecConfig as CodecConfig
    from kdcache.config.selection import SelectionConfig as SelectionConfig
    from kdcache.config.server import ServerConfig as ServerConfig
    from kdcache.config.teacher import FakeConfig as FakeConfig
    from kdcache.config.teacher import TeacherConfig as TeacherConfig
    from kdcache.config.teacher import VllmConfig as VllmConfig
    from kdcache.config.terms import TermConfig as TermConfig
    from kdcache.config.terms import Varying as Varying
    from kdcache.config.terms import WeightSchedule as WeightSchedule
    from kdcache.config.train import HeldoutConfig as HeldoutConfig
    from kdcache.config.train import LossConfig as LossConfig
    from kdcache.config.train import OptimizerConfig as OptimizerConfig
    from kdcache.config.train import StudentConfig as StudentConfig
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
    from kdcache.format.feature_vectors import FeatureVectors as FeatureVectors
    from kdcache.format.identity import CodecInfo as CodecInfo
    from kdcache.format.identity import FeatureInfo as FeatureInfo
    from kdcache.format.identity import Identity as Identity
    from kdcache.format.identity import ProjectionInfo as ProjectionInfo
    from kdcache.format.identity import SelectionInfo as SelectionInfo
    from kdcache.format.identity import TeacherIdentity as TeacherIdentity
    from kdcache.format.identity import TokenizerIdentity as TokenizerIdentity
    from kdcache.format.manifest import IndexInfo as IndexInfo
    from kdcache.format.manifest import LineageInfo as LineageInfo
    from kdcache.format.manifest import Manifest as Manifest
    from kdcache.format.manifest import PlanInfo as PlanInfo
    from kdcache.format.manifest import ShardInfo as ShardInfo
    from kdcache.format.manifest import SidecarInfo as SidecarInfo
    from kdcache.format.manifest import SkippedSequence as SkippedSequence
    from kdcache.format.manifest import TensorInfo as TensorInfo
    from kdcache.format.manifest import UnitAccount as UnitAccount
    from kdcache.format.record import Distributions as Distributions
    from kdcache.format.record import SequenceRecord as SequenceRecord
    from kdcache.format.record import TokenSequence as TokenSequence
    from kdcache.format.sidecar import SidecarFile as SidecarFile
    from kdcache.format.soft_targets import SoftTargets as SoftTargets
    from kdcache.inputs.left_out import LeftOut as LeftOut
    from kdcache.kernels.divergences import Divergence as Divergence
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
    from kdcache.loss.divergence_sum import DivergenceSum as DivergenceSum
    from kdcache.loss.divergence_sum import WeightedDivergence as WeightedDivergence
    from kdcache.loss.fused import Projection as Projection
    from kdcache.loss.fused import fused_sparse_kd_loss as fused_sparse_kd_loss
    from kdcache.loss.modules import FusedSparseKD as FusedSparseKD
    from kdcache.loss.modules import SparseKD as SparseKD
    from kdcache.loss.prepare import LossSettings as LossSettings
    from kdcache.loss.sparse_kd import sparse_kd_loss as sparse_kd_loss
    from kdcache.loss.vocab_parallel import VocabPart as VocabPart
    from kdcache.loss.vocab_parallel import vocab_parallel_sparse_kd_loss as vocab_parallel_sparse_kd_loss
    from kdcache.store.states_proof import StatesProof as StatesProof
    from kdcache.store.verify import VerifyReport as VerifyReport
    from kdcache.store.verify import verify_cache as verify_cache
    from kdcache.store.writing.set_aside import FailedUnit as FailedUnit
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
    "CodecConfig": "kdcache.config.selection:CodecConfig",
    "CodecInfo": "kdcache.format.identity:CodecInfo",
    "ConfigError": "kdcache.errors:ConfigError",
    "CorruptCacheError": "kdcache.errors:CorruptCacheError",
    "CutCounts": "kdcache.capture.sequences:CutCounts",
    "Distributions": "kdcache.format.record:Distributions",
    "Divergence": "kdcache.kernels.divergences:Divergence",
    "DivergenceSum": "kdcache.loss.divergence_sum:DivergenceSum",
    "EpochCounts": "kdcache.loader.rows.layout:EpochCounts",
    "EpochReport": "kdcache.loader.report:EpochReport",
    "FailedUnit": "kdcache.store.writing.set_aside:FailedUnit",
    "FakeConfig": "kdcache.config.teacher:FakeConfig",
    "FeatureConfig": "kdcache.config.features:FeatureConfig",
    "FeatureInfo": "kdcache.format.identity:FeatureInfo",
    "FeatureVectors": "kdcache.format.feature_vectors:FeatureVectors",
    "FormatError": "kdcache.errors:FormatError",
    "FusedSparseKD": "kdcache.loss.modules:FusedSparseKD",
    "GenerateConfig": "kdcache.config.capture:GenerateConfig",
    "Head": "kdcache.loss.chunks:Head",
    "HeldoutConfig": "kdcache.config.train:HeldoutConfig",
    "Identity": "kdcache.format.identity:Identity",
    "IndexInfo": "kdcache.format.manifest:IndexInfo",
    "InputConfig": "kdcache.config.capture:InputConfig",
    "InputError": "kdcache.errors:InputError",
    "Interrupted": "kdcache.capture.watch.signals:Interrupted",
    "KdcacheError": "kdcache.errors:KdcacheError",
    "LayersConfig": "kdcache.config.cut:LayersConfig",
    "LeftOut": "kdcache.inputs.left_out:LeftOut",
    "LineageInfo": "kdcache.format.manifest:LineageInfo",
    "Loader": "kdcache.loader.loader:Loader",
    "LoaderConfig": "kdcache.config.loader:LoaderConfig",
    "LossConfig": "kdcache.config.train:LossConfig",
    "LossError": "kdcache.errors:LossError",
    "LossSettings": "kdcache.loss.prepare:LossSettings",
    "Manifest": "kdcache.format.manifest:Manifest",
    "MaskConfig": "kdcache.config.loader:MaskConfig",
    "MismatchError": "kdcache.errors:MismatchError",
    "MissingDependencyError": "kdcache.errors:MissingDependencyError",
    "MixConfig": "kdcache.config.loader:MixConfig",
    "NotFiniteError": "kdcache.errors:NotFiniteError",
    "OptimizerConfig": "kdcache.config.train:OptimizerConfig",
    "PackedView": "kdcache.loader.view:PackedView",
    "PlanInfo": "kdcache.format.manifest:PlanInfo",
    "Projection": "kdcache.loss.fused:Projection",
    "ProjectionConfig": "kdcache.config.features:ProjectionConfig",
    "ProjectionInfo": "kdcache.format.identity:ProjectionInfo",
    "RemoteConfig": "kdcache.config.remote:RemoteConfig",
    "RunConfig": "kdcache.config.capture:RunConfig",
    "SelectionConfig": "kdcache.config.selection:SelectionConfig",
    "SelectionInfo": "kdcache.format.identity:SelectionInfo",
    "SequenceRecord": "kdcache.format.record:SequenceRecord",
    "ServerConfig": "kdcache.config.server:ServerConfig",
    "ShardConfig": "kdcache.config.capture:ShardConfig",
    "ShardInfo": "kdcache.format.manifest:ShardInfo",
    "SidecarFile": "kdcache.format.sidecar:SidecarFile",
    "SidecarInfo": "kdcache.format.sidecar_claims:SidecarInfo",
    "SkippedSequence": "kdcache.format.manifest:SkippedSequence",
    "SoftTargets": "kdcache.format.soft_targets:SoftTargets",
    "SparseKD": "kdcache.loss.modules:SparseKD",
    "StateError": "kdcache.errors:StateError",
    "StatisticsConfig": "kdcache.config.cut:StatisticsConfig",
    "StatesProof": "kdcache.store.states_proof:StatesProof",
    "StopRequest": "kdcache.capture.watch.signals:StopRequest",
    "StorageError": "kdcache.errors:StorageError",
    "StudentConfig": "kdcache.config.train:StudentConfig",
    "Teacher": "kdcache.teacher.base:Teacher",
    "TeacherConfig": "kdcache.config.teacher:TeacherConfig",
    "TeacherError": "kdcache.errors:TeacherError",
    "TeacherIdentity": "kdcache.format.identity:TeacherIdentity",
    "TermConfig": "kdcache.config.terms:TermConfig",
    "Varying": "kdcache.config.terms:Varying",
    "WeightSchedule": "kdcache.config.terms:WeightSchedule",
    "TensorInfo": "kdcache.format.sidecar_claims:TensorInfo",
    "TokenSequence": "kdcache.format.record:TokenSequence",
    "TokenizerIdentity": "kdcache.format.identity:TokenizerIdentity",
    "TorchBatch": "kdcache.loader.torch_batches:TorchBatch",
    "TorchLoader": "kdcache.loader.torch_batches:TorchLoader",
    "TrainConfig": "kdcache.config.train:TrainConfig",
    "UnitAccount": "kdcache.format.manifest:UnitAccount",
    "UnsupportedVersionError": "kdcache.errors:UnsupportedVersionError",
    "VerifyReport": "kdcache.store.verify:VerifyReport",
    "VllmConfig": "kdcache.config.teacher:VllmConfig",
    "VocabPart": "kdcache.loss.vocab_parallel:VocabPart",
    "WeightedDivergence": "kdcache.loss.divergence_sum:WeightedDivergence",
    "WidthConfig": "kdcache.config.cut:WidthConfig",
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
