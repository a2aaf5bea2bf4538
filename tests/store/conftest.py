from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """As pytest's own, but in memory where the machine has such a folder: publishing syncs every file, 10 ms each on a disk."""
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="kdcache-", dir=memory if memory.is_dir() else None))
    (folder / "test").mkdir()
    yield folder / "test"  # a folder of its own, so that what a test puts beside it goes too
    shutil.rmtree(folder, ignore_errors=True)
