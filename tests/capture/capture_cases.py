"""What the tests of failures, signals and executors share: configs of the fake teacher, and what a cache holds."""

import os
import subprocess
import sys
import time
from pathlib import Path

import msgspec

import kdcache
from kdcache.config.capture import CaptureConfig
from kdcache.config.load import convert_config

LINES = [f"line {n} says {'la' * (n % 7)}" for n in range(20)]


def make_config(tmp_path, lines=LINES, **sections):
    """One line to a sequence, four to a unit; written to cache/ unless `out` says otherwise."""
    (tmp_path / "a.txt").write_text("".join(f"{line}\n" for line in lines))
    fields = {
        "input": {"format": "lines", "paths": [str(tmp_path / "a.txt")], "window": {"size": 64}},
        "teacher": {"model": "fake", "backend": "fake", "fake": {"vocab_size": 300, "context_length": 64}},
        "selection": {"k": 4},
        "codec": {"id": "raw"},
        "out": str(tmp_path / "cache"),
        "shards": {"unit_items": 4},
    }
    for name, section in sections.items():
        fields[name] = fields.get(name, {}) | section if isinstance(section, dict) else section
    return convert_config(fields, CaptureConfig)


def write_config(config, path):
    """The config as a file for the command line (JSON is YAML)."""
    path.write_bytes(msgspec.json.encode(config))
    return path


def content(path):
    """Every record, by its source's line number, as plain values."""
    with kdcache.open(path) as reader:
        records = [reader[n] for n in range(len(reader))]
    return {
        int(r.sequence.source.rpartition(":")[2]): (
            r.sequence.key,
            r.distributions.token_ids_E.tolist(),
            r.distributions.logprobs_E.tolist(),
        )
        for r in records
    }


def start_command(path, *flags, command="capture", teacher="faulty_teacher.py", **environment):
    """`kdcache capture`, or another command, in a process of its own, with the faulty teacher unless told otherwise."""
    program = [str(Path(__file__).with_name(teacher))] if teacher else ["-m", "kdcache"]
    return subprocess.Popen(
        [sys.executable, *program, command, str(path), *map(str, flags)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )


def wait_for_units(cache, number, process):
    """Until so many units are journalled, while the process that makes them is there."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if (cache / "journal").is_dir() and len(os.listdir(cache / "journal")) >= number:
            return
        time.sleep(0.01)
    raise AssertionError(f"not {number} units: {process.communicate(timeout=5)}")
