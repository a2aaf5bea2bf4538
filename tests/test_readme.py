"""What the README shows is run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import build_tiny_model
from transformers import AutoModelForCausalLM

from kdcache.cli.main import main

README = Path(__file__).parents[1] / "README.md"


@pytest.fixture
def work_folder(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `cache`: the tiny model's own distributions over a short text."""
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "text.txt").write_text("def area(width, height):\n    return width * height\n" * 20)
    monkeypatch.chdir(tmp_path)
    config = Path(__file__).parents[1] / "configs" / "capture-text.yaml"
    settings = [
        "input.paths=[corpus]",
        f"teacher.model={tiny_model_dir}",
        "teacher.backend=transformers",
        "input.window.size=64",
        "out=cache",
    ]
    assert main(["capture", str(config), *(part for setting in settings for part in ("--set", setting))]) == 0
    return tmp_path


@pytest.mark.slow
def test_the_quickstart_in_python_trains_a_student(work_folder: Path, tiny_model_dir: Path) -> None:
    code = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert code is not None
    student = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn_like(parameter) * parameter.std().nan_to_num())
    names: dict[str, Any] = {"student": student, "optimizer": torch.optim.AdamW(student.parameters(), lr=3e-3)}
    losses = []
    for _ in range(5):
        exec(code[1], names)  # the README's own lines
        losses.append(float(names["loss"].detach()))
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.slow
def test_the_commands_in_the_shell_run_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block = re.search(r"```sh\n(kdcache capture.*?)```", README.read_text(), re.DOTALL)
    assert block is not None
    monkeypatch.chdir(tmp_path)
    Path("configs").symlink_to(README.parent / "configs")
    for name in ("teacher", "student"):
        build_tiny_model(Path("my", name), max_position_embeddings=1024)
    Path("corpus").mkdir()
    Path("corpus", "text.txt").write_text("def area(width, height):\n    return width * height\n" * 60)
    ours = {"capture": ["--set", "teacher.backend=transformers"], "train": ["--set", "steps=1", "--set", "epochs=null"]}
    for line in block[1].replace("\\\n", " ").splitlines():
        _, command, *arguments = shlex.split(line)
        assert main([command, *arguments, *ours.get(command, [])]) == 0, line
    assert Path("runs/kd/model/config.json").is_file()


def test_the_readme_names_only_files_and_commands_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    text = README.read_text()
    for path in re.findall(r"\b((?:configs|tools|kdcache|benchmarks)/[\w./-]*\w)", text):
        assert (README.parent / path).exists(), path
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    for command in set(re.findall(r"\bkdcache (capture|verify|info|train|evaluate|\w+) (?:CONFIG|CACHE|configs|cache)", text)):
        assert command in shown
