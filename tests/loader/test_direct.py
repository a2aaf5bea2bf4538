"""Batches straight from record batches are those that are assembled from records, bit for bit; or there are none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pytest
from cache_making import make_cache, make_manifest, make_record, make_unit
from cache_making import make_identity as identity_of
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_reader import MemoryReader, parts_of_both

from kdcache.config.loader import LoaderConfig, MaskConfig
from kdcache.errors import CorruptCacheError, KdcacheError
from kdcache.format.manifest import CodecInfo, SelectionInfo
from kdcache.format.record import SequenceRecord
from kdcache.format.schema import sequence_digest
from kdcache.loader.batches.assemble import BatchLayout, assemble
from kdcache.loader.batches.batch import Batch
from kdcache.loader.cache import open_cache
from kdcache.loader.caches import CacheLike, CacheSet
from kdcache.loader.loader import Loader
from kdcache.loader.read import read_mapped, read_rows
from kdcache.store.records.column_view import column_view
from kdcache.store.writing.writer import CacheWriter

SEQ_LEN, VOCAB_SIZE = 64, 97
TOP_K = SelectionInfo(kind="top_k", params={"k": 5})
WITH_NUMBERS = SelectionInfo(kind="top_p_k", params={"p": 1.0, "k": 5}, temperatures=(2.0, 4.0), entropy=True)
CODECS = [CodecInfo(codec_id="packed", params={"vocab_size": VOCAB_SIZE})]
CODECS += [CodecInfo(codec_id="quantized", params={"vocab_size": VOCAB_SIZE, "bits": bits}) for bits in (8, 5)]
KIND = st.fixed_dictionaries(
    {
        "num_tokens": st.integers(1, 20),
        "is_ragged": st.booleans(),
        "is_chat": st.booleans(),
        "supervised": st.sampled_from(["all", "none", "every", "holes"]),
    }
)


def with_numbers(record: SequenceRecord, selection: SelectionInfo) -> SequenceRecord:
    """With as many further numbers as the selection keeps."""
    if not selection.entropy:
        return record
    rng, num_positions = np.random.default_rng(record.sequence.num_tokens), record.distributions.num_positions
    numbers = {
        "log_z_PL": rng.normal(0, 9, (num_positions, 2)).astype(np.float32),
        "entropy_P": rng.random(num_positions, np.float32),
    }
    return SequenceRecord(record.sequence, replace(record.distributions, **numbers))


def write(folder: Path, records: Sequence[SequenceRecord], codec: CodecInfo, selection: SelectionInfo, batch_bytes: int) -> str:
    import msgspec

    identity = msgspec.structs.replace(identity_of("packed", selection=selection), codec=codec)
    writer = CacheWriter.open(folder, make_manifest(1, identity), record_batch_bytes=batch_bytes)
    writer.write_unit(0, records)
    writer.fold()
    return str(folder)


def layout_of(caches: CacheSet, rows: Sequence[np.ndarray], **options: object) -> BatchLayout:
    num_sequences = tuple(len(row) for row in rows)
    return BatchLayout(num_sequences, SEQ_LEN, caches.columns, logprob_dtype=caches.logprob_dtype, **options)  # pyright: ignore[reportArgumentType]


def both(caches: CacheSet, rows: Sequence[np.ndarray]) -> tuple[Batch | None, Batch]:
    layout = layout_of(caches, rows)
    return read_mapped(caches, rows, layout, None), assemble([caches.record(int(i)) for row in rows for i in row], layout)


def assert_same_bits(found: Batch | None, expected: Batch) -> None:
    assert found is not None
    for name, left, right in parts_of_both(found, expected):
        if isinstance(right, np.ndarray):
            assert (left.dtype, left.shape, left.tobytes()) == (right.dtype, right.shape, right.tobytes()), name
        else:
            assert left == right, name


@settings(deadline=None, max_examples=40)
@given(
    kinds=st.lists(KIND, min_size=1, max_size=9),
    codec=st.sampled_from(CODECS),
    selection=st.sampled_from([TOP_K, WITH_NUMBERS]),
    batch_bytes=st.sampled_from([1, 3000, 10**6]),
    seed=st.integers(0, 10**6),
    is_half=st.booleans(),
)
def test_rows_of_any_sequences_are_the_batch_that_is_assembled(
    kinds: list[dict[str, object]], codec: CodecInfo, selection: SelectionInfo, batch_bytes: int, seed: int, is_half: bool
) -> None:
    rng, dtype = np.random.default_rng(seed), "float16" if is_half and codec.codec_id == "packed" else "float32"
    records = [with_numbers(make_record(i, **kind), selection) for i, kind in enumerate(kinds)]  # pyright: ignore[reportArgumentType]
    wanted = rng.integers(0, len(records), int(rng.integers(1, 12)))
    rows = [row for part in np.array_split(wanted, len(wanted) // 3 + 1) for row in (part, part[:0])]
    with TemporaryDirectory() as folder, open_cache(write(Path(folder), records, codec, selection, batch_bytes)) as cache:
        found, expected = both(CacheSet(cache, LoaderConfig(logprob_dtype=dtype)), rows)
        assert_same_bits(found, expected)
        assert expected.teacher.logprobs_PK.dtype == dtype


def test_more_record_batches_than_are_kept_open_are_read_at_once(tmp_path: Path) -> None:
    records = [make_record(i, num_tokens=2) for i in range(300)]
    with open_cache(write(tmp_path / "c", records, CODECS[0], TOP_K, 1)) as cache:
        assert_same_bits(*both(CacheSet(cache), list(np.arange(300).reshape(20, 15))))


def test_several_caches_selections_and_threads_give_the_stream_of_the_records(tmp_path: Path) -> None:
    units = [make_unit(unit, num_sequences=20) for unit in range(2)]
    first, second = (
        open_cache(make_cache(tmp_path / str(c), "packed", units=[units[c]], record_batch_bytes=900)) for c in (0, 1)
    )
    caches: list[CacheLike] = [first, second.select([7, 3, 3, 12, 0])]
    options = LoaderConfig(seq_len=SEQ_LEN, batch_rows=2, num_threads=2)
    together = CacheSet(caches)
    with first, second, Loader(caches, options) as loader:
        for epoch in range(2):
            plan = loader._layout_of(epoch)
            for number, batch in enumerate(loader):
                assert_same_bits(batch, both(together, plan.batch(number).rows)[1])


def test_without_checks_the_batch_is_the_same_and_damage_is_not_seen(tmp_path: Path) -> None:
    path = Path(write(tmp_path / "c", [make_record(0, num_tokens=20)], CODECS[0], TOP_K, 10**6))
    rows = [np.array([0])]
    whole = both(CacheSet(path), rows)[1]
    damage(path, whole.teacher.logprobs_PK.astype(np.float16).tobytes())
    with open_cache(path, verify=False) as cache:
        found, expected = both(CacheSet(cache), rows)
        assert_same_bits(found, expected)
        assert (expected.teacher.logprobs_PK != whole.teacher.logprobs_PK).sum() == 1
    with open_cache(path) as cache:
        assert read_mapped(CacheSet(cache), rows, layout_of(CacheSet(cache), rows), None) is None


def damage(path: Path, after: bytes) -> None:
    """Flip the first bit of these bytes of a cache's shard."""
    shard = next((path / "data").iterdir())
    data = bytearray(shard.read_bytes())
    data[data.index(after)] ^= 1
    shard.chmod(0o644)
    shard.write_bytes(data)


