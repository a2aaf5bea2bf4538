"""A capture ends in a cache whose content depends on the config alone, however often it was stopped on the way."""

import msgspec
import numpy as np
import pytest

import kdcache
from kdcache.capture.executors.run import run_capture
from kdcache.capture.watch.progress import CaptureProgress
from kdcache.config.capture import CaptureConfig
from kdcache.config.load import convert_config
from kdcache.errors import ConfigError, InputError, MismatchError

TEXT = "".join(f"line {n} says {'la' * (n % 7)}\n" for n in range(20))


@pytest.fixture
def config(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    return make_config(tmp_path)


def make_config(tmp_path, **sections):
    fields = {
        "input": {"format": "lines", "paths": [str(tmp_path / "a.txt")], "window": {"size": 16, "overlap": 2}},
        "teacher": {"model": "fake", "backend": "fake", "fake": SIZE},
        "selection": {"k": 4},
        "codec": {"id": "raw"},
        "out": str(tmp_path / "cache"),
        "shards": {"unit_items": 4},
    }
    for name, section in sections.items():
        fields[name] = fields[name] | section if isinstance(section, dict) else section
    return convert_config(fields, CaptureConfig)


SIZE = {"vocab_size": 300, "context_length": 64}


class StopAfter(CaptureProgress):
    """Stops the capture after so many sequences, as Ctrl-C would."""

    def __init__(self, num_sequences):
        self.left = num_sequences

    def advance(self, num_tokens):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


class Loads(CaptureProgress):
    """Notes whether the teacher was loaded."""

    loaded = False

    def loading(self, model):
        self.loaded = True


class Started(CaptureProgress):
    """Notes which units were captured."""

    def start(self, units):
        self.units = [unit.index for unit in units]


def content(path):
    with kdcache.open(path) as reader:
        records = [reader[n] for n in range(len(reader))]
    return [
        (r.sequence.source, r.sequence.key, r.distributions.token_ids_E.tolist(), r.distributions.logprobs_E.tolist())
        for r in records
    ]


def test_a_capture_holds_each_position_of_each_item_once(config):
    summary = run_capture(config)
    assert summary.manifest.is_complete
    assert summary.num_units_captured == 5
    assert summary.manifest.total("num_positions") == len(TEXT.splitlines()) + sum(map(len, TEXT.splitlines()))
    assert summary.num_tokens == summary.manifest.total("num_tokens")
    assert summary.manifest.config["notes"] == {"num_items": 20, "num_empty_items": 0, "num_chars": len(TEXT) - 20}
    assert summary.manifest.config["input"]["window"] == {"size": 16, "policy": "split", "overlap": 2}


def test_a_capture_that_is_complete_says_so_without_loading_the_teacher(config):
    run_capture(config)
    progress = Loads()
    summary = run_capture(config, progress)
    assert summary.num_units_captured == 0
    assert summary.manifest.is_complete
    assert not progress.loaded


def test_settings_of_the_teacher_that_do_not_matter_load_it_and_change_nothing(config):
    before = run_capture(config).manifest
    other = msgspec.structs.replace(config, teacher=msgspec.structs.replace(config.teacher, tokens_per_forward=64))
    progress = Loads()
    summary = run_capture(other, progress)
    assert progress.loaded
    assert summary.num_units_captured == 0
    assert summary.manifest == before


def test_published_units_are_not_captured_again(config):
    with pytest.raises(KeyboardInterrupt):
        run_capture(config, StopAfter(12))
    progress = Started()
    summary = run_capture(config, progress)
    assert 0 < summary.num_units_before < 5
    assert progress.units == list(range(summary.num_units_before, 5))
    assert summary.num_tokens < summary.manifest.total("num_tokens")


@pytest.mark.parametrize("stops", [[1], [9], [9, 5], [30]])
def test_a_stopped_capture_goes_on_and_ends_with_the_same_content(tmp_path, config, stops):
    run_capture(make_config(tmp_path, out=str(tmp_path / "undisturbed")))
    for stop in stops:
        with pytest.raises(KeyboardInterrupt, match=r"of 5 units are published in .*; run the same command again to resume"):
            run_capture(config, StopAfter(stop))
    summary = run_capture(config)
    assert summary.manifest.is_complete
    assert content(tmp_path / "cache") == content(tmp_path / "undisturbed")


def test_what_was_published_before_a_stop_can_be_read(tmp_path, config):
    with pytest.raises(KeyboardInterrupt):
        run_capture(config, StopAfter(12))
    with kdcache.open(tmp_path / "cache") as reader:
        assert len(reader.manifest.shards) >= 1
        assert not reader.manifest.is_complete
        assert reader[0].sequence.source.endswith("a.txt:1")


def test_the_records_are_the_teachers_own(tmp_path, config):
    from kdcache.teacher import load_teacher

    run_capture(config)
    teacher = load_teacher(config.teacher)
    with kdcache.open(tmp_path / "cache") as reader:
        record = reader[5]
        dense_NV = teacher.dense_logprobs(record.sequence)
    token_ids_PK, logprobs_PK = record.distributions.padded()
    expected_PK = np.take_along_axis(dense_NV[record.sequence.positions_P], token_ids_PK, axis=1)
    np.testing.assert_allclose(logprobs_PK, expected_PK, atol=1e-6)


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        ({"selection": {"k": 5}}, "selection.params.k: 4 != 5"),
        ({"codec": {"id": "packed"}}, "codec.codec_id: 'raw' != 'packed'"),
        ({"input": {"limit": 7}}, "input_fingerprint"),
        ({"input": {"add_special_tokens": False}}, "input_fingerprint"),
        ({"shards": {"unit_items": 3}}, "plan: 5 units"),
        ({"teacher": {"fake": SIZE | {"seed": 1}}}, "teacher.engine_options.seed: 0 != 1"),
        ({"teacher": {"fake": SIZE | {"vocab_size": 400}}}, "teacher.vocab_size: 300 != 400"),
    ],
)
def test_a_directory_that_holds_another_capture_is_refused_with_both_sides(tmp_path, config, sections, sentence):
    before = run_capture(config).manifest
    other = make_config(tmp_path, **sections)
    with pytest.raises(MismatchError) as caught:
        run_capture(other)
    assert "holds another capture" in str(caught.value)
    assert sentence in str(caught.value)
    assert run_capture(config).manifest == before


