"""Carry out a capture: plan -> teacher -> cache, resuming from what the cache already holds."""

from __future__ import annotations

from contextlib import closing

from kdcache.capture.executors.tally import CaptureSummary, fold_if_due, new_summary, own_units
from kdcache.capture.features import stated_features
from kdcache.capture.job import Job, check_fits, first_manifest, output_location, prepare
from kdcache.capture.once import missing_sidecars
from kdcache.capture.watch.progress import CaptureProgress, several
from kdcache.capture.watch.progress_file import ProgressFile, progress_path
from kdcache.capture.watch.signals import StopRequest
from kdcache.config.capture import CaptureConfig
from kdcache.config.load import config_to_builtins
from kdcache.errors import CorruptCacheError
from kdcache.store import chain
from kdcache.store.repair import find_misfits
from kdcache.store.writing.writer import CacheWriter, refuse_foreign_directory
from kdcache.teacher.checkpoint import resolved_revision, weights_digest

__all__ = ["CaptureSummary", "check_fits", "run_capture"]


def run_capture(
    config: CaptureConfig, progress: CaptureProgress | None = None, stop: StopRequest | None = None
) -> CaptureSummary:
    """Capture what is not captured yet; after any stop, the same call resumes at the first unit that is not published.

    When every unit is published and nothing that can be compared without the model differs (input, plan, tokenizer, selection,
    codec, the config's `teacher` section, the weights of a local model), the teacher is not loaded.

    Args:
        config: of the capture; its `run` section says where and by how many it is done.
        progress: is told what happens. The state is also kept in a file, see `run.progress_path`.
        stop: ask it to stop the capture after the current unit; `stopping_on_signals` does so on SIGINT and SIGTERM.

    Raises:
        ConfigError, InputError, TeacherError, MissingDependencyError: before or during the run; what is published is kept.
        MismatchError: `out` holds another capture, or something that is not a cache.
        StorageError: the disk or the store refuses. CaptureError: the teacher stalls, or more units fail than `run.max_failed`.
        KeyboardInterrupt: with a sentence on how to resume.
    """
    stop = stop or StopRequest()
    to_file = ProgressFile(progress_path(config), config)
    progress = several(progress, to_file) if progress is not None else to_file
    refuse_foreign_directory(output_location(config))
    with closing(prepare(config, progress)) as job, closing(progress):
        existing = _existing_writer(job)
        if existing is not None and _is_finished(job, existing):
            _refuse_misfits(existing)
            return new_summary(job, fold_if_due(job, existing), num_units_before=len(existing.published_units()))
        if config.run.executor == "ray":
            from kdcache.capture.executors._ray import capture_on_ray

            return capture_on_ray(job, progress, stop)
        from kdcache.capture.executors.local import capture_here

        return capture_here(job, progress, stop)


def _existing_writer(job: Job) -> CacheWriter | None:
    """A writer of the cache that is there; raises MismatchError where it differs in anything that needs no teacher to see."""
    if not chain.manifest_numbers(job.path):
        return None
    there = chain.newest_manifest(job.path).identity
    features = stated_features(job.config)
    # Where only the loaded teacher can tell, it is compared when it is loaded; what differs without it shows here.
    features = there.features if features is None else features
    return CacheWriter.open(job.path, first_manifest(job, there.teacher, features))


def _refuse_misfits(writer: CacheWriter) -> None:
    """Raise CorruptCacheError if a shard is missing or has another size, so that damage is never "nothing to do"."""
    misfits = find_misfits(writer.root, writer.manifest)
    if misfits:
        others = f" (and {len(misfits) - 1} others)" if len(misfits) > 1 else ""
        raise CorruptCacheError(
            f"{writer.root / misfits[0].name}: {misfits[0].reason}{others}; `kdcache repair {writer.root}` sets it aside, "
            "and the same capture then makes it again"
        )


def _is_finished(job: Job, existing: CacheWriter) -> bool:
    """Whether every unit that is ours is published, by a teacher of the same settings and, where they are local, weights."""
    published = existing.published_units()
    if not all(unit.index in published for unit in own_units(job.plan, job.config.run)):
        return False
    asked, noted = config_to_builtins(job.config), existing.manifest.config
    if noted.get("teacher") != asked["teacher"] or noted.get("features", []) != list(asked["features"]):
        return False
    if missing_sidecars(job.config, existing):
        return False
    # Without this a teacher that was trained further in the same folder, or whose branch on the hub has moved, would pass for
    # the one that was captured.
    teacher, config = existing.manifest.identity.teacher, job.config.teacher
    if teacher.revision is not None and teacher.revision != resolved_revision(config.model, config.revision):
        return False
    return teacher.weights_digest is None or teacher.weights_digest == weights_digest(config.model, config.adapter)
