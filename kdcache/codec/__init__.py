"""Codecs: how Distributions become Arrow columns. `get_codec` finds one by id."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kdcache.errors import UnsupportedVersionError

if TYPE_CHECKING:
    from kdcache.codec.base import Codec
    from kdcache.format.manifest import SelectionInfo

CODECS = {
    "raw": "kdcache.codec.raw:RawCodec",
    "packed": "kdcache.codec.packed:PackedCodec",
    "quantized": "kdcache.codec.quantized:QuantizedCodec",
    "archive": "kdcache.codec.archive.codec:ArchiveCodec",
}
"""codec id -> "module:Class", imported on use."""


def get_codec(codec_id: str, params: dict[str, Any], selection: SelectionInfo | None = None) -> Codec:
    """The codec with this id and these parameters, for what a selection keeps.

    Args:
        codec_id: one of CODECS.
        params: as the codec's `params` gave them.
        selection: what is kept of each distribution; None for exact entries with nothing beside.

    Raises:
        UnsupportedVersionError: unknown id, or parameters this version does not know.
    """
    if codec_id not in CODECS:
        raise UnsupportedVersionError(
            f"codec {codec_id!r} is unknown here; known are {', '.join(CODECS)}; upgrade kdcache to read it"
        )
    module, _, name = CODECS[codec_id].partition(":")
    try:
        kept = {} if selection is None else {"selection": selection}
        codec: Codec = getattr(import_module(module), name)(**params, **kept)
    except (TypeError, ValueError) as error:
        raise UnsupportedVersionError(f"codec {codec_id!r} does not take the parameters {params!r}: {error}") from error
    return codec
