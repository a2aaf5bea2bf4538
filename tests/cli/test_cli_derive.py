"""`kdcache derive` from the command line: what it prints, what `info` says of it, and one sentence for each mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cache_making import make_cache, make_unit

from kdcache.cli.main import main
from kdcache.store.reader import open_reader


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return make_cache(tmp_path / "a", "quantized")


def test_a_derivation_says_what_it_wrote_and_info_where_it_came_from(cache, tmp_path, capsys):
    arguments = ["--where", "num_tokens > 5", "--reduce", "top_k=2", "--codec", "packed"]
    status, out, _ = run(capsys, "derive", cache, "--out", tmp_path / "b", *arguments)
    assert status == 0
    assert "6 sequences" in out
    assert "where (condition=num_tokens > 5), reduce (top_k=2) of a (" in out
    assert "3 by a condition" in out
    assert "logprobs are as codec 'quantized' rounded them in the source" in out
    assert run(capsys, "verify", tmp_path / "b")[0] == 0
    assert "derived    where (condition=num_tokens > 5), reduce" in run(capsys, "info", tmp_path / "b")[1]
    assert '"lineage": {' in run(capsys, "info", tmp_path / "b", "--json")[1]
    assert "derived" not in run(capsys, "info", cache)[1]


def test_sequences_are_chosen_by_number_range_and_file_of_keys(cache, tmp_path, capsys):
    with open_reader(cache) as reader:
        keys = [reader[number].sequence.key for number in (8, 2)]
    (tmp_path / "keys.txt").write_text("".join(f"{key.hex()}\n" for key in keys))
    arguments = ["--select", "0", "--select", "3:5", "--select", f"@{tmp_path / 'keys.txt'}"]
    assert run(capsys, "derive", cache, "--out", tmp_path / "b", *arguments)[0] == 0
    with open_reader(cache) as before, open_reader(tmp_path / "b") as after:
        found = [after[number].sequence.key for number in range(len(after))]
        assert found == [before[number].sequence.key for number in (0, 2, 3, 4, 8)]


def test_two_caches_are_mixed_and_joined(cache, tmp_path, capsys):
    other = make_cache(tmp_path / "b", "quantized", units=[make_unit(u) for u in range(3)])
    status, out, _ = run(capsys, "derive", cache, other, "--out", tmp_path / "m", "--mix", "0.5,0.5")
    assert status == 0
    assert "mix (weights=[0.5, 0.5]" in out
    assert "of a mixture cannot be computed from its parts" in out
    status, out, _ = run(capsys, "derive", cache, other, "--out", tmp_path / "ab", "--unit-sequences", "5")
    assert (status, "18 sequences" in out, "4 shards" in out) == (0, True, True)


def test_a_condition_that_nothing_meets_leaves_an_empty_cache_and_says_so(cache, tmp_path, capsys):
    status, out, _ = run(capsys, "derive", cache, "--out", tmp_path / "b", "--where", "source ~ 'books/*'")
    assert (status, "no sequence meets the condition: the cache is empty" in out) == (0, True)
    assert run(capsys, "verify", tmp_path / "b")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--mix", "0.5;0.5"], "--mix '0.5;0.5': expected numbers separated by commas"),
        (["--mix", "0.5,0.5"], "mix: 1 cache was given, expected two or more"),
        (["--select", "x"], "--select 'x': expected an index, a range"),
        (["--select", "5:99"], "select: 5:99 is not among the 9 sequences"),
        (["--select", "@nowhere"], "--select @nowhere: cannot be read"),
        (["--fraction", "2"], "fraction: 2.0 is given, expected one above 0"),
        (["--where", "num_tokens >"], "where: 'num_tokens >' is not understood at the end: expected a number"),
        (["--where", "max(entropy) > 1"], "where: the entropy is not stored in this cache"),
        (["--where-position", "num_tokens > 1"], "where_position: 'num_tokens > 1' is not understood"),
        (["--reduce", "top_k=many"], "--reduce 'top_k=many': expected NAME=VALUE"),
        (["--reduce", "k=3"], "--reduce 'k=3': expected NAME=VALUE"),
        (["--reduce", "top_k=5"], "reduce: top_k is 5, but the cache's is 5 already"),
        (["--reduce", "tau=0.1"], "reduce: tau is not possible for selection 'top_k'"),
        (["--codec", "zip"], "codec: codec 'zip' is unknown here"),
        (["--codec", "archive", "--bits", "9"], "codec: codec 'archive' does not take the parameters"),
    ],
)
def test_a_mistake_is_one_sentence_and_status_2(cache, tmp_path, capsys, arguments, sentence):
    status, out, err = run(capsys, "derive", cache, "--out", tmp_path / "b", *arguments)
    assert (status, out) == (2, "")
    assert err.startswith(f"kdcache: error: {sentence}")
    assert err.count("\n") == 1
    assert not (tmp_path / "b").exists()


def test_a_domain_that_the_input_names_is_kept_and_asked_for(tmp_path, capsys):
    rows = [{"text": f"text {n} " * 20, "kind": kind} for n, kind in enumerate(["wiki", "code", "wiki", None])]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "c.yaml").write_text(f"""
input: {{format: jsonl, paths: [{tmp_path}/a.jsonl], domain_field: kind, window: {{size: 64}}}}
teacher: {{model: fake, backend: fake, fake: {{vocab_size: 300}}}}
selection: {{k: 8}}
out: {tmp_path}/named
shards: {{unit_items: 2}}
""")
    plain = ["--set", "input.domain_field=null", "--set", f"out={tmp_path}/plain"]
    assert run(capsys, "capture", tmp_path / "c.yaml")[0] == run(capsys, "capture", tmp_path / "c.yaml", *plain)[0] == 0
    sources = [tmp_path / "named", tmp_path / "plain"]
    assert run(capsys, "derive", *sources, "--out", tmp_path / "wiki", "--where", "domain == 'wiki'")[0] == 0
    assert run(capsys, "verify", tmp_path / "wiki")[0] == 0
    with open_reader(tmp_path / "wiki") as reader:
        found = [reader[number].sequence for number in range(len(reader))]
    assert [sequence.domain for sequence in found] == ["wiki"] * 6, "windows of the first and third text"
    assert {sequence.source.split("#")[0] for sequence in found} == {f"{tmp_path}/a.jsonl:1", f"{tmp_path}/a.jsonl:3"}
    assert "domains" in run(capsys, "capture", tmp_path / "c.yaml", "--set", "input.domain_field=null")[2]
