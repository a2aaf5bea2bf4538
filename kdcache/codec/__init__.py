"""Codecs: how Distributions become Arrow columns. `get_codec` finds one by id, ours or another package's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kdcache import extensions
from kdcache.errors import ConfigError, UnsupportedVersionError

if TYPE_CHECKING:
    from kdcache.codec.base import Codec
    from kdcache.format.manifest import SelectionInfo

CODECS = extensions.OWN["codecs"]
"""codec id -> "module:Class" of those that kdcache brings, imported on use."""


def get_codec(codec_id: str, params: dict[str, Any], selection: SelectionInfo | None = None) -> Codec:
    """Make the codec with this id and these parameters, for what a selection keeps.

    Args:
        codec_id: one of `kdcache.extensions.names("codecs")`.
        params: as the codec's `params` gave them.
        selection: what is kept of each distribution; None for exact entries without any scalars.

    Raises:
        UnsupportedVersionError: unknown id, or parameters this version does not know.
    """
    try:
        make = extensions.find("codecs", codec_id)
    except ConfigError as error:
        raise UnsupportedVersionError(
            f"codec {codec_id!r} is unknown here: {error}; upgrade kdcache, or install the package that brings the codec"
        ) from error
    try:
        kept = {} if selection is None else {"selection": selection}
        codec: Codec = make(**params, **kept)
    except (TypeError, ValueError) as error:
        raise UnsupportedVersionError(f"codec {codec_id!r} does not take the parameters {params!r}: {error}") from error
    return codec
