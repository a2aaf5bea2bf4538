"""Every tutorial is run, block by block. Large models are replaced by tiny ones of the same kind, a cluster by processes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from fault_proxy import FaultProxy
from tiny_model import build_tiny_model, stdlib_texts
from tutorial_runner import RUN, Tutorial, blocks_of

import kdcache
from kdcache.codec.features.constants import constant_bytes
from kdcache.codec.features.vectors import bytes_per_vector
from kdcache.format.identity import FeatureInfo, ProjectionInfo

PAGES = Path(__file__).parents[2] / "kdcache" / "docs"


@pytest.fixture
def models(tiny_model_dir: Path) -> dict[str, str]:
    """Names of models in the pages -> the folder of the tiny one that a test has."""
    return {"Qwen/Qwen3-8B": str(tiny_model_dir), "Qwen/Qwen3-0.6B": str(tiny_model_dir)}


def page(name: str) -> Path:
    return PAGES / f"{name}.md"


def test_every_page_has_a_test_of_its_own_and_says_why_a_block_is_not_run() -> None:
    tested = Path(__file__).read_text() + (Path(__file__).parent / "test_trainer_tutorials.py").read_text()
    pages = [path for path in PAGES.glob("*.md") if path.name != "README.md"]
    assert [path.stem for path in pages if f'page("{path.stem}")' not in tested] == []
    blocks = [(path.stem, block) for path in pages for block in blocks_of(path.read_text("utf-8"))]
    unmarked = [(name, block.kind) for name, block in blocks if block.kind not in (*RUN, "text")]
    assert unmarked == []
    assert [(name, block.note) for name, block in blocks if block.note and len(block.note) < 20] == []


def test_an_input_format_of_another_package(work_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    about = work_folder / "dashes-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: dashes\nVersion: 1.0\n")
    (registered,) = (block.text for block in blocks_of(page("extending").read_text("utf-8")) if block.kind == "text")
    name, _, pointer = registered.splitlines()[1].partition(" = ")
    module = pointer.strip('"')
    (about / "entry_points.txt").write_text(f"[kdcache.inputs]\n{name} = {module}\n")
    monkeypatch.syspath_prepend(str(work_folder))
    Tutorial(page("extending")).run()
    with kdcache.open("cache") as cache:
        assert cache.sources() == ["texts/a.dashes#0", "texts/a.dashes#1"]


@pytest.mark.slow
def test_a_capture_on_one_node(work_folder: Path, models: dict[str, str]) -> None:
    Tutorial(
        page("capture-one-node"), instead=models | {"backend: vllm": "backend: transformers", "size: 2048": "size: 64"}
    ).run()
    assert (work_folder / "cache" / "manifests").is_dir()


@pytest.mark.slow
@pytest.mark.vllm
def test_a_capture_on_one_node_with_vllm(work_folder: Path, models: dict[str, str]) -> None:
    pytest.importorskip("vllm")
    Tutorial(page("capture-one-node"), instead=models | {"size: 2048": "size: 64"}).run()
    assert (work_folder / "cache" / "manifests").is_dir()


@pytest.mark.slow
def test_training_a_drafter(work_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    teacher = build_tiny_model(tmp_path / "teacher", num_hidden_layers=4)
    layers = {"layer: 14": "layer: 3", "layer: 25": "layer: 1", "layer: 28": "layer: 4"}
    Tutorial(page("drafters"), instead=layers | {"Qwen/Qwen3-0.6B": str(teacher), "size: 2048": "size: 64"}).run()
    num_sequences = len(kdcache.open("cache"))
    assert len(list((work_folder / "files" / "hidden_states").glob("hs_*.safetensors"))) == num_sequences
    assert len(list((work_folder / "features").glob("*.ckpt"))) == num_sequences


@pytest.mark.slow
def test_a_capture_on_a_slurm_array(work_folder: Path) -> None:
    instead = {
        "Qwen/Qwen3-8B": "fake",
        "backend: vllm": "backend: fake",
        "size: 2048": "size: 64",
        "unit_chars: 2000000": "unit_chars: 2000",
    }
    Tutorial(page("capture-slurm"), instead=instead).run()
    progress = sorted(path.name for path in work_folder.glob("*.progress.json"))
    assert len(list((work_folder / "cache" / "data").glob("*.arrow"))) == 3
    assert progress == [f"cache.rank-{rank}.progress.json" for rank in range(3)]


@pytest.fixture
def small(models: dict[str, str]) -> dict[str, str]:
    """What makes a page run on a CPU in seconds."""
    return models | {
        "backend: vllm": "backend: transformers",
        "size: 2048": "size: 64",
        "seq_len=2048": "seq_len=64",
        "batch_rows=16": "batch_rows=2",
    }


def test_your_own_trainer(with_cache: Path, small: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> None:
    student = build_tiny_model(tmp_path_factory.mktemp("student") / "tiny-llama", seed=1)
    quick = {"Qwen/Qwen3-0.6B": str(student), "lr=1e-5": "lr=1e-2", "== [8, 8]": "== [1, 1]"}
    names = Tutorial(page("your-own-trainer"), instead=small | quick).run()
    assert 0 < float(names["loss"].detach()) < 5


def test_choosing_a_selection(work_folder: Path, small: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    names = Tutorial(page("selection"), instead=small).run()
    shown = capsys.readouterr().out
    assert float(names["loss"]) > 0
    assert "good for" in shown
    assert str(names.get("error", "")) == ""
    assert "total_variation" in shown


def test_loss_terms(work_folder: Path, small: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    (work_folder / "corpus").mkdir(exist_ok=True)
    names = Tutorial(page("loss-terms"), instead=small | {"steps: 20": "steps: 2"}).run()
    assert float(names["loss"].detach()) > 0
    assert {"divergence", "cross_entropy"} <= names["loss_of"].report().keys()
    assert "terms" in capsys.readouterr().out


def test_a_student_from_its_teacher(with_cache: Path, small: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("texts.jsonl", "heldout.jsonl"):
        (with_cache / name).write_text("".join(json.dumps({"text": text[:500]}) + "\n" for text in stdlib_texts()[3:]))
    tiny = {"--drop 8": "--drop 1", "{drop: 8}": "{drop: 1}", "3072": "48", "9216": "96", "steps: 10000": "steps: 3"}
    loader = {"seq_len: 2048, batch_rows: 16": "seq_len: 64, batch_rows: 2"}
    Tutorial(page("student-from-teacher"), instead=small | tiny | loader).run()
    shown = capsys.readouterr().out
    assert "block influence" in shown
    assert "held-out nats per token, before any training" in shown
    assert (with_cache / "narrower" / "report.json").is_file()
    assert (with_cache / "run" / "model" / "config.json").is_file()


def test_temperature(work_folder: Path, small: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    names = Tutorial(page("temperature"), instead=small).run()
    shown = capsys.readouterr().out
    assert float(names["loss"]) > 0
    assert "3.0" in shown.splitlines()[-1]


def test_features(work_folder: Path, small: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    names = Tutorial(page("features"), instead=small).run()
    assert "bytes per position" in capsys.readouterr().out
    assert names["rest"].shape == names["probabilities"].shape[:2]


def test_the_costs_of_features_are_what_they_take() -> None:
    """The table's numbers, of its teacher: 4,096 numbers, 32 heads, 8 key-value heads of 128."""

    def cost(**fields: Any) -> tuple[int, int]:
        feature = FeatureInfo(name="x", layer=1, **fields)
        return bytes_per_vector(feature), constant_bytes(feature)

    pca, random = (ProjectionInfo(kind=kind, full_size=4096) for kind in ("pca", "random"))
    heads = [
        cost(size=size, dtype="int8", kind=kind)[0] for kind, size in (("queries", 4096), ("keys", 1024), ("values", 1024))
    ]
    costs = [
        cost(size=4096), cost(size=4096, dtype="int8"), cost(size=4096, dtype="int8", scale="channel"),
        cost(size=256, dtype="int8", projection=pca), cost(size=256, dtype="int8", projection=random), (sum(heads), 0),
        cost(size=32 * 8, kind="attention"), (cost(size=4096)[0] // 512, 0),
    ]  # fmt: skip
    rows = re.findall(r"^\| .+ \| ([\d,]+) \| ([^|]*)\|", page("features").read_text("utf-8"), re.MULTILINE)
    assert [int(number.replace(",", "")) for number, _ in rows] == [each for each, _ in costs]
    assert [once.strip() for _, once in rows] == ["", "", "33 kB", "4.2 MB", "", "", "", ""]
    assert [once for _, once in costs] == [0, 0, 32_768, 4_211_712 + 0, 0, 0, 0, 0]


def test_object_stores(work_folder: Path, s3: FaultProxy, models: dict[str, str], tiny_model_dir: Path) -> None:
    instead = models | {"s3://bucket": f"s3://{s3.bucket}", "--set shards": "--set teacher.backend=transformers --set shards"}
    Tutorial(page("object-stores"), instead=instead).run()
    assert any(path.is_file() for path in (work_folder / "blocks").rglob("*"))


def test_damage_and_repair(with_cache: Path, captured: Path, tiny_model_dir: Path) -> None:
    (with_cache / "capture.yaml").symlink_to(captured / "capture.yaml")
    before = {path.name: path.read_bytes() for path in (with_cache / "cache" / "data").glob("*.arrow")}
    Tutorial(page("repair")).run()
    assert {path.name: path.read_bytes() for path in (with_cache / "cache" / "data").glob("*.arrow")} == before


def test_the_format(work_folder: Path, small: dict[str, str]) -> None:
    names = Tutorial(page("format"), instead=small).run()
    assert names["token_ids"].shape == (len(names["positions"]), 8)
