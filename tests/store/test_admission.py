"""What a writer refuses before it writes: records that no reader could read, directories that are not its cache."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from cache_making import (
    assert_same_record,
    make_cache,
    make_distributions,
    make_identity,
    make_manifest,
    make_record,
)
from writer_cases import changed, files, start

from kdcache.errors import FormatError, MismatchError, UnsupportedVersionError
from kdcache.format.manifest import FORMAT_VERSION, PlanInfo, SelectionInfo, manifest_to_json
from kdcache.format.record import Distributions, SequenceRecord, TokenSequence
from kdcache.store.files import fs
from kdcache.store.reader import open_reader
from kdcache.store.writing.writer import CacheWriter

UNFIT = {
    "an id beyond the vocabulary": (lambda s, d: (changed(s, input_ids_N=s.input_ids_N + 90), d), "vocabulary of 97"),
    "an entry beyond the vocabulary": (lambda s, d: (s, changed(d, token_ids_E=d.token_ids_E + 97)), "vocabulary of 97"),
    "distributions of another mask": (lambda s, d: (changed(s, supervised_N=~s.supervised_N), d), "11 of 1 supervised"),
    "no tokens": (lambda s, d: (changed(s, input_ids_N=s.input_ids_N[:0]), d), "0 tokens"),
    "flags of another length": (lambda s, d: (changed(s, supervised_N=s.supervised_N[1:]), d), "12 tokens with 11 flags"),
    "a turn behind the end": (lambda s, d: (changed(s, turn_starts=np.array([0, 12], np.int32)), d), "turn"),
    "an unknown role": (lambda s, d: (changed(s, roles_N=s.roles_N + np.uint8(9)), d), "role"),
    "an outside target too many": (
        lambda s, d: (s, changed(d, outside_target_logprobs=np.append(d.outside_target_logprobs, np.float32(-1)))),
        "targets are none",
    ),
    "logprobs of another length": (lambda s, d: (s, changed(d, logprobs_E=d.logprobs_E[1:])), "55 ids, 54 logprobs"),
    "offsets that end early": (lambda s, d: (s, changed(d, offsets_P1=np.minimum(d.offsets_P1, 54))), "54 entries .* 55"),
    "offsets that fall": (lambda s, d: (s, changed(d, offsets_P1=d.offsets_P1[::-1])), "offsets"),
    "tails of another length": (lambda s, d: (s, changed(d, tail_mass_P=d.tail_mass_P[1:])), "10 tails"),
    "a NaN tail": (lambda s, d: (s, changed(d, tail_mass_P=d.tail_mass_P * np.float32(np.nan))), "NaN"),
    "a NaN logprob": (lambda s, d: (s, changed(d, logprobs_E=d.logprobs_E * np.float32(np.nan))), "NaN"),
    "a NaN target": (lambda s, d: (s, changed(d, outside_target_logprobs=d.outside_target_logprobs * np.nan)), "NaN"),
}


@pytest.mark.parametrize("name", UNFIT)
@pytest.mark.parametrize("codec_id", ["raw", "packed"])
def test_a_record_that_no_reader_could_read_is_refused_with_its_source(tmp_path, codec_id, name):
    spoil, sentence = UNFIT[name]
    record = make_record(1)
    unfit = SequenceRecord(*spoil(record.sequence, record.distributions))
    one = start(tmp_path, codec_id=codec_id)
    before = files(tmp_path)
    with pytest.raises(FormatError, match=f"made#1: .*{sentence}"):
        one.write_unit(0, [make_record(0), unfit])
    assert files(tmp_path) == before


def wide_record(num_entries: int) -> SequenceRecord:
    """One token, one position, that many entries, in memory of one of them."""
    sequence = make_record(1, num_tokens=1, supervised="every").sequence
    distributions = Distributions(
        token_ids_E=np.broadcast_to(np.int32(0), num_entries),
        logprobs_E=np.broadcast_to(np.float32(-1), num_entries),
        offsets_P1=np.array([0, num_entries]),
        tail_mass_P=np.zeros(1, np.float32),
        outside_target_logprobs=np.zeros(0, np.float32),
    )
    return SequenceRecord(sequence, distributions)


@pytest.mark.parametrize(
    ("kind", "num_entries", "sentence"),
    [
        ("top_k", 6, "6 entries, but the selection keeps 5"),
        ("top_p_k", 65536, "at most 65535"),
        ("top_p_k", 2**31, "at most 1073741824"),
    ],
)
def test_more_entries_than_the_format_counts_are_refused(tmp_path, kind, num_entries, sentence):
    identity = msgspec.structs.replace(
        make_identity(), selection=SelectionInfo(kind=kind, params={"k": 5} if kind == "top_k" else {"k": 5, "p": 0.9})
    )
    one = CacheWriter.open(tmp_path, make_manifest(1, identity))
    with pytest.raises(FormatError, match=sentence):
        one.write_unit(0, [wide_record(num_entries)])


def test_a_whole_vocabulary_of_more_than_65535_entries_is_stored_where_the_selection_fixes_it(tmp_path):
    vocab_size = 70_000
    sequence = TokenSequence(
        np.array([5, 69_999], np.int32),
        np.array([True, False]),
        np.zeros(2, np.uint8),
        np.zeros(1, np.int32),
        "wide",
        bytes(16),
    )
    distributions = make_distributions(1, sequence, np.array([vocab_size]), vocab_size=vocab_size)
    record = SequenceRecord(sequence, distributions)
    make_cache(tmp_path, "packed", units=[[record]], vocab_size=vocab_size, k=vocab_size)
    with open_reader(tmp_path) as reader:
        assert_same_record(reader[0], record, is_exact=False)


def test_another_capture_is_refused_with_both_sides(tmp_path):
    start(tmp_path)
    other = make_identity("packed", model="else")
    with pytest.raises(MismatchError) as caught:
        CacheWriter.open(tmp_path, make_manifest(3, other))
    sentence = str(caught.value)
    for part in (
        str(tmp_path),
        "teacher.model: 'made-up' != 'else'",
        "codec.codec_id: 'raw' != 'packed'",
        "another destination (`out`)",
    ):
        assert part in sentence


def test_another_plan_is_refused_with_both_sides(tmp_path):
    start(tmp_path)
    manifest = msgspec.structs.replace(make_manifest(3), plan=PlanInfo(fingerprint="q" * 64, num_units=4))
    with pytest.raises(MismatchError, match="plan: 3 units pppppppppppp != 4 units qqqqqqqqqqqq"):
        CacheWriter.open(tmp_path, manifest)


def test_other_versions_and_another_tokenizer_name_are_no_mismatch(tmp_path):
    start(tmp_path)
    manifest = make_manifest(3)
    tokenizer = msgspec.structs.replace(manifest.identity.tokenizer, name="elsewhere")
    identity = msgspec.structs.replace(manifest.identity, tokenizer=tokenizer)
    CacheWriter.open(
        tmp_path, msgspec.structs.replace(manifest, identity=identity, versions={"kdcache": "99"}, config={"a": 1})
    )


@pytest.mark.parametrize(
    "name", ["thesis.txt", "data/photo.jpg", "index/000001.csv", "tmp/notes.txt", "journal/x/y", "manifests/m.json"]
)
def test_a_directory_of_others_is_refused_and_not_touched(tmp_path, name):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("years of work")
    with pytest.raises(MismatchError, match=r"not a cache and not empty \(it holds '"):
        start(tmp_path)
    assert files(tmp_path) == [name]


def test_a_file_in_place_of_the_directory_is_refused(tmp_path):
    (tmp_path / "c").write_text("")
    with pytest.raises(MismatchError, match="is a file"):
        start(tmp_path / "c")


def test_an_empty_directory_and_what_a_killed_start_left_are_taken(tmp_path):
    (tmp_path / "empty").mkdir()
    start(tmp_path / "empty")
    fs.make_directories(tmp_path / "killed")
    fs.temp_path(tmp_path / "killed").write_text("half a manifest")
    start(tmp_path / "killed")


def test_a_cache_of_a_newer_minor_version_is_not_gone_on_with(tmp_path):
    start(tmp_path)
    newer = msgspec.structs.replace(make_manifest(3), format_version=(FORMAT_VERSION[0], FORMAT_VERSION[1] + 1))
    (tmp_path / "manifests/000000.json").write_bytes(manifest_to_json(newer))
    with pytest.raises(
        UnsupportedVersionError,
        match=rf"has format version 1\.{FORMAT_VERSION[1] + 1}, this kdcache writes 1\.{FORMAT_VERSION[1]}",
    ):
        start(tmp_path)
    with open_reader(tmp_path) as reader:
        assert len(reader) == 0


KEPT = {
    "estimates where all are exact": (
        {"kind": "top_k", "params": {"k": 5}}, {"num_exact_P": np.full(11, 1)}, "estimates are marked by num_exact",
    ),
    "no estimates where some are": ({"kind": "sampled", "params": {"num_draws": 5, "seed": 0}}, {}, "marked by num_exact"),
    "more exact entries than the selection has": (
        {"kind": "sampled", "params": {"num_draws": 5, "seed": 0}}, {"num_exact_P": np.full(11, 1)}, "makes 0 entries .* exact",
    ),
    "no log_z": ({"kind": "top_k", "params": {"k": 5}, "temperatures": (2.0,)}, {}, "log_z at 0 temperatures, but .* keeps 1"),
    "an entropy too many": (
        {"kind": "top_k", "params": {"k": 5}}, {"entropy_P": np.ones(11, np.float32)}, "the record has an entropy",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", KEPT)
def test_a_record_of_another_selection_than_the_caches_is_refused(tmp_path, name):
    selection, change, sentence = KEPT[name]
    record = make_record(1)
    identity = msgspec.structs.replace(make_identity("raw"), selection=SelectionInfo(**selection))
    with pytest.raises(FormatError, match=f"made#1: .*{sentence}"):
        CacheWriter.open(tmp_path, make_manifest(1, identity)).write_unit(
            0, [SequenceRecord(record.sequence, changed(record.distributions, **change))]
        )


def test_a_mass_that_is_not_one_is_refused_of_a_teacher_and_kept_of_a_cache(tmp_path):
    record = make_record(1)
    short = SequenceRecord(record.sequence, changed(record.distributions, tail_mass_P=record.distributions.tail_mass_P / 2))
    one = start(tmp_path)
    with pytest.raises(FormatError, match=r"made#1: supervised position \d+: exact entries of .* do not sum to 1"):
        one.write_unit(0, [short], sums_to_one=True)
    assert one.write_unit(0, [short]).num_sequences == 1
