"""A target with one fault of each kind, for the test of the command that runs targets."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np


def trial(seed: int, folder: Path) -> list[str]:
    """Seed 1 crashes, 2 hangs, 3 takes memory, 4 asks for too much, 5 and 6 find one thing; others find nothing."""
    (folder / "input").write_text(str(seed))
    if seed == 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    if seed == 2:
        time.sleep(10**6)
    if seed == 3:
        np.ones(2**28, np.uint8).sum()
    if seed == 4:
        np.ones(2**33, np.uint8)
    return ["reader: KeyError: 'x' at store/reader.py:1"] if seed in (5, 6) else []
