"""A student on disk: a folder in the Hugging Face layout that loads anywhere, or what a training run keeps of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from kdcache.config.train import StudentConfig
from kdcache.errors import ConfigError, StateError
from kdcache.shown import first_line
from kdcache.store.files.regular import write_new
from kdcache.teacher.hf.load import language_model_class
from kdcache.train.init.proof import probe_ids
from kdcache.train.runs.digests import find_damage
from kdcache.train.runs.run_folder import publish_folder
from kdcache.train.student import load_model, with_attention, without_progress_bars

REPORT = "report.json"


def write_student(out: Path, student: PreTrainedModel, report: dict[str, Any], *, tokenizer: str) -> None:
    """Write the folder whole or not at all, and load it again to see that it says the same.

    Args:
        out: must not be there, or be empty.
        student: in evaluation mode.
        report: becomes report.json.
        tokenizer: folder or hub id of the tokenizer that is copied.

    Raises:
        ConfigError: the folder is taken or cannot be written, or does not give the student back.
    """
    refuse_taken(out)

    def save(temp: Path) -> None:
        with without_progress_bars():
            student.save_pretrained(temp)
            AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False).save_pretrained(temp)
        write_new(temp / REPORT, _json(report))
        _prove_loads(temp, student)

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        publish_folder(out, save)
    except OSError as error:
        raise ConfigError(f"--out {str(out)!r} cannot be written: {first_line(error)}") from error


def refuse_taken(out: Path) -> None:
    """Raise ConfigError unless a folder can be made there."""
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise ConfigError(f"--out {str(out)!r} is not an empty folder; name another one")


@torch.no_grad()
def _prove_loads(folder: Path, student: PreTrainedModel) -> None:
    ids_1T = probe_ids(student)
    options = {"dtype": student.dtype, "attn_implementation": student.config._attn_implementation}
    again = load_model(str(folder), field="--out", **options).to(student.device).eval()  # pyright: ignore[reportArgumentType]
    if not torch.equal(again(input_ids=ids_1T, use_cache=False).logits, student(input_ids=ids_1T, use_cache=False).logits):
        raise ConfigError(
            f"--out: {type(student).__name__}, saved and loaded again, gives other logits: its configuration does not say all "
            "that was cut; keep other layers or sizes"
        )


def keep_initial(folder: Path, student: PreTrainedModel, report: dict[str, Any]) -> None:
    """Keep what a run needs to build the student again: its configuration. The weights are in the run's checkpoints."""

    def save(temp: Path) -> None:
        temp.mkdir(parents=True)
        student.config.save_pretrained(temp)
        write_new(temp / REPORT, _json(report))

    publish_folder(folder, save)


def initial_again(folder: Path, config: StudentConfig) -> PreTrainedModel:
    """The student that a run began with, with weights that a checkpoint will replace.

    Raises:
        StateError: the folder is missing or damaged.
    """
    damage = find_damage(folder) if folder.is_dir() else "the folder is missing"
    if damage is not None:
        raise StateError(
            f"{folder}: {damage}; it says what was cut from the teacher, so the run cannot be resumed: delete its checkpoints "
            "to train from the start"
        )
    shape = AutoConfig.from_pretrained(folder, trust_remote_code=False)

    def load(attention: str) -> PreTrainedModel:
        options = {"dtype": torch.float32, "attn_implementation": attention}
        return language_model_class(shape).from_config(shape, **options).eval()

    return with_attention(load, config.attention, field="student.attention")


def _json(report: dict[str, Any]) -> bytes:
    return f"{json.dumps(report, indent=1)}\n".encode()
