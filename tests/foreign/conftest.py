"""One tiny teacher's text for the whole room."""

from __future__ import annotations

from pathlib import Path

import pytest
from foreign_cases import Truth, write_truth


@pytest.fixture(scope="session")
def truth(tiny_model_dir: Path) -> Truth:
    """What the tiny teacher wrote, and its logits there."""
    return write_truth(tiny_model_dir)
