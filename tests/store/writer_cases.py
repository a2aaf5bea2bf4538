"""What the tests of writing share."""

from __future__ import annotations

from cache_making import make_identity, make_manifest

from kdcache.store.writing.writer import CacheWriter


def start(path, num_units=3, codec_id="raw", **options) -> CacheWriter:
    return CacheWriter.open(path, make_manifest(num_units, make_identity(codec_id)), **options)


def files(path) -> list[str]:
    return sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file())


def changed(part, **fields):
    return type(part)(**{name: fields.get(name, getattr(part, name)) for name in part.__dataclass_fields__})
