"""Every codec under every kind of selection, from the command line to a student's batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kdcache.cli.main import main
from kdcache.config.loader import LoaderConfig
from kdcache.loader.loader import Loader
from kdcache.store.reader import open_reader

KINDS = {
    "top_k": ("k=5",),
    "top_p_k": ("k=7", "p=0.6"),
    "sampled": ("num_draws=9", "temperatures=[2.0]"),
    "threshold": ("tau=0.06", "entropy=true"),
    "top_k_sampled": ("k=2", "num_draws=300"),
}
CODECS = ("packed", "quantized", "archive")


def capture(folder: Path, codec: str, kind: str) -> Path:
    config = folder / "config.yaml"
    (folder / "text.txt").write_text("One line of text.\nAnd another one, a little longer than the first.\n")
    config.write_text(
        f"input: {{format: txt, paths: [{folder}/text.txt], window: {{size: 16}}}}\n"
        "teacher: {model: made-up, backend: fake, fake: {vocab_size: 300}}\n"
        f"out: {folder}/{codec}-{kind}\n"
    )
    settings = [f"codec.id={codec}", f"selection.kind={kind}", *(f"selection.{setting}" for setting in KINDS[kind])]
    assert main(["capture", str(config), *[part for setting in settings for part in ("--set", setting)]]) == 0
    return folder / f"{codec}-{kind}"


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_captured_is_verified_and_loaded_whatever_the_codec(tmp_path, kind, capsys):
    exact = capture(tmp_path, "raw", kind)
    for codec in CODECS:
        cache = capture(tmp_path, codec, kind)
        assert main(["verify", str(cache)]) == 0
        assert "sound (complete)" in capsys.readouterr().out
        with open_reader(cache) as reader, open_reader(exact) as definition:
            options = LoaderConfig(seq_len=16, batch_rows=2, num_threads=0)
            for found, expected in zip(Loader(reader, options), Loader(definition, options), strict=True):
                # archive puts entries that it makes equal in the order of their ids
                np.testing.assert_array_equal(np.sort(found.teacher.token_ids_PK), np.sort(expected.teacher.token_ids_PK))
                places = [np.argsort(batch.teacher.token_ids_PK, axis=-1) for batch in (found, expected)]
                logprobs = [
                    np.exp(np.take_along_axis(batch.teacher.logprobs_PK, order, -1))
                    for batch, order in zip((found, expected), places, strict=True)
                ]
                np.testing.assert_allclose(*logprobs, rtol=0.15, atol=1e-6)
                np.testing.assert_allclose(found.teacher.tail_mass_P, expected.teacher.tail_mass_P, rtol=0.15, atol=1e-6)
                for name in ("num_exact_P", "entropy_P", "log_z_PL"):
                    ours, theirs = getattr(found.teacher, name), getattr(expected.teacher, name)
                    assert (ours is None) == (theirs is None)
                    assert ours is None or np.allclose(ours, theirs, rtol=1e-3)