def test_what_has_to_be_looked_at_record_by_record_is_not_read_directly(tmp_path: Path) -> None:
    rows = [np.array([0, 1])]
    for codec_id in ("raw", "archive"):
        caches = CacheSet(make_cache(tmp_path / codec_id, codec_id))
        assert read_mapped(caches, rows, layout_of(caches, rows), None) is None
    caches = CacheSet(make_cache(tmp_path / "packed", "packed"))
    assert read_mapped(caches, rows, layout_of(caches, rows), None) is not None
    assert read_mapped(caches, rows, layout_of(caches, rows, mask=MaskConfig(drop_first=1)), None) is None
    assert read_mapped(caches, rows, layout_of(caches, rows, with_roles=True), None) is None
    assert read_mapped(caches, [np.zeros(0, np.int64)], layout_of(caches, [np.zeros(0)]), None) is None
    short = BatchLayout((2,), 8, caches.columns)  # sequences that do not fit a row: to be said with their source
    assert read_mapped(caches, rows, short, None) is None
    memory = CacheSet(MemoryReader([3, 4], k=5))
    assert read_mapped(memory, rows, layout_of(memory, rows), None) is None


@pytest.mark.parametrize("codec", CODECS[:2], ids=lambda codec: codec.codec_id)
def test_no_flipped_bit_gives_another_batch_or_another_message(tmp_path: Path, codec: CodecInfo) -> None:
    records = [make_record(i, num_tokens=n, supervised="every") for i, n in enumerate((3, 12, 1))]
    records.append(make_record(9, num_tokens=4, supervised="none"))
    path = Path(write(tmp_path / "c", records, codec, TOP_K, 10**6))
    rows = [np.arange(4)]
    whole = both(CacheSet(path), rows)[1]
    shard = next((path / "data").iterdir())
    shard.chmod(0o644)
    data = shard.read_bytes()
    refused = 0
    for bit in np.random.default_rng(0).integers(0, 8 * len(data), 150).tolist():
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        shard.write_bytes(damaged)
        refused += is_refused_or_same(path, rows, whole)
    assert 20 < refused < 150


