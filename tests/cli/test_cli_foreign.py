"""`kdcache doctor`, `convert` and `verify --deep` from the command line, with a real small teacher."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from foreign_cases import items, write_columns, write_truth

from kdcache.cli.main import main

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """A foreign cache of the tiny model's own text, and a cache of ours of the same text."""
    folder = tmp_path_factory.mktemp("cli")
    truth = write_truth(tiny_model_dir)
    write_columns(folder / "rows.parquet", items(truth))
    late = items(truth)
    for item in late:
        item.ids, item.values = (np.roll(rows, 1, axis=0).tolist() for rows in (item.ids, item.values))
    write_columns(folder / "late.parquet", late)
    (folder / "ids.jsonl").write_text("".join(json.dumps({"input_ids": ids}) + "\n" for ids in truth.ids_SN.tolist()))
    (folder / "c.yaml").write_text(
        f"""
input: {{format: jsonl, content: ids, paths: ['{folder}/ids.jsonl'], window: {{size: 64}}}}
teacher: {{model: '{tiny_model_dir}', backend: transformers, dtype: float32}}
selection: {{k: 16}}
out: '{folder}/ours'
"""
    )
    assert main(["capture", str(folder / "c.yaml")]) == 0
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_verify_deep_prints_a_table_and_json_and_tells_a_wrong_teacher(
    folder: Path, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    deep = ("--deep", "--teacher-config", folder / "c.yaml")
    status, out, _ = run(capsys, "verify", folder / "ours", *deep, "--num-sequences", "4")
    assert status == 0
    assert "agrees: asked again about 4 sequences, 256 positions" in out
    for line in ("KL(live || cached)", "KL(live || live)", "positions shifted", "NLL", "kept mass"):
        assert line in out
    status, out, _ = run(capsys, "verify", folder / "ours", *deep, "--json", "--seed", "3")
    report = json.loads(out)
    assert (status, report["sound"], report["deep"]["sound"]) == (0, True, True)
    assert report["deep"]["shift_kl"][1] < 1e-4 < min(report["deep"]["shift_kl"][::2])
    status, _, err = run(capsys, "verify", folder / "ours", *deep, "--tolerance", "0")
    assert status == 1
    assert "wrong: KL(live || cached) is" in err

    from tiny_model import build_tiny_model

    other = build_tiny_model(tmp_path / "other", seed=1)
    status, out, err = run(capsys, "verify", folder / "ours", "--deep", "--teacher", other, "--backend", "transformers")
    assert (status, out) == (2, "")
    assert "the teacher 'other' is not the one that was captured, 'tiny-llama': weights_digest" in err


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--teacher", "x"], "--teacher needs --deep"),
        (["--tolerance", "1"], "--tolerance needs --deep"),
        (["--deep"], "name the teacher to ask with --teacher MODEL or --teacher-config CONFIG.yaml"),
        (["--deep", "--teacher-config", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["--deep", "--tolerance", "-1"], "--tolerance is -1.0, expected nats, 0 or more"),
    ],
)
def test_flags_of_verify_that_make_no_sense(folder: Path, capsys: pytest.CaptureFixture[str], flags: list[str], sentence: str):
    status, out, err = run(capsys, "verify", folder / "ours", *flags)
    assert (status, out) == (2, "")
    assert sentence in err


def test_doctor_says_what_a_cache_is_and_what_is_wrong(folder: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]):
    status, out, _ = run(capsys, "doctor", folder / "rows.parquet")
    assert status == 0
    assert "plain columns (parquet): nothing wrong" in out
    status, out, _ = run(capsys, "doctor", folder / "late.parquet")
    assert status == 1
    assert "wrong: shifted_positions: positions are shifted by -1" in out
    assert "[kdcache convert --shift -1]" in out
    status, out, _ = run(
        capsys, "doctor", folder / "rows.parquet", "--teacher", tiny_model_dir, "--backend", "transformers", "--json"
    )
    found = json.loads(out)
    assert (status, found["sound"]) == (0, True)
    assert "teacher_agrees" in [finding["name"] for finding in found["findings"]]
    assert found["comparison"]["kl"][1] < 1e-9
    status, out, _ = run(capsys, "doctor", folder / "ours")
    assert status == 0
    assert "cache of kdcache: nothing wrong" in out


