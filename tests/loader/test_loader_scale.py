"""A loader's own memory does not grow with the cache, nor is its first batch long in coming: the benchmark at small sizes. An
index kept in memory would be 20 MiB."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "loader_scale.py"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_memory_is_flat_in_the_number_of_sequences_and_the_first_batch_is_soon_there(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(BENCHMARK),
        "--sequences",
        "1000",
        "600000",
        "--k",
        "2",
        "--batches",
        "20",
        "--folder",
        tmp_path,
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    small, large = [[cell.strip() for cell in line.split("|")] for line in result.stdout.splitlines()[2:]]
    assert (small[1], large[1]) == ("1,000", "600,000")
    assert float(large[4]) - float(small[4]) <= 4
    assert float(large[3]) < 5  # seconds, on a busy machine too