def is_refused_or_same(path: Path, rows: Sequence[np.ndarray], whole: Batch) -> bool:
    messages = []
    with open_cache(path) as cache:
        caches = CacheSet(cache)
        try:
            assert_same_bits(both(caches, rows)[1], whole)
        except KdcacheError as error:
            messages.append(str(error))
        try:
            assert_same_bits(read_rows(caches, rows, SEQ_LEN, MaskConfig()), whole)
        except KdcacheError as error:
            messages.append(str(error))
    assert len(set(messages)) == len(messages) / 2
    return bool(messages)


def rewrite(path: Path, columns: dict[str, pa.Array], order: Sequence[int] | None = None) -> None:
    """A cache's shard with other columns, or its rows in another order, and digests that are right; as many bytes as before."""
    shard = next((path / "data").iterdir())
    table = pa.ipc.open_file(pa.BufferReader(shard.read_bytes())).read_all()
    if order is not None:
        table = table.take(list(order)).combine_chunks()
    names = table.schema.names[:-1]
    arrays = [columns.get(name, table.column(name).combine_chunks()) for name in names]
    arrays = [a.chunk(0) if isinstance(a, pa.ChunkedArray) else a for a in arrays]
    views = {name: column_view(array) for name, array in zip(names, arrays, strict=True)}
    digests = [sequence_digest({n: v[row] for n, v in views.items()}, names) for row in range(len(table))]
    batch = pa.RecordBatch.from_arrays([*arrays, pa.array(digests, pa.uint64())], schema=table.schema)
    num_bytes = shard.stat().st_size
    shard.chmod(0o644)
    with pa.OSFile(str(shard), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    assert shard.stat().st_size == num_bytes


def lists(values: Sequence[Sequence[object]], value_type: pa.DataType) -> pa.Array:
    return pa.array(values, pa.list_(value_type))


HALVES = [[np.float16(-1)] * 59, [np.float16(-1)] * 61]
TAILS = [[np.float16(-1)] * 11, [np.float16(-1)] * 13]
IDS, OTHER_LENGTHS = (pa.array(streams, pa.large_binary()) for streams in ([b"\xff" * 56] * 2, [b"\0" * 48, b"\0" * 64]))
HOSTILE = {
    "ids outside the vocabulary": ({"token_ids_packed": IDS}, None, "vocabulary of 97"),
    "streams of other lengths": ({"token_ids_packed": OTHER_LENGTHS}, None, "column 'token_ids_packed' holds 48"),
    "logprobs of other lengths": ({"logprobs": lists(HALVES, pa.float16())}, None, "column 'logprobs' holds 59"),
    "tails of other lengths": ({"tail_logprobs": lists(TAILS, pa.float16())}, None, "column 'tail_logprobs' holds 11"),
    "another row in its place": ({}, [1, 0], "the index says"),
    "tokens outside the vocabulary": ({"input_ids": lists([[1] * 11 + [97], [1] * 12], pa.int32())}, None, "vocabulary of 97"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_rows_with_right_digests_and_impossible_values_are_refused_as_ever(tmp_path: Path, name: str) -> None:
    columns, order, sentence = HOSTILE[name]
    records = [make_record(i, num_tokens=12, supervised="every") for i in range(2)]
    path = Path(write(tmp_path / "c", records, CODECS[0], TOP_K, 10**6))
    rewrite(path, {}, None)
    rows, caches = [np.arange(2)], CacheSet(path)
    assert read_mapped(caches, rows, layout_of(caches, rows), None) is not None
    caches.close()
    rewrite(path, columns, order)
    caches = CacheSet(path)
    assert read_mapped(caches, rows, layout_of(caches, rows), None) is None
    with pytest.raises(CorruptCacheError, match=sentence):
        read_rows(caches, rows, SEQ_LEN, MaskConfig())