def test_a_directory_that_is_no_cache_is_refused_before_anything_is_read(tmp_path, config):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "thesis.doc").write_text("mine")
    progress = Loads()
    with pytest.raises(MismatchError, match=r"not a cache and not empty \(it holds 'thesis.doc'\)"):
        run_capture(config, progress)
    assert not progress.loaded
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["thesis.doc"]


def test_a_window_longer_than_the_context_is_refused_before_anything_is_written(tmp_path, config):
    long = make_config(tmp_path, input={"window": {"size": 65}})
    with pytest.raises(ConfigError, match=r"input\.window\.size is 65, but the teacher 'fake' reads at most 64 tokens"):
        run_capture(long)
    assert not (tmp_path / "cache").exists()


def test_more_entries_than_the_vocabulary_are_refused(tmp_path, config):
    with pytest.raises(ConfigError, match=r"selection\.k is 301, but must be from 1 to .* 300"):
        run_capture(make_config(tmp_path, selection={"k": 301}))


def test_a_chat_template_that_cannot_be_read_is_named(tmp_path, config):
    with pytest.raises(ConfigError, match=r"input\.chat_template: .*nowhere\.jinja' cannot be read"):
        run_capture(make_config(tmp_path, input={"chat_template": str(tmp_path / "nowhere.jinja")}))


def test_a_mistake_in_the_input_stops_the_capture_before_it_starts(tmp_path, config):
    (tmp_path / "a.txt").write_bytes(b"fine\n" * 10 + b"\xff\n")
    with pytest.raises(InputError, match=r"a\.txt:11: not UTF-8"):
        run_capture(config)
    assert not (tmp_path / "cache").exists()


def test_a_mistake_that_only_the_tokenizer_sees_keeps_what_is_published(tmp_path):
    (tmp_path / "a.txt").write_text("short\n" * 8 + "much longer than all the others\n")
    config = make_config(tmp_path, input={"window": {"size": 16, "policy": "error"}})
    with pytest.raises(InputError, match=r"a\.txt:9: 32 tokens, but input\.window\.size is 16"):
        run_capture(config)
    with kdcache.open(tmp_path / "cache") as reader:
        assert len(reader) == 8