def test_convert_writes_what_verifies_and_refuses_what_is_shifted(
    folder: Path, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    known = ["--tokenizer", tiny_model_dir, "--vocab-size", "520"]
    status, out, _ = run(capsys, "convert", folder / "rows.parquet", "--out", tmp_path / "made", *known, "--model", "tiny")
    assert status == 0
    assert "8 sequences, 504 positions" in out
    assert "have no logprob in the source" in out
    assert run(capsys, "verify", tmp_path / "made")[0] == 0
    status, out, _ = run(capsys, "info", tmp_path / "made")
    assert "tiny" in out
    status, out, err = run(capsys, "convert", folder / "late.parquet", "--out", tmp_path / "no", *known)
    assert (status, out) == (2, "")
    assert "shifted_positions" in err
    assert "(repaired by --shift -1)" in err
    assert not (tmp_path / "no").exists()
    assert run(capsys, "convert", folder / "late.parquet", "--out", tmp_path / "moved", *known, "--shift", "-1")[0] == 0
    status, out, _ = run(
        capsys,
        "verify",
        tmp_path / "moved",
        "--deep",
        "--teacher",
        tiny_model_dir,
        "--backend",
        "transformers",
        "--tolerance",
        "0.1",
    )
    assert status == 0


def test_mistakes_are_one_sentence(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for arguments, sentence in (
        (["convert", folder / "rows.parquet", "--out", tmp_path / "no"], "--tokenizer NAME is needed"),
        (["doctor", folder / "rows.parquet", "--column", "ids"], "--column 'ids': expected OURS=NAME"),
        (["doctor", tmp_path / "nothing"], "no such file or folder"),
        (["convert", folder / "ours", "--out", tmp_path / "no", "--tokenizer", "fake"], "is a cache of kdcache already"),
    ):
        status, out, err = run(capsys, *arguments)
        assert (status, out) == (2, "")
        assert sentence in err
        assert "Traceback" not in err


def test_what_the_nll_leaves_out_and_whether_rows_were_placed_is_said(
    folder: Path, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    status, out, _ = run(capsys, "doctor", folder / "rows.parquet", "--vocab-size", "520")
    assert status == 0
    assert "placement" in out
    assert "proven from the text" in out
    said = ["--tokenizer", tiny_model_dir, "--vocab-size", "520"]
    assert run(capsys, "convert", folder / "rows.parquet", "--out", tmp_path / "text", *said)[0] == 0
    asking = ["--teacher", tiny_model_dir, "--backend", "transformers"]
    assert run(capsys, "convert", folder / "rows.parquet", "--out", tmp_path / "asked", *said, *asking)[0] == 0
    for name, how in (("text", "from the text: "), ("asked", "by the teacher, asked about 8 sequences")):
        status, verified, _ = run(capsys, "verify", tmp_path / name)
        assert (status, f"{name}: sound (complete)" in verified) == (0, True)
        for shown in (verified, run(capsys, "info", tmp_path / name)[1]):
            assert f"alignment  proven at conversion {how}" in " ".join(shown.split("  ")).replace("alignment ", "alignment  ")
            assert "of 504 targets are outside their support and have no logprob: they are left out" in shown
            assert "the text under the teacher" not in shown
    report = json.loads(run(capsys, "verify", tmp_path / "text", "--json")[1])
    assert report["num_targets"] == 504
    assert report["num_impossible_targets"] > 50
    assert report["alignment"]["proven_by"] == "text"
    _, out, _ = run(capsys, "info", folder / "ours")
    assert "nats per target, the text under the teacher" in out
    assert "alignment" not in out


def test_a_conversion_on_trust_is_not_called_sound(
    folder: Path, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    from foreign_cases import few_rows

    path = write_columns(tmp_path / "few.parquet", few_rows(write_truth(tiny_model_dir)))
    said = ["--tokenizer", tiny_model_dir, "--vocab-size", "520", "--accept", "alignment_unclear"]
    assert run(capsys, "convert", path, "--out", tmp_path / "cache", *said)[0] == 0
    status, out, _ = run(capsys, "verify", tmp_path / "cache")
    assert (status, "its bytes are sound, its alignment was not proven (complete)" in out) == (0, True)
    assert "NOT proven: there are too few positions" in out
    assert "`kdcache verify --deep --teacher MODEL` tells" in out
    asked = ["--deep", "--teacher", tiny_model_dir, "--backend", "transformers"]
    assert "teacher" in run(capsys, "verify", tmp_path / "cache", *asked)[1]
