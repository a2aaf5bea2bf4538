"""A cache keeps each sequence's domain where its identity says so, digested as everything else."""

from dataclasses import replace

import msgspec
import pyarrow as pa
import pytest
from cache_making import make_manifest, make_unit

from kdcache.errors import CorruptCacheError, FormatError
from kdcache.format.schema import DOMAIN_FIELD, SEQUENCE_FIELDS
from kdcache.store.reader import open_reader
from kdcache.store.verify import verify_cache
from kdcache.store.writing.writer import CacheWriter

DOMAINS = ["wiki", "", "code \u00e9", "wiki"]


def write(path, domains, *, has_domains):
    manifest = make_manifest(1)
    manifest = msgspec.structs.replace(manifest, identity=msgspec.structs.replace(manifest.identity, domains=has_domains))
    writer = CacheWriter.open(path, manifest)
    records = make_unit(0, num_sequences=len(domains))
    writer.write_unit(0, [replace(r, sequence=replace(r.sequence, domain=d)) for r, d in zip(records, domains, strict=True)])
    writer.fold()
    return next((path / "data").iterdir())


def test_domains_come_back_and_the_cache_is_sound(tmp_path):
    shard = write(tmp_path / "cache", DOMAINS, has_domains=True)
    assert pa.ipc.open_file(shard).schema.names[len(SEQUENCE_FIELDS)] == DOMAIN_FIELD.name
    with open_reader(tmp_path / "cache") as reader:
        assert [reader[n].sequence.domain for n in range(len(reader))] == DOMAINS
    assert verify_cache(tmp_path / "cache").problems == []


def test_a_cache_without_domains_has_no_column_for_them_and_takes_none(tmp_path):
    shard = write(tmp_path / "cache", ["", ""], has_domains=False)
    assert DOMAIN_FIELD.name not in pa.ipc.open_file(shard).schema.names
    with open_reader(tmp_path / "cache") as reader:
        assert reader[0].sequence.domain == ""
    with pytest.raises(FormatError, match="of which domain it is, but the cache's identity has no domains"):
        write(tmp_path / "other", ["wiki", ""], has_domains=False)


def test_another_domain_than_the_one_written_is_found(tmp_path):
    shard = write(tmp_path / "cache", ["wiki", "code"], has_domains=True)
    data = shard.read_bytes()
    assert data.count(b"wikicode") == 1
    shard.write_bytes(data.replace(b"wikicode", b"codecode"))
    with open_reader(tmp_path / "cache") as reader:
        with pytest.raises(CorruptCacheError, match="digest does not match"):
            reader[0]
        assert reader[1].sequence.domain == "code"


def test_a_shard_that_names_domains_under_a_manifest_that_has_none_is_refused(tmp_path):
    named = write(tmp_path / "named", ["wiki", "code"], has_domains=True)
    plain = write(tmp_path / "plain", ["", ""], has_domains=False)
    with open_reader(tmp_path / "plain") as reader:
        shard = reader.manifest.shards[0]
        assert shard.name.endswith(plain.name)
    plain.write_bytes(named.read_bytes())
    with pytest.raises(CorruptCacheError), open_reader(tmp_path / "plain") as reader:
        reader[0]
