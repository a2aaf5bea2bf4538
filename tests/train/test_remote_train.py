"""Training from an S3 server: step by step the run that reads the same cache from a disk."""

from __future__ import annotations

from pathlib import Path

import pytest
from fault_proxy import FaultProxy
from train_caches import train_config

from kdcache.config.remote import RemoteConfig
from kdcache.errors import ConfigError
from kdcache.store.files.location import RemotePath
from kdcache.train.runs.run_folder import read_metrics
from kdcache.train.trainer import train


def test_a_run_reads_its_cache_from_a_store_and_may_go_on_from_a_disk(
    s3: FaultProxy, small_cache: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    uri = f"s3://{s3.bucket}/cache"
    for path in small_cache.rglob("*.*"):
        if path.is_file():
            RemotePath(f"{uri}/{path.relative_to(small_cache).as_posix()}", RemoteConfig()).write_bytes(path.read_bytes())

    def losses(cache: str, out: str, **changes) -> list[float]:
        train(train_config(cache, tiny_model_dir, tmp_path / out, **changes), show_progress=False)  # type: ignore[arg-type]
        return [line["loss"] for line in read_metrics(tmp_path / out) if "loss" in line]

    expected = losses(str(small_cache), "local")
    s3.choose = lambda request: "unavailable" if request.number % 5 == 0 else None
    blocks = {"block_dir": str(tmp_path / "blocks"), "block_bytes": 2**24}
    assert losses(uri, "remote", remote=blocks) == expected
    assert s3.faults
    assert losses(str(small_cache), "remote") == expected  # where the cache is, is not part of what a run is
    with pytest.raises(ConfigError, match=r"set remote\.block_bytes to"):
        losses(uri, "refused", remote={"block_dir": str(tmp_path / "small"), "block_bytes": 1000})
