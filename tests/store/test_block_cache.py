from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from kdcache.errors import ConfigError
from kdcache.store.files import fs
from kdcache.store.remote.block_cache import DiskBlocks, MemoryBlocks

SIZE = 1000
STORED = SIZE + 16


def key(number: int) -> str:
    return f"{number:064x}-{number}"


def block(number: int) -> bytes:
    return np.random.default_rng(number).bytes(SIZE)


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


@pytest.fixture(params=["memory", "disk"])
def make(request, tmp_path):
    """A cache for so many blocks, of either kind."""

    def make(num_blocks: int):
        room = num_blocks * STORED + num_blocks * STORED // 32 + 1
        return MemoryBlocks(num_blocks * SIZE) if request.param == "memory" else DiskBlocks(tmp_path / "blocks", room)

    return make


def put(blocks, number: int) -> None:
    blocks.put(key(number), block(number))
    time.sleep(0.005)  # file times of one tick would be of one age


def test_what_is_put_is_there_until_it_is_dropped(make):
    blocks = make(3)
    put(blocks, 1)
    assert blocks.get(key(1)).to_pybytes() == block(1)
    assert blocks.touch(key(1))
    assert blocks.get(key(2)) is None
    assert not blocks.touch(key(2))
    blocks.drop(key(1))
    blocks.drop(key(1))
    assert blocks.get(key(1)) is None


def test_the_block_unused_for_longest_goes_first(make):
    blocks = make(3)
    for number in (1, 2, 3):
        put(blocks, number)
    blocks.get(key(1))
    put(blocks, 4)
    assert [number for number in range(6) if blocks.touch(key(number))] == [1, 3, 4]


def test_what_will_be_wanted_stays_however_long_it_was_not_used(make):
    blocks = make(3)
    for number in (1, 2):
        put(blocks, number)
    blocks.pin([key(1), key(2)])
    for number in range(3, 9):
        put(blocks, number)
    assert blocks.get(key(1)) is not None
    assert blocks.get(key(2)) is not None
    blocks.pin([])
    for number in range(9, 12):
        put(blocks, number)
    assert blocks.get(key(1)) is None


def test_a_block_in_hand_outlives_its_eviction(make):
    blocks = make(2)
    put(blocks, 1)
    held = blocks.get(key(1))
    for number in range(2, 9):
        put(blocks, number)
    assert blocks.get(key(1)) is None
    assert held.to_pybytes() == block(1)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "another"])
def test_a_damaged_block_is_a_miss(tmp_path, damage, caplog):
    blocks = DiskBlocks(tmp_path, 10**6)
    put(blocks, 1)
    put(blocks, 2)
    path, other = tmp_path / f"{key(1)}.block", tmp_path / f"{key(2)}.block"
    data = bytearray(path.read_bytes())
    data[7] ^= 4
    path.write_bytes({"flip": data, "cut": data[:-9], "empty": b"", "another": other.read_bytes()}[damage])
    assert blocks.get(key(1)) is None
    assert "damaged" in caplog.text or damage == "empty"
    assert blocks.get(key(2)).to_pybytes() == block(2)
    put(blocks, 1)
    assert blocks.get(key(1)).to_pybytes() == block(1)


def test_files_of_others_are_neither_counted_nor_deleted(tmp_path):
    (tmp_path / "precious.block").write_bytes(bytes(10**5))
    blocks = DiskBlocks(tmp_path, 3 * STORED + 200)
    for number in range(9):
        put(blocks, number)
    assert (tmp_path / "precious.block").stat().st_size == 10**5
    assert blocks.get(key(8)) is not None


def test_a_folder_that_cannot_be_used_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"remote\.block_dir: .*file/blocks' cannot be used"):
        DiskBlocks(tmp_path / "file" / "blocks", 1000)


def test_a_full_disk_costs_the_block_and_not_the_run(tmp_path, monkeypatch, caplog):
    blocks = DiskBlocks(tmp_path, 10**6)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert blocks.put(key(1), block(1)).to_pybytes() == block(1)
    assert blocks.put(key(2), block(2)).to_pybytes() == block(2)
    assert caplog.text.count("No space left") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_deleted_under_a_reader_is_made_again(tmp_path):
    blocks = DiskBlocks(tmp_path / "blocks", 3 * STORED + 200)
    for number in range(9):
        if number % 3 == 2:
            shutil.rmtree(tmp_path / "blocks")
        assert blocks.get(key(number)) is None
        put(blocks, number)
        assert blocks.get(key(number)).to_pybytes() == block(number)


WORKER = """
import os, signal, sys
import numpy as np
sys.path.insert(0, sys.argv[1])
from test_block_cache import block, key
from kdcache.store.files import fs
from kdcache.store.remote.block_cache import DiskBlocks
from pathlib import Path
folder, capacity, seed, deadly = Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
def reached(point):
    if point == deadly:
        os.kill(os.getpid(), signal.SIGKILL)
fs.reached = reached
blocks = DiskBlocks(folder, capacity)
hits = 0
for number in np.random.default_rng(seed).integers(0, 40, 400).tolist():
    found = blocks.get(key(number))
    hits += found is not None
    if found is None:
        found = blocks.put(key(number), block(number))
    assert found.to_pybytes() == block(number)
print(hits)
"""


def start(folder: Path, capacity: int, seed: int, deadly: str = "") -> subprocess.Popen:
    arguments = [str(Path(__file__).parent), str(folder), str(capacity), str(seed), deadly]
    return subprocess.Popen([sys.executable, "-c", WORKER, *arguments], stdout=subprocess.PIPE, text=True)


def test_several_processes_share_a_folder_within_its_bound_and_never_see_a_wrong_byte(tmp_path):
    capacity = 20 * STORED
    workers = [start(tmp_path, capacity, seed) for seed in (1, 2, 3)]
    hits = [int(worker.communicate()[0]) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0, 0]
    assert min(hits) > 0
    assert bytes_in(tmp_path) <= capacity
    assert bytes_in(tmp_path) > capacity // 2


@pytest.mark.parametrize("point", fs.BLOCK_FAULT_POINTS)
def test_a_killed_process_leaves_nothing_that_counts(tmp_path, point):
    capacity = 8 * STORED
    worker = start(tmp_path, capacity, 1, point)
    worker.communicate()
    assert worker.returncode == -signal.SIGKILL
    left = [path.name for path in tmp_path.iterdir() if fs.is_temp_name(path.name)]
    assert len(left) == (point == "block written")
    blocks = DiskBlocks(tmp_path, capacity)
    assert not [path for path in tmp_path.iterdir() if fs.is_temp_name(path.name)]
    for number in range(40):
        put(blocks, number)
        assert bytes_in(tmp_path) <= capacity


def test_threads_may_share_one(make):
    blocks, errors = make(5), []

    def work(seed: int) -> None:
        for number in np.random.default_rng(seed).integers(0, 12, 200).tolist():
            found = blocks.get(key(number)) or blocks.put(key(number), block(number))
            if found.to_pybytes() != block(number):
                errors.append(number)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
