import json
import sys
from pathlib import Path

import msgspec
import pytest

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[1] / "train"))

from train_caches import train_config, write_cache

from kdcache.cli.main import main
from kdcache.config.load import load_config
from kdcache.config.train import TrainConfig

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module")
def config_file(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JSON is YAML: a resolved config written down is a config file."""
    folder = tmp_path_factory.mktemp("cli")
    cache = write_cache(folder / "cache", tiny_model_dir, k=16, num_sequences=6)
    config = train_config(cache, tiny_model_dir, folder / "run")
    (folder / "train.yaml").write_bytes(msgspec.json.encode(config))
    (folder / "heldout.jsonl").write_text("".join(json.dumps({"text": f"x = {i}\n" * 9}) + "\n" for i in range(12)))
    return folder / "train.yaml"


def _failure(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1, "one sentence, on stderr"
    return captured.err


def test_train_and_evaluate_print_results_and_leave_files(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, data = config_file.parent, config_file.with_name("heldout.jsonl")
    heldout = ("--set", f"heldout.data={data}", "--set", "heldout.every_steps=2")
    for name, alpha in (("kd", 1), ("labels", 0)):
        arguments = ("--set", f"loss.alpha={alpha}", "--set", f"out={tmp_path / name}")
        assert main(["train", str(config_file), *heldout, *arguments]) == 0
        printed = capsys.readouterr().out
        assert printed.startswith("8 steps, ")
        assert f"model: {tmp_path / name / 'model'}" in printed
        assert "held-out nats per token  6." in printed

    teacher = load_config(folder / "train.yaml", TrainConfig).student.model
    students = ("--student", f"labels={tmp_path / 'labels'}", "--student", f"kd={tmp_path / 'kd'}")
    assert main(["evaluate", "--teacher", teacher, "--data", str(data), *students, "--out", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:5]] == ["teacher", "labels", "kd"]
    assert any(line.startswith("kd against labels: ") for line in lines)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["evaluation.md", "evaluation.png", "results.json"]


def test_mistakes_of_train_are_one_sentence_and_status_2(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(*overrides: str) -> str:
        sets = [part for override in (f"out={tmp_path / 'run'}", *overrides) for part in ("--set", override)]
        return _failure(capsys, "train", config_file, *sets)

    assert "no such file" in _failure(capsys, "train", tmp_path / "missing.yaml")
    assert "loss.alpha" in train("loss.alpha=2")
    assert "did you mean loss.alpha?" in train("loss.alfa=1")
    assert "give either `steps` or `epochs`" in train("epochs=1")
    assert "overrides change the shape" in train("student.init=pretrained")
    assert "no cache" in train(f"cache={tmp_path}").lower()
    assert "student.model" in train(f"student.model={tmp_path}")
    assert "seq_len" in train("loader.seq_len=4")
    assert "held-out data cannot be read" in train("heldout.data=nowhere.jsonl")
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").iterdir())


def test_mistakes_of_evaluate_are_one_sentence_and_status_2(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rest = ("--data", config_file.with_name("heldout.jsonl"), "--out", tmp_path / "out")
    assert "expected NAME=DIR" in _failure(capsys, "evaluate", "--teacher", "t", "--student", "kd", *rest)
    assert "given twice" in _failure(capsys, "evaluate", "--teacher", "t", "--student", "a=x", "--student", "a=y", *rest)
    teacher = load_config(config_file, TrainConfig).student.model
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "fine"}\n{"txt": "not"}\n')
    arguments = ("--teacher", teacher, "--student", f"a={teacher}", "--data", broken, "--out", tmp_path / "out")
    assert "broken.jsonl:2: " in _failure(capsys, "evaluate", *arguments)


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [("--window", "1", "1 is below 2"), ("--max-tokens", "many", "invalid whole number"), ("--seed", "-1", "-1 is below 0")],
)
def test_impossible_numbers_are_wrong_usage(flag: str, value: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["evaluate", "--teacher", "t", "--data", "d", "--student", "a=b", "--out", "o", flag, value])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("command", "config"), [("capture", "train-kd.yaml"), ("train", "capture-text.yaml")])
def test_a_config_of_another_command_is_named_as_such(command: str, config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, str(CONFIGS / config)]) == 2
    other = config.partition("-")[0]
    assert f"this is a config of `kdcache {other}`; run `kdcache {other} {CONFIGS / config}`" in capsys.readouterr().err


def test_the_example_configs_load_and_differ_in_the_loss_alone() -> None:
    kd, labels = (msgspec.to_builtins(load_config(CONFIGS / f"train-{name}.yaml", TrainConfig)) for name in ("kd", "labels"))
    assert (kd["loss"].pop("alpha"), labels["loss"].pop("alpha")) == (1.0, 0.0)
    assert kd.pop("out") != labels.pop("out")
    assert kd == labels


def test_the_example_config_shows_every_field() -> None:
    import yaml

    def missing(shown: object, config: object) -> list[str]:
        if not isinstance(config, msgspec.Struct):
            return []
        assert isinstance(shown, dict)
        absent = [name for name in config.__struct_fields__ if name not in shown]
        return absent + [name for section in shown for name in missing(shown[section], getattr(config, section, None))]

    path = CONFIGS / "train-kd.yaml"
    assert missing(yaml.safe_load(path.read_text()), load_config(path, TrainConfig)) == []
