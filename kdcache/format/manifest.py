"""What describes a cache: identity, plan, shards. JSON in, JSON out; no numpy, no pyarrow.

A manifest carries the SHA-256 of itself (of the canonical JSON of all other fields), so a flipped bit is found when it is
opened, and the digest of its parent, so the chain can be checked back to manifest 0, which is written before any shard.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, TypeVar

import msgspec

from kdcache.errors import CorruptCacheError, FormatError, UnsupportedVersionError
from kdcache.format import paths
from kdcache.format.feature_claims import FEATURES_2
from kdcache.format.identity import CodecInfo as CodecInfo
from kdcache.format.identity import FeatureInfo as FeatureInfo
from kdcache.format.identity import GenerationInfo as GenerationInfo
from kdcache.format.identity import Identity as Identity
from kdcache.format.identity import ProjectionInfo as ProjectionInfo
from kdcache.format.identity import SelectionInfo as SelectionInfo
from kdcache.format.identity import TeacherIdentity as TeacherIdentity
from kdcache.format.identity import TokenizerIdentity as TokenizerIdentity
from kdcache.format.manifest_checks import check_depth, check_manifest, check_shard_values
from kdcache.format.sidecar_claims import SidecarInfo as SidecarInfo
from kdcache.format.sidecar_claims import TensorInfo as TensorInfo

_T = TypeVar("_T")

FORMAT_NAME = "kdcache"
FORMAT_VERSION = (1, 3)
"""(major, minor). Another major is refused; unknown fields and columns of a newer minor are ignored."""


KNOWN_REQUIREMENTS = (FEATURES_2,)
"""What a cache may require of its readers that this one has; anything else is refused."""


class PlanInfo(msgspec.Struct, frozen=True, kw_only=True):
    """The deterministic list of work that a capture carries out.

    Attributes:
        fingerprint: hash of the plan; a resume must come to the same.
        num_units: units in the plan; the cache is complete when each has a shard.
    """

    fingerprint: str
    num_units: int


class SkippedSequence(msgspec.Struct, frozen=True, kw_only=True):
    """A sequence of a unit that its shard does not hold: it made the unit fail, and failed alone as well.

    Attributes:
        source: as the record's would have been: where in the input it came from.
        reason: the error, in one sentence.
    """

    source: str
    reason: str


class UnitAccount(msgspec.Struct, frozen=True, kw_only=True):
    """What making a shard took, and what it had to leave out. For people; no two captures have the same.

    Attributes:
        wall_seconds: from reading the unit's items to the last byte written.
        cpu_seconds: of the process's threads in that time.
        gpu_seconds: wall_seconds x GPUs that the teacher held; None where no GPU can be read.
        energy_joules: what these GPUs used in that time; None where it cannot be read.
        skipped: sequences left out, in the order of the input.
    """

    wall_seconds: float
    cpu_seconds: float
    gpu_seconds: float | None = None
    energy_joules: float | None = None
    skipped: tuple[SkippedSequence, ...] = ()


class ShardInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One published shard, as its journal record and the manifest describe it.

    Attributes:
        unit: the unit of the plan that it holds.
        name: path inside the cache.
        sha256: of the whole file.
        num_bytes: of the whole file.
        num_sequences, num_tokens, num_positions, num_entries: totals over its sequences.
        num_targets: positions that have a target.
        num_impossible_targets: of these, the ones whose target the teacher gives probability 0.
        target_logprob_sum: the teacher's own sum of the other targets' logprobs in nats, float64, taken before the codec.
        tail_mass_sum: sum of tail_mass over all positions.
        entropy_floor_sum: sum over positions of the entropy in nats of support and one tail bucket: the least the teacher's
            entropy can be. It is at most tail_mass x log(tokens in the tail) more.
        entropy_ceiling_sum: the same with each tail spread evenly: the most it can be.
        column_bytes: bytes of each column's buffers, without Arrow's framing.
        num_finished: of answers that the teacher wrote, how many ended in which way (FINISHES); absent where it wrote none.
        num_exact_entries: how many entries are exact; absent where all are, as in every selection without draws.
        account: what it took; absent where its writer kept none.
    """

    unit: int
    name: str
    sha256: str
    num_bytes: int
    num_sequences: int
    num_tokens: int
    num_positions: int
    num_entries: int
    num_targets: int
    num_impossible_targets: int = 0
    target_logprob_sum: float
    tail_mass_sum: float
    entropy_floor_sum: float
    entropy_ceiling_sum: float
    column_bytes: dict[str, int]
    num_finished: dict[str, int] | msgspec.UnsetType = msgspec.UNSET
    num_exact_entries: int | msgspec.UnsetType = msgspec.UNSET
    account: UnitAccount | msgspec.UnsetType = msgspec.UNSET


