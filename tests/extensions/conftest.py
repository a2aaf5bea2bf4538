from __future__ import annotations

import sys
from pathlib import Path

import pytest
from installed_package import TOYS, install


@pytest.fixture
def toys(tmp_path_factory, monkeypatch) -> Path:
    """A folder on the path in which a package with one toy of each kind is installed."""
    folder = install(tmp_path_factory.mktemp("installed"))
    for path in (TOYS, folder):
        monkeypatch.syspath_prepend(str(path))
    yield folder
    for name in [name for name in sys.modules if name.startswith("toy_")]:
        del sys.modules[name]
