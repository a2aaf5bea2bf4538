"""Golden caches with features, made once by tools/make_golden.py, decode to the same numbers for ever."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kdcache.config.loader import LoaderConfig
from kdcache.format.manifest import FORMAT_VERSION
from kdcache.loader.loader import Loader
from kdcache.store.reader import open_reader
from kdcache.store.verify import verify_cache

ROOT = Path(__file__).parents[2]
GOLDEN = sorted((ROOT / "tests/golden/features").iterdir())

pytestmark = pytest.mark.parametrize("folder", GOLDEN, ids=lambda path: path.name)


def test_features_and_sidecars_are_what_they_always_were(folder):
    assert verify_cache(folder / "cache").problems == []
    expected = json.loads((folder / "expected.json").read_text())
    with open_reader(folder / "cache") as reader:
        features = reader.manifest.identity.features
        is_old = folder.name == "1.2"  # made by kdcache of that version
        assert {feature.kind for feature in features} == ({"hidden"} if is_old else {"hidden", "queries", "keys", "attention"})
        # Only an old cache's last layer may be before or after the norm: it does not tell.
        assert [feature.is_after_norm is None for feature in features] == [is_old and feature.layer > 0 for feature in features]
        for record, values in zip(reader, expected["records"], strict=True):
            assert set(record.distributions.features) == set(values)
            for name, found in record.distributions.features.items():
                np.testing.assert_allclose(found, np.reshape(values[name], found.shape), rtol=1e-6, atol=1e-7)
        assert {sidecar.name for sidecar in reader.manifest.sidecars} == set(expected["sidecars"])
        for name, arrays in expected["sidecars"].items():
            for key, found in reader.sidecar(name).items():
                np.testing.assert_array_equal(found, np.array(arrays[key], found.dtype))
        names = tuple(feature.name for feature in reader.manifest.identity.features)
        config = LoaderConfig(seq_len=9, batch_rows=3, packing="none", shuffle=False, num_threads=0, features=names)
        (batch,) = Loader(reader, config)
    assert batch.features is not None
    for name in names:
        whole = [np.reshape(values[name], (-1, batch.features[name].info.size)) for values in expected["records"]]
        np.testing.assert_allclose(batch.features[name].float32(), np.concatenate(whole), rtol=1e-6, atol=1e-7)


def test_no_golden_file_is_large(folder):
    assert max(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 40_000


def test_a_golden_cache_is_never_made_again(folder):
    if folder.name != ".".join(map(str, FORMAT_VERSION)):
        pytest.skip("of an older version")
    before = (folder / "expected.json").read_bytes()
    command = [sys.executable, str(ROOT / "tools/make_golden.py"), "features"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, (folder / "expected.json").read_bytes()) == (2, before)
    assert "never made again" in done.stderr