class IndexInfo(msgspec.Struct, frozen=True, kw_only=True):
    """The index of sequences that belongs to a manifest."""

    name: str
    sha256: str


class OperationInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that was done to what the parents hold: its name, and its parameters as JSON."""

    name: str
    params: dict[str, Any] = {}


class ParentInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A cache from which another was made without asking a teacher.

    Attributes:
        name: last part of its address, for people.
        snapshot: digest of the manifest that was read: names exactly that content.
        teacher, tokenizer, selection, codec, input_fingerprint: of its identity. What its codec rounded stays rounded, whatever
            the codec of the cache made of it.
        lineage: its own, where it was made of others itself.
    """

    name: str
    snapshot: str
    teacher: TeacherIdentity
    tokenizer: TokenizerIdentity
    selection: SelectionInfo
    codec: CodecInfo
    input_fingerprint: str
    lineage: LineageInfo | msgspec.UnsetType = msgspec.UNSET


class LineageInfo(msgspec.Struct, frozen=True, kw_only=True):
    """How a cache was made from other caches: the operations, in the order in which they were done, and the caches."""

    operations: tuple[OperationInfo, ...]
    parents: tuple[ParentInfo, ...]


class Manifest(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """A snapshot of a cache.

    Attributes:
        number: 0 for the first; each fold adds one.
        parent: digest of manifest number-1; None for manifest 0.
        requires: features a reader must know; an unknown one is refused.
        versions: package -> version at capture, for people; not compared.
        config: the resolved capture config, for people; not compared.
        shards: ordered by unit, at most one per unit.
        lineage: of which caches this one was made, and how; absent where a teacher was asked.
        sidecars: files of tensors that belong to the cache; absent in caches from before format 1.3.
    """

    format: str = FORMAT_NAME
    format_version: tuple[int, int] = FORMAT_VERSION
    number: int
    parent: str | None
    requires: tuple[str, ...] = ()
    identity: Identity
    plan: PlanInfo
    versions: dict[str, str] = {}
    config: dict[str, Any] = {}
    shards: tuple[ShardInfo, ...] = ()
    index: IndexInfo | None = None
    lineage: LineageInfo | msgspec.UnsetType = msgspec.UNSET
    sidecars: tuple[SidecarInfo, ...] = ()

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON: the name of this snapshot. That of the file, where it was read from one: a newer minor
        version may have written fields that are not known here."""
        return hashlib.sha256(_canonical(msgspec.to_builtins(self))).hexdigest()

    def __reduce__(self) -> tuple[Any, ...]:
        # As plain values: pickle finds UNSET by asking every module that is loaded, some of which import others when asked.
        return _from_builtins, (msgspec.to_builtins(self), self.digest)

    @property
    def notes(self) -> dict[str, Any]:
        """What the command that made the cache has noted in its config; empty where nothing, or no mapping, stands there."""
        notes = self.config.get("notes")
        return notes if isinstance(notes, dict) else {}

    @property
    def is_complete(self) -> bool:
        """Whether every unit of the plan has a shard."""
        return len(self.shards) == self.plan.num_units

    def total(self, field: str) -> Any:
        """Sum of one of ShardInfo's numbers over all shards."""
        return sum(getattr(shard, field) for shard in self.shards)


def _from_builtins(fields: dict[str, Any], digest: str) -> Manifest:
    manifest = msgspec.convert(fields, Manifest)
    msgspec.structs.force_setattr(manifest, "digest", digest)
    return manifest


def fingerprint(value: Any) -> str:
    """SHA-256 of the canonical JSON of a value or struct: equal meaning, equal fingerprint."""
    return hashlib.sha256(_canonical(msgspec.to_builtins(value))).hexdigest()


def manifest_to_json(manifest: Manifest) -> bytes:
    """The file's bytes: indented JSON, with its own digest as the last field."""
    fields = msgspec.to_builtins(manifest) | {"digest": manifest.digest}
    return msgspec.json.format(msgspec.json.encode(fields), indent=1) + b"\n"


def manifest_from_json(data: bytes, *, where: str) -> Manifest:
    """Parse and check a manifest file.

    Args:
        data: the file's bytes.
        where: its path, for messages.

    Raises:
        UnsupportedVersionError: another major version, or a required feature that is unknown here.
        CorruptCacheError: not JSON, a field missing or of the wrong type, a digest that does not match, a file name that is
            not one of ours, or a number or a sum out of its range.
    """
    fields = _json_object(data, where)
    _check_version(fields, where)
    digest = _checked_digest(fields, "the manifest's", where)
    manifest = _convert(fields, Manifest, where)
    for shard in manifest.shards:
        _check_shard_name(shard, where)
    units = [shard.unit for shard in manifest.shards]
    if units != sorted(set(units)):
        raise CorruptCacheError(f"{where}: the shards are not in the order of their units, one each")
    index = manifest.index
    if index is not None and not (
        paths.is_sha256(index.sha256) and paths.is_index_name(index.name) and index.name == paths.index_name(index.sha256)
    ):
        raise CorruptCacheError(f"{where}: {index.name!r} is not the name of an index with SHA-256 {index.sha256!r}")
    with _refusals(where):
        check_depth({name: value for name, value in fields.items() if name != "shards"})
        check_manifest(manifest)
    msgspec.structs.force_setattr(manifest, "digest", digest)
    return manifest


def shard_to_json(shard: ShardInfo) -> bytes:
    """A journal record's bytes, with its own digest."""
    fields = msgspec.to_builtins(shard)
    return msgspec.json.encode(fields | {"digest": hashlib.sha256(_canonical(fields)).hexdigest()}) + b"\n"


def shard_from_json(data: bytes, *, where: str) -> ShardInfo:
    """Parse and check a journal record; raises CorruptCacheError as `manifest_from_json` does."""
    fields = _json_object(data, where)
    _checked_digest(fields, "the journal record's", where)
    shard = _convert(fields, ShardInfo, where)
    _check_shard_name(shard, where)
    with _refusals(where):
        check_shard_values(shard)
    return shard


@contextmanager
def _refusals(where: str) -> Iterator[None]:
    """What is out of its range, and where."""
    try:
        yield
    except UnsupportedVersionError as error:
        raise UnsupportedVersionError(f"{where}: {error}") from error
    except FormatError as error:
        raise CorruptCacheError(f"{where}: {error}") from error


def _json_object(data: bytes, where: str) -> dict[str, Any]:
    try:
        fields = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptCacheError(f"{where}: not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise CorruptCacheError(f"{where}: expected a JSON object")
    return fields


def _checked_digest(fields: dict[str, Any], whose: str, where: str) -> str:
    """Take the digest out of the fields and compare it with theirs."""
    digest = fields.pop("digest", None)
    try:
        found = hashlib.sha256(_canonical(fields)).hexdigest()
    except (RecursionError, OverflowError) as error:
        raise CorruptCacheError(f"{where}: {error}") from error
    if digest != found:
        raise CorruptCacheError(
            f"{where}: {whose} own digest {digest!r} does not match its text, {found!r}; the file is damaged or was edited"
        )
    return found


def _convert(fields: dict[str, Any], kind: type[_T], where: str) -> _T:
    try:
        return msgspec.convert(fields, kind)
    except (msgspec.ValidationError, RecursionError) as error:
        raise CorruptCacheError(f"{where}: {error}") from error


def _check_shard_name(shard: ShardInfo, where: str) -> None:
    # The patterns first: they are what keeps a name inside the cache's directory.
    if (
        not paths.is_sha256(shard.sha256)
        or not paths.is_shard_name(shard.name)
        or shard.name != paths.shard_name(shard.unit, shard.sha256)
    ):
        raise CorruptCacheError(
            f"{where}: {shard.name!r} is not the name of a shard of unit {shard.unit} with SHA-256 {shard.sha256!r}"
        )


def _check_version(fields: dict[str, Any], where: str) -> None:
    if fields.get("format") != FORMAT_NAME:
        raise CorruptCacheError(f"{where}: format is {fields.get('format')!r}, expected {FORMAT_NAME!r}")
    version = fields.get("format_version")
    if not (isinstance(version, list) and len(version) == 2 and all(isinstance(v, int) for v in version)):
        raise CorruptCacheError(f"{where}: format_version is {version!r}, expected two integers")
    if version[0] != FORMAT_VERSION[0]:
        raise UnsupportedVersionError(
            f"{where}: format version {version[0]}.{version[1]}, this kdcache reads {FORMAT_VERSION[0]}.x"
        )
    required = fields.get("requires") or []
    if not isinstance(required, list):
        raise CorruptCacheError(f"{where}: requires is {required!r}, expected a list of features")
    unknown = [name for name in required if name not in KNOWN_REQUIREMENTS]
    if unknown:
        raise UnsupportedVersionError(f"{where}: the cache requires {', '.join(map(str, unknown))}; upgrade kdcache to read it")


def _canonical(fields: Any) -> bytes:
    return msgspec.json.encode(fields, order="sorted")
