"""What the original tools wrote is read as they read it, and the doctor says of it what is so. See data/README.md."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from foreign_cases import Truth, items, log_softmax, write_distillkit

from kdcache.errors import InputError
from kdcache.foreign.base import ForeignSequence, ReadConfig
from kdcache.foreign.formats.detect import open_foreign
from kdcache.foreign.formats.distillkit_codec import Config, fit_quality
from kdcache.foreign.judge.doctor import Examination, ExamineConfig, examine

DATA = Path(__file__).parent / "data"
DISTILLKIT = ["recommended", "budget", "published", "residuals", "exact", "legacy"]


def sequences(path: Path) -> list[ForeignSequence]:
    return list(open_foreign(path, ReadConfig()).read())


def look(path: Path) -> Examination:
    return examine(path, ExamineConfig())


def wrong(examination: Examination) -> set[str]:
    return {finding.name for finding in examination.findings if finding.severity != "note"}


def row(sequence: ForeignSequence, number: int) -> tuple[list[int], np.ndarray]:
    start, end = sequence.offsets_P1[number : number + 2]
    return sequence.token_ids_E[start:end].tolist(), sequence.values_E[start:end]


@pytest.mark.parametrize("name", DISTILLKIT)
def test_distillkit_rows_are_what_its_own_decoder_reads(name: str):
    first = sequences(DATA / "distillkit" / name)[0]
    assert first.input_ids_N is not None
    assert (len(first.input_ids_N), first.positions_P.tolist()) == (17, list(range(16)))
    for number, expected in zip((0, 7), json.loads((DATA / "distillkit" / name / "decoded.json").read_text()), strict=True):
        ids, values = row(first, number)
        assert ids == expected["ids"]
        # Its float16 and bfloat16 arithmetic rounds where ours carries float32 on.
        np.testing.assert_allclose(values, expected["values"], rtol=0, atol=0.02 if name == "residuals" else 2e-3)


@pytest.mark.parametrize("name", DISTILLKIT)
def test_of_distillkit_s_settings_only_the_recommended_one_has_broken_tails(name: str):
    assert wrong(look(DATA / "distillkit" / name)) == ({"broken_tails"} if name == "recommended" else set())


def test_broken_tails_are_seen_in_the_values_too(tmp_path: Path):
    """Where rows drop off a step at the seam, whatever the config's condition number says."""
    shutil.copytree(DATA / "distillkit" / "recommended", tmp_path / "c")
    counts = look(tmp_path / "c").counts
    assert counts.num_seam_positions == counts.num_positions == 48
    assert look(DATA / "distillkit" / "published").counts.num_seam_positions == 0


def test_the_condition_number_tells_which_configs_can_be_fitted():
    settings = {"d": 152064, "k": 128, "exact_k": 16, "polynomial_terms": [0, 1, 2, 3, 4, "sqrt"]}
    recommended, mended = fit_quality(Config(**settings)), fit_quality(Config(**settings, normalize_t=True))
    assert recommended is not None
    assert mended is not None
    assert recommended.condition == pytest.approx(6.5e8, rel=0.01)
    assert (recommended.is_broken, mended.is_broken) == (True, False)
    assert mended.mean_error_nats < 0.05


def test_a_distillkit_cache_without_its_config_is_refused_in_words_and_read_with_it(tmp_path: Path):
    shutil.copy(DATA / "distillkit" / "budget" / "data_0.parquet", tmp_path)
    with pytest.raises(InputError, match=r"config cannot be read: No such file or directory; .* name it"):
        look(tmp_path)
    training = tmp_path / "train.yaml"
    own = (DATA / "distillkit" / "budget" / "compression_config.yaml").read_text()
    training.write_text("teacher:\n  logprob_compressor:\n" + "".join(f"    {line}\n" for line in own.splitlines()))
    assert wrong(examine(tmp_path, ExamineConfig(read=ReadConfig(config=str(training))))) == set()
    training.write_text(own.replace("k: 50", "k: 40"))
    with pytest.raises(InputError, match="bytepacked_indices are 57 bytes, but 40 ids of a vocabulary of 512 take 45"):
        look_with(tmp_path, training)
    training.write_text(own.replace("bfloat16", "float32"))
    with pytest.raises(InputError, match="compressed_logprobs are 14 bytes, but the config says 16"):
        look_with(tmp_path, training)


def look_with(path: Path, config: Path) -> Examination:
    return examine(path, ExamineConfig(read=ReadConfig(config=str(config))))


