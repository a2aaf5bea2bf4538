"""Every file in configs/ loads, and every field that exists is shown in one of them."""

from pathlib import Path

import pytest
import yaml

from kdcache.config.capture import CaptureConfig
from kdcache.config.describe import describe_fields
from kdcache.config.load import load_config
from kdcache.config.train import TrainConfig

FOLDER = Path(__file__).parent.parent / "configs"
TYPES = {"capture": CaptureConfig, "train": TrainConfig}


def files(command="*"):
    """Configs of one command or all; jobs of schedulers, which have their own tests, are no configs."""
    return sorted(path for path in FOLDER.glob(f"{command}-*.yaml") if path.stem.partition("-")[0] in TYPES)


@pytest.mark.parametrize("path", files(), ids=lambda path: path.stem)
def test_every_config_loads(path):
    load_config(path, TYPES[path.stem.partition("-")[0]])


@pytest.mark.parametrize("path", files(), ids=lambda path: path.stem)
def test_every_config_starts_with_what_it_is_for_and_comments_its_fields(path):
    text = path.read_text()
    assert text.startswith("# ")
    assert text.count("#") >= 5


@pytest.mark.parametrize("command", TYPES)
def test_every_field_is_shown_in_a_config(command):
    shown = {name for path in files(command) for name in paths_of(yaml.safe_load(path.read_text()))}
    fields = [field.path for field in describe_fields(TYPES[command])]
    assert [field for field in fields if field not in shown] == []


def paths_of(section, prefix=""):
    for name, value in section.items():
        yield f"{prefix}{name}"
        if isinstance(value, dict):
            yield from paths_of(value, f"{prefix}{name}.")
