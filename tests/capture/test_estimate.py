"""A dry run says what a capture will come to, near enough, and writes nothing."""

import pytest

from kdcache.capture.estimate import estimate_capture
from kdcache.capture.executors.run import run_capture
from kdcache.config.capture import CaptureConfig
from kdcache.config.load import convert_config


def make_config(tmp_path, **sections):
    fields = {
        "input": {"format": "lines", "paths": [str(tmp_path / "a.txt")], "window": {"size": 64}},
        "teacher": {"model": "fake", "backend": "fake"},
        "selection": {"k": 16},
        "codec": {"id": "packed"},
        "out": str(tmp_path / "cache"),
        "shards": {"unit_items": 40},
    }
    for name, section in sections.items():
        fields[name] = fields[name] | section if isinstance(section, dict) else section
    return convert_config(fields, CaptureConfig)


@pytest.fixture
def text(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"line {n} says {'la ' * (n % 50)}\n" for n in range(400)))


@pytest.mark.parametrize("codec", ["packed", "raw"])
@pytest.mark.parametrize("window", [{"size": 64}, {"size": 64, "overlap": 8}, {"size": 64, "policy": "truncate"}])
def test_the_estimate_is_near_what_the_capture_comes_to(tmp_path, text, codec, window):
    config = make_config(tmp_path, codec={"id": codec}, input={"window": window})
    estimate = estimate_capture(config)
    assert not (tmp_path / "cache").exists()
    assert estimate.tokens_per_second is None
    assert estimate.seconds_left is None
    manifest = run_capture(config).manifest
    assert estimate.plan.num_items == 400
    assert estimate.num_tokens == pytest.approx(manifest.total("num_tokens"), rel=0.2)
    assert estimate.num_positions == pytest.approx(manifest.total("num_positions"), rel=0.2)
    assert estimate.num_bytes == pytest.approx(manifest.total("num_bytes"), rel=0.3)


def test_an_earlier_runs_shards_give_a_speed(tmp_path, text):
    config = make_config(tmp_path)
    run_capture(config)
    estimate = estimate_capture(config)
    assert estimate.num_units_before == len(estimate.plan.units) == 10
    assert estimate.tokens_per_second is not None
    assert estimate.seconds_left == 0


def test_a_probe_measures_the_teacher(tmp_path, text):
    estimate = estimate_capture(make_config(tmp_path), probe=True)
    assert estimate.tokens_per_second is not None
    assert estimate.tokens_per_second > 0
    assert estimate.seconds_left == pytest.approx(estimate.num_tokens / estimate.tokens_per_second)


def test_long_texts_are_clipped_in_the_sample_and_not_in_the_estimate(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 100_000 + "\n" + "y" * 50)
    estimate = estimate_capture(make_config(tmp_path))
    assert estimate.num_tokens == pytest.approx(100_052, rel=0.01)


@pytest.mark.parametrize("kind", ["top_p_k", "sampled", "threshold", "top_k_sampled"])
def test_where_entries_follow_from_the_teacher_the_estimate_is_a_bound_and_a_probe_measures(tmp_path, kind):
    (tmp_path / "a.txt").write_text("".join(f"line {n} says {'la ' * (n % 20)}\n" for n in range(40)))
    selection = {"kind": kind, "k": 16 if kind.startswith("top") else None, "temperatures": [2.0], "entropy": True}
    config = make_config(tmp_path, selection=selection, teacher={"fake": {"vocab_size": 300}})
    bound, probed = estimate_capture(config), estimate_capture(config, probe=True)
    assert (bound.bytes_are, probed.bytes_are) == ("most", "measured")
    manifest = run_capture(config).manifest
    assert bound.num_bytes > manifest.total("num_bytes")
    assert probed.num_bytes == pytest.approx(manifest.total("num_bytes"), rel=0.3)
    columns = {"key", "source", "input_ids", "supervised", "roles", "turn_starts", "digest"}
    own = sum(b for shard in manifest.shards for name, b in shard.column_bytes.items() if name not in columns)
    assert bound.bytes_per_position > own / manifest.total("num_positions")
    assert probed.bytes_per_position == pytest.approx(own / manifest.total("num_positions"), rel=0.15)


def test_where_every_position_has_k_entries_the_bytes_are_known_beforehand(tmp_path, text):
    assert estimate_capture(make_config(tmp_path)).bytes_are == "expected"
