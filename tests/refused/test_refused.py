"""One cache per refusal: the right error, with the file and both values in its sentence, at every way in."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import hostile
import pytest
from cache_making import make_cache, make_record

from kdcache.errors import CacheNotFoundError, CorruptCacheError, KdcacheError, UnsupportedVersionError
from kdcache.store.reader import open_reader
from kdcache.store.summary import summarize_cache
from kdcache.store.verify import verify_cache


@dataclass(frozen=True)
class Refusal:
    spoil: Callable[[Path], object]
    error: type[KdcacheError]
    parts: tuple[str, ...]


def corrupt(spoil: Callable[[Path], object], *parts: str) -> Refusal:
    return Refusal(spoil, CorruptCacheError, parts)


def unsupported(spoil: Callable[[Path], object], *parts: str) -> Refusal:
    return Refusal(spoil, UnsupportedVersionError, parts)


def edit_manifest(change: Callable[[hostile.Fields], object]) -> Callable[[Path], None]:
    return lambda cache: hostile.edit_manifest(cache, lambda fields: change(fields) and None)


def edit_row(name: str, values: list) -> Callable[[Path], None]:
    return lambda cache: hostile.edit_rows(cache, hostile.set_list(name, values))


def bomb(text: str) -> Callable[[Path], object]:
    return lambda cache: hostile.manifest_path(cache).write_text(text)


HEAD = '{"format": "kdcache", "format_version": [1, 0], '
REFUSALS = {
    "a truncated shard": corrupt(
        lambda c: hostile.shard_path(c).write_bytes(hostile.shard_path(c).read_bytes()[:-100]),
        "000000-",
        "bytes, the manifest says",
    ),
    "a missing shard": corrupt(lambda c: hostile.shard_path(c).unlink(), "000000-", "No such file"),
    "a flipped bit in a row": corrupt(hostile.flip_a_stored_value, "batch 0, sequence 0", "digest does not match"),
    "rows that changed places": corrupt(hostile.swap_rows, "batch 0, sequence 0", "holds key", "the index says key"),
    "another major version": unsupported(edit_manifest(lambda f: f.update(format_version=[2, 0])), "000001.json", "2.0", "1.x"),
    "a shard of another major version": unsupported(
        lambda c: hostile.edit_metadata(c, format_version=[2, 0]), "000000-", "(2, 0)", "1.x"
    ),
    "an unknown required feature": unsupported(
        edit_manifest(lambda f: f.update(requires=["warp"])), "000001.json", "requires warp", "upgrade"
    ),
    "an unknown codec": unsupported(hostile.replaced_codec({"codec_id": "warp", "params": {}}), "'warp'", "raw, packed"),
    "a codec with unknown parameters": unsupported(
        hostile.replaced_codec({"codec_id": "raw", "params": {"vocab_size": 97, "x": 1}}), "'x'"
    ),
    "a codec with a larger vocabulary than the teacher": corrupt(
        hostile.replaced_codec({"codec_id": "raw", "params": {"vocab_size": 2**31}}), "2147483648", "97"
    ),
    "counts that claim more than there is": corrupt(
        edit_row("num_entries", [5] * 10 + [4]), "batch 0, sequence 0", "55 values", "expected 54"
    ),
    "huge counts": corrupt(edit_row("num_entries", [65535] * 11), "batch 0, sequence 0", "65535 entries", "keeps 5"),
    "a huge number of entries by the selection": corrupt(
        hostile.replaced_selection({"kind": "top_k", "params": {"k": 2**62}}), "000001.json", str(2**62), "2^31"
    ),
    "ids beyond the vocabulary": corrupt(edit_row("token_ids", [97] * 55), "batch 0, sequence 0", "vocabulary of 97"),
    "negative ids": corrupt(edit_row("token_ids", [-1] * 55), "batch 0, sequence 0", "vocabulary of 97"),
    "text ids beyond the vocabulary": corrupt(edit_row("input_ids", [97] * 12), "batch 0, sequence 0", "vocabulary of 97"),
    "a digest that leaves a column out": corrupt(hostile.unsigned_row, "000000-", "the digest covers", "expected"),
    "another kind of digest": unsupported(lambda c: hostile.edit_metadata(c, digest="crc32"), "000000-", "crc32", "xxh3_64"),
    "a shard of another unit": corrupt(lambda c: hostile.edit_metadata(c, unit=7), "000000-", "says that it is (7", "says (0"),
    "an Arrow file of others": corrupt(hostile.foreign_arrow_file, "000000-", "no kdcache metadata"),
    "a missing column": corrupt(hostile.without_a_column, "000000-", "column 'digest'"),
    "no Arrow file": corrupt(lambda c: hostile.replace_shard(c, b"ARROW1" * 50), "000000-", "cannot be read as an Arrow file"),
    "an empty shard": corrupt(lambda c: hostile.replace_shard(c, b""), "000000-", "cannot be read as an Arrow file"),
    "compressed buffers": corrupt(hostile.compress, "000000-", "compressed"),
    "a compressed index": corrupt(hostile.compress_index, "index/", "compressed"),
    "an older version of Arrow's metadata": corrupt(hostile.older_arrow, "000000-", "another metadata version than V5"),
    "keys beside a record batch": corrupt(hostile.with_keys_beside, "000000-", "compressed"),
    "a record batch that is named twice": corrupt(
        lambda c: hostile.replace_shard(c, hostile.repeat_a_batch(hostile.shard_path(c).read_bytes())), "000000-", "overlap"
    ),
    "an index whose record batches are named twice": corrupt(hostile.repeat_in_index, "index/", "overlap"),
    "more entries by the selection than there are ids": corrupt(
        hostile.replaced_selection({"kind": "top_k", "params": {"k": 2**31}}),
        "batch 0, sequence 0",
        "claims more entries",
    ),
    "a path out of the cache": corrupt(
        edit_manifest(lambda f: f["shards"][0].update(name="../../etc/passwd")), "000001.json", "'../../etc/passwd'"
    ),
    "half a SHA-256": corrupt(
        edit_manifest(lambda f: f["shards"][0].update(sha256=f["shards"][0]["sha256"][:16] + "/../../../x")),
        "000001.json",
        "SHA",
    ),
    "half a SHA-256 of the index": corrupt(
        edit_manifest(lambda f: f["index"].update(sha256=f["index"]["sha256"][:16] + "\0")), "000001.json", "SHA"
    ),
    "a manifest edited by hand": corrupt(
        lambda c: hostile.manifest_path(c).write_text(hostile.manifest_path(c).read_text().replace('"k": 5', '"k": 6')),
        "000001.json",
        "digest",
    ),
    "deep JSON": corrupt(bomb(HEAD + '"x": ' + "[" * 10**6 + "]" * 10**6 + "}"), "000001.json", "not JSON"),
    "JSON with a huge number": corrupt(bomb(HEAD + '"number": ' + "9" * 10**6 + "}"), "000001.json", "not JSON"),
    "JSON with a number beyond floats": corrupt(bomb(HEAD + '"number": 1e999}'), "000001.json", "not JSON"),
    "an empty manifest": corrupt(bomb(""), "000001.json", "not JSON"),
    "a manifest under another's name": corrupt(
        edit_manifest(lambda f: f.update(number=7)), "000001.json", "says that it is manifest 7"
    ),
    "a missing index": corrupt(lambda c: [p.unlink() for p in (c / "index").iterdir()], "index/", "No such file"),
    "a flipped bit in the index": corrupt(
        lambda c: [hostile.flip(p, 700) for p in (c / "index").iterdir()], "index/", "SHA-256"
    ),
    "an index that is no Arrow file": corrupt(lambda c: hostile.replace_index(c, b"ARROW1" * 50), "index/", "cannot be read"),
    "an index of too few sequences": corrupt(
        lambda c: hostile.replace_index(c, hostile.file_bytes([], hostile.INDEX_SCHEMA)), "has 0 sequences, the manifest 3"
    ),
    "an index that names another unit": corrupt(lambda c: hostile.edit_index(c, unit=[9] * 3), "unit 9"),
    "an index that names another record batch": corrupt(
        lambda c: hostile.edit_index(c, record_batch=[2**32 - 1] * 3), "record batch 4294967295"
    ),
    "an index that names another row": corrupt(
        lambda c: hostile.edit_index(c, row=[2**32 - 1] * 3), "has 1 sequences", "sequence 4294967295"
    ),
    "an index that claims other lengths": corrupt(
        lambda c: hostile.edit_index(c, num_tokens=[2**32 - 1] * 3), "batch 0, sequence 0", "4294967295 tokens"
    ),
    "no cache": Refusal(shutil.rmtree, CacheNotFoundError, ("the directory does not exist",)),
    "a directory that is no cache": Refusal(
        lambda c: shutil.rmtree(c / "manifests"), CacheNotFoundError, ("it holds no manifests",)
    ),
}
SEEN_BY_OPENING = {"no cache", "a directory that is no cache"}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("sound") / "cache", units=[[make_record(seed) for seed in range(3)]])


def read_all(cache: Path) -> None:
    with open_reader(cache) as reader:
        for record in reader:
            assert record.sequence.num_tokens


def test_the_cache_before_it_is_spoilt_is_sound(sound):
    read_all(sound)
    assert verify_cache(sound).problems == []


@pytest.mark.parametrize("name", REFUSALS)
def test_a_spoilt_cache_is_refused_in_words(tmp_path, sound, name):
    refusal = REFUSALS[name]
    cache = tmp_path / "cache"
    shutil.copytree(sound, cache)
    refusal.spoil(cache)
    with pytest.raises(KdcacheError) as caught:
        read_all(cache)
    assert type(caught.value) is refusal.error
    for part in (str(cache), *refusal.parts):
        assert part in str(caught.value)
    assert len(str(caught.value)) < 2000
    assert "\n" not in str(caught.value).strip()


@pytest.mark.parametrize("name", REFUSALS)
def test_verify_names_what_a_reader_refuses(tmp_path, sound, name):
    cache = tmp_path / "cache"
    shutil.copytree(sound, cache)
    REFUSALS[name].spoil(cache)
    try:
        problems = verify_cache(cache).problems
    except KdcacheError as error:
        problems = [str(error)]
    assert problems
    try:
        summarize_cache(cache)
    except KdcacheError:
        return


def test_a_cache_that_is_refused_is_left_as_it_is(tmp_path, sound):
    cache = tmp_path / "cache"
    shutil.copytree(sound, cache)
    hostile.swap_rows(cache)
    before = {path: path.read_bytes() for path in cache.rglob("*") if path.is_file()}
    with pytest.raises(CorruptCacheError):
        read_all(cache)
    verify_cache(cache)
    assert {path: path.read_bytes() for path in cache.rglob("*") if path.is_file()} == before
