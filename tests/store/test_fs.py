from __future__ import annotations

import errno
import os
import subprocess
import sys
import time

import pytest

from kdcache.errors import StorageError
from kdcache.store.files import fs


@pytest.fixture
def root(tmp_path):
    fs.make_directories(tmp_path / "cache")
    return tmp_path / "cache"


def names(root, directory="tmp"):
    return sorted(path.name for path in (root / directory).iterdir())


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_published_bytes_stand_under_their_name_and_nothing_else_does(root):
    fs.publish_bytes(root, b"one", "data/a")
    fs.publish_bytes(root, b"two", "data/a")
    assert (root / "data/a").read_bytes() == b"two"
    assert names(root) == []


def test_a_taken_name_is_left_as_it_is(root):
    assert fs.publish_new(root, b"one", "manifests/a")
    assert not fs.publish_new(root, b"two", "manifests/a")
    assert (root / "manifests/a").read_bytes() == b"one"
    assert names(root) == []


def test_a_file_system_without_hard_links_is_served_too(root, monkeypatch):
    def refuse(*args):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    assert fs.publish_new(root, b"one", "manifests/a")
    assert not fs.publish_new(root, b"two", "manifests/a")
    assert (root / "manifests/a").read_bytes() == b"one"
    assert names(root) == []


@pytest.mark.parametrize("publish", [fs.publish_bytes, fs.publish_new])
def test_a_full_disk_leaves_no_temp_file(root, monkeypatch, publish):
    def refuse(path):
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(fs, "sync_file", refuse)
    with pytest.raises(OSError, match="no space"):
        publish(root, b"one", "data/a")
    assert names(root) == names(root, "data") == []


def test_temp_names_are_all_different_and_known_as_ours(root):
    made = {fs.temp_path(root).name for _ in range(100)}
    assert len(made) == 100
    assert all(map(fs.is_temp_name, made))
    assert not any(map(fs.is_temp_name, ["notes.txt", "host-1-2", "a-b-c", "x-1-zzzzzzzz.1", ""]))


def test_a_dead_writers_temp_files_are_swept_and_a_living_ones_are_not(root):
    mine = fs.temp_path(root)
    host = mine.name.rsplit("-", 2)[0]
    dead, living = root / "tmp" / f"{host}-{dead_pid()}-0123abcd.0", root / "tmp" / f"{host}-{os.getppid()}-0123abcd.0"
    for path in (mine, dead, living, root / "tmp" / "notes.txt"):
        path.write_bytes(b"")
    assert fs.sweep_temp_files(root) == 1
    assert names(root) == sorted([mine.name, living.name, "notes.txt"])


def test_a_predecessor_with_our_own_pid_is_dead(root):
    # A restarted container gives its process the same host name and the same pid again.
    predecessor = root / "tmp" / fs.temp_path(root).name.replace(fs._process_token, "00000000")
    predecessor.write_bytes(b"")
    assert fs.sweep_temp_files(root) == 1


def test_what_a_predecessor_with_our_own_pid_left_linked_is_never_written_into(root):
    # Killed between link and unlink, its temp file IS the manifest; a temp name used again would truncate the manifest.
    fs.publish_new(root, b"manifest", "manifests/a")
    ours = fs.temp_path(root).name
    assert fs._process_token in ours
    for n in range(100):
        os.link(root / "manifests/a", root / "tmp" / f"{ours.rsplit('-', 1)[0]}-{n}")
    fs.publish_bytes(root, b"other", "data/b")
    fs.sweep_temp_files(root)
    assert (root / "manifests/a").read_bytes() == b"manifest"


def test_temp_files_of_another_machine_are_swept_only_when_long_untouched(root):
    fresh, old = root / "tmp/elsewhere.1-5-0123abcd.0", root / "tmp/elsewhere.1-6-0123abcd.0"
    for path in (fresh, old):
        path.write_bytes(b"")
    long_ago = time.time() - fs.ABANDONED_SECONDS - 60
    os.utime(old, (long_ago, long_ago))
    assert fs.sweep_temp_files(root) == 1
    assert names(root) == [fresh.name]


def test_directories_that_cannot_be_made_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"the cache's folders cannot be made under .*file"):
        fs.make_directories(tmp_path / "file" / "cache")
