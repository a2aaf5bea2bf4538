"""The hidden states that a capture keeps, with the teacher loaded or before that."""

from __future__ import annotations

from kdcache.config.capture import CaptureConfig
from kdcache.format.manifest import FeatureInfo
from kdcache.teacher import find_backend
from kdcache.teacher.base import Teacher
from kdcache.teacher.features import FeatureTeacher, no_features, resolve_features


def features_of(config: CaptureConfig, teacher: Teacher) -> tuple[FeatureInfo, ...]:
    """Resolve the features that the config asks this teacher for.

    Raises:
        ConfigError: the teacher gives no hidden states, or lacks that layer.
    """
    if not config.features:
        return ()
    if not isinstance(teacher, FeatureTeacher):
        raise no_features(f"the {teacher.identity.engine} teacher")
    return resolve_features(config.features, teacher.hidden_shape)


def stated_features(config: CaptureConfig) -> tuple[FeatureInfo, ...] | None:
    """Resolve the same from what is known before the model is loaded; None if that is not enough.

    Raises:
        ConfigError: the model lacks that layer.
    """
    if not config.features:
        return ()
    shape = find_backend(config.teacher.backend).hidden_shape(config.teacher)
    return None if shape is None else resolve_features(config.features, shape)
