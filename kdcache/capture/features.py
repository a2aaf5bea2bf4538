"""Hidden states that a capture keeps: what they are, with the teacher loaded or before, and what they take."""

from __future__ import annotations

from kdcache.config.capture import CaptureConfig
from kdcache.format.manifest import FeatureInfo
from kdcache.teacher import find_backend
from kdcache.teacher.base import Teacher
from kdcache.teacher.features import FeatureTeacher, no_features, resolve_features


def features_of(config: CaptureConfig, teacher: Teacher) -> tuple[FeatureInfo, ...]:
    """The features that the config asks this teacher for.

    Raises:
        ConfigError: it has no hidden states to give, or not that layer.
    """
    if not config.features:
        return ()
    if not isinstance(teacher, FeatureTeacher):
        raise no_features(f"the {teacher.identity.engine} teacher")
    return resolve_features(config.features, teacher.hidden_shape)


def stated_features(config: CaptureConfig) -> tuple[FeatureInfo, ...] | None:
    """The same by the model's config.json; None where that cannot be read before the model is loaded.

    Raises:
        ConfigError: the model does not have such a layer.
    """
    if not config.features:
        return ()
    shape = find_backend(config.teacher.backend).hidden_shape(config.teacher)
    return None if shape is None else resolve_features(config.features, shape)
