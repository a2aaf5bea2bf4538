"""The commands of SECURITY.md that sign a cache and check the signature, run as they stand there."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import hostile
import pytest
from cache_making import make_cache, make_record

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"```sh\n(.*?)```", (ROOT / ".github/SECURITY.md").read_text(), re.DOTALL)
SIGN, ALLOW, CHECK = BLOCKS[1:]

pytestmark = pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="needs OpenSSH")


def run(script: str, folder: Path) -> int:
    """The exit status of a block, with the command of this checkout."""
    prelude = f'kdcache() {{ PYTHONPATH={ROOT} {sys.executable} -m kdcache "$@"; }}\n'
    return subprocess.run(["bash", "-c", prelude + script], cwd=folder, capture_output=True, check=False).returncode


@pytest.fixture
def signed(tmp_path: Path) -> Path:
    make_cache(tmp_path / "cache", units=[[make_record(1), make_record(2)]])
    assert run('ssh-keygen -q -t ed25519 -N "" -f key', tmp_path) == 0
    assert run(SIGN, tmp_path) == 0
    assert run(ALLOW, tmp_path) == 0
    return tmp_path


def test_a_signed_cache_is_accepted_and_a_changed_one_is_not(signed: Path):
    cache = signed / "cache"
    assert run(CHECK, signed) == 0
    shutil.copytree(cache, signed / "kept")
    hostile.flip_a_stored_value(cache)
    assert run(CHECK, signed) == 1  # the signature holds, the shard is not the one that was signed
    shutil.rmtree(cache)
    shutil.copytree(signed / "kept", cache)
    hostile.edit_manifest(cache, lambda fields: fields["versions"].update(kdcache="9"))
    assert run(CHECK, signed) != 0  # all digests right, by somebody without the key
    shutil.rmtree(cache)
    (signed / "kept").rename(cache)
    newest = hostile.manifest_path(cache)
    (newest.parent / "000002.json").write_bytes(newest.read_bytes())
    assert run(CHECK, signed) != 0  # a later manifest, which nobody signed