def test_documents_that_distillkit_packed_are_taken_apart(tmp_path: Path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    shutil.copytree(DATA / "distillkit" / "exact", tmp_path / "c")
    table = pq.read_table(tmp_path / "c" / "data_0.parquet")
    rows = table.to_pylist()
    packed = {name: [*rows[0][name][:16], *rows[1][name][:9]] for name in rows[0]} | {"attention_mask": [1] * 16 + [2] * 9}
    pq.write_table(pa.Table.from_pylist([packed]), tmp_path / "c" / "data_0.parquet")
    apart = sequences(tmp_path / "c")
    whole = sequences(DATA / "distillkit" / "exact")
    assert [len(s.counts_P) for s in apart] == [16, 9]
    for found, expected in zip(apart, whole, strict=False):
        assert row(found, 3)[0] == row(expected, 3)[0]
        assert found.input_ids_N is not None
        assert found.input_ids_N.tolist() == expected.input_ids_N[: len(found.input_ids_N)].tolist()  # pyright: ignore[reportOptionalSubscript]


def test_axolotl_columns_are_one_off_and_its_transform_renormalises():
    columns, prepared = look(DATA / "axolotl" / "v2.jsonl"), look(DATA / "axolotl" / "prepared.parquet")
    assert wrong(columns) == {"shifted_positions"}
    assert wrong(prepared) == {"shifted_positions", "renormalised"}
    assert {f.repair for f in columns.findings if f.name == "shifted_positions"} == {"--shift -1"}
    assert sequences(DATA / "axolotl" / "v2.jsonl")[0].positions_P.tolist() == list(range(1, 17))
    learnt_N = sequences(DATA / "axolotl" / "prepared.parquet")[0].learnt_N
    assert learnt_N is not None
    assert learnt_N.tolist() == [False] * 3 + [True] * 14


@pytest.mark.parametrize(("dtype", "slack"), [("float32", 2e-4), ("bfloat16", 0.03)])
def test_nemo_aligner_logits_and_their_normaliser_give_logprobs(dtype: str, slack: float):
    found = look(DATA / "nemo_aligner" / f"{dtype}.jsonl")
    assert wrong(found) == set()
    first = sequences(DATA / "nemo_aligner" / f"{dtype}.jsonl")[0]
    assert first.log_z_P is not None
    assert first.input_ids_N is not None
    assert first.learnt_N is not None
    assert (len(first.input_ids_N), first.learnt_N.sum(), len(first.counts_P)) == (17, 13, 16)
    logprobs = row(first, 5)[1] - first.log_z_P[5]
    zipf = -1.4 * np.log(np.arange(1, 513.0))
    np.testing.assert_allclose(logprobs, (zipf - np.log(np.exp(zipf).sum()))[:6], atol=slack)


def test_labels_that_are_not_the_next_tokens_are_refused(tmp_path: Path):
    lines = [json.loads(line) for line in (DATA / "nemo_aligner" / "float32.jsonl").read_text().splitlines()]
    lines[1]["labels"] = lines[1]["tokens"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(InputError, match=r"a.jsonl:2: label 3 is \d+, but the token after token 3 is \d+"):
        look(tmp_path / "a.jsonl")


def test_megatron_s_tars_are_read_without_their_pickles():
    found = sequences(DATA / "megatron" / "top_k")
    expected = json.loads((DATA / "megatron" / "top_k" / "decoded.json").read_text())
    assert [len(s.counts_P) for s in found[:2]] == expected["num_rows"]
    for number in (0, 1):
        ids, values = row(found[1], number)
        assert ids == expected["ids"][number]
        assert values.tolist() == expected["values"][number]
    assert wrong(look(DATA / "megatron" / "top_k")) == {"no_tokens"}
    assert wrong(look(DATA / "megatron" / "top_p")) == {"no_tokens", "needs_unpickling"}


def test_a_folder_that_the_datasets_library_saved_is_read(tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    rows = [json.loads(line) for line in (DATA / "axolotl" / "v2.jsonl").read_text().splitlines()]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    found = look(tmp_path / "saved")
    assert (found.title, wrong(found)) == ("Axolotl v2 logprob columns (arrow)", {"shifted_positions"})
    assert found.counts.num_positions == 48


def test_tars_of_two_runs_in_one_folder_are_named(tmp_path: Path):
    import io
    import tarfile

    (first,) = (DATA / "megatron" / "top_k").glob("*.tar")
    shutil.copy(first, tmp_path / "cp0_dp0__7.tar")
    with tarfile.open(first) as archive:
        meta = json.loads(archive.extractfile("_meta.json").read())  # pyright: ignore[reportOptionalMemberAccess]
    other = json.dumps(meta | {"hash": "0" * 32}).encode()
    with tarfile.open(tmp_path / "cp0_dp0__9.tar", "w") as archive:
        member = tarfile.TarInfo("_meta.json")
        member.size = len(other)
        archive.addfile(member, io.BytesIO(other))
    found = look(tmp_path)
    assert wrong(found) == {"no_tokens", "mixed_runs"}
    (sentence,) = [finding.sentence for finding in found.findings if finding.name == "mixed_runs"]
    assert f'"{meta["hash"]}" in cp0_dp0__7.tar' in sentence
    assert f'"{"0" * 32}" in cp0_dp0__9.tar' in sentence


def test_a_star_in_a_config_is_no_alias(tmp_path: Path):
    shutil.copytree(DATA / "distillkit" / "exact", tmp_path / "c")
    config = tmp_path / "c" / "compression_config.yaml"
    own = config.read_text()
    config.write_text(f"# rows: *.parquet\nfiles: ['*.parquet']\n{own}")
    assert wrong(look(tmp_path / "c")) == set()
    config.write_text(f"a: &a [1]\nb: *a\n{own}")
    assert wrong(look(tmp_path / "c")) == set()
    config.write_text(f"a: &a [*a]\n{own}")
    with pytest.raises(InputError, match="would never end"):
        look(tmp_path / "c")


FINE = {"d": 520, "k": 32, "exact_k": 16, "polynomial_terms": [0, 1, 2], "delta_encoding": True}
PLAIN = FINE | {"delta_encoding": False}
EXACT = {"d": 520, "k": 16, "exact_k": 16}


@pytest.mark.parametrize(
    ("settings", "said", "cause"),
    [
        (FINE, {"delta_encoding": False}, "with delta_encoding: true"),
        (PLAIN, {"delta_encoding": True}, "with delta_encoding: false"),
        (FINE | {"normalize_t": True}, {"normalize_t": False}, "with normalize_t: true"),
        (PLAIN, {"normalize_t": True}, "with normalize_t: false"),
        (PLAIN, {"exact_k": 17, "polynomial_terms": [0, 1]}, "with exact_k: 16, polynomial_terms: [0, 1, 2]"),
        (PLAIN, {"exact_k": 14, "polynomial_terms": [0, 1, 2, 3, 4]}, "with exact_k: 16, polynomial_terms: [0, 1, 2]"),
        (EXACT | {"delta_encoding": True}, {"delta_encoding": False}, "with delta_encoding: true"),
        (EXACT | {"delta_encoding": False}, {"delta_encoding": True}, "with delta_encoding: false"),
    ],
)
def test_another_config_of_as_many_bytes_is_named(truth: Truth, tmp_path: Path, settings: Any, said: Any, cause: str):
    found = look(write_distillkit(tmp_path / "c", items(truth, settings["k"]), settings, **said))
    told = [finding.sentence for finding in found.findings if finding.name in ("wrong_config", "broken_tails")]
    assert cause in told[0]
    assert "the config is probably not the one that wrote" in told[0]
    right = look(write_distillkit(tmp_path / "right", items(truth, settings["k"]), settings))
    assert wrong(right) == set()


def test_damage_of_other_kinds_is_not_put_down_to_the_config(truth: Truth, tmp_path: Path):
    late = items(truth, 32)
    for item in late:
        item.ids, item.values = (np.roll(rows, 1, axis=0).tolist() for rows in (item.ids, item.values))
    assert wrong(look(write_distillkit(tmp_path / "late", late, FINE))) == {"shifted_positions"}
    other = items(truth, 32)
    for item in other:
        item.input_ids = [(7 * i + 3) % 500 for i in item.input_ids]
    assert wrong(look(write_distillkit(tmp_path / "other", other, FINE))) == {"foreign_positions"}
    flat = items(truth, 32)
    for item, logits_NV in zip(flat, truth.logits_SNV, strict=True):
        item.values = np.take_along_axis(log_softmax(logits_NV[:-1] / 2), np.array(item.ids), axis=1).tolist()
    assert wrong(look(write_distillkit(tmp_path / "flat", flat, FINE))) == {"temperature_applied"}
