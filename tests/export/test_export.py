"""A cache's hidden states in the hands of trainers of drafters: their own readers take every sequence, tensor by tensor."""

from __future__ import annotations

import argparse
import json
import pickle
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from cache_making import make_identity, make_manifest, make_record

from kdcache.cli.main import main
from kdcache.errors import ConfigError
from kdcache.export.states import choose_features, drafter_states, loss_mask
from kdcache.format.identity import FeatureInfo
from kdcache.loader.cache import Cache, open_cache
from kdcache.store.writing.writer import CacheWriter

torch = pytest.importorskip("torch")
pytest.importorskip("datasets")

from safetensors.torch import load_file  # noqa: E402

from kdcache.export.torch_files import export_specforge, export_speculators  # noqa: E402

H, NUM_LAYERS, NUM_SEQUENCES = 8, 6, 5
LAYERS = (2, 3, 6, -1)


def feature(layer: int, **changes: object) -> FeatureInfo:
    fields: dict[str, object] = {"dtype": "bfloat16", "positions": "all", "num_layers": NUM_LAYERS} | changes
    return FeatureInfo(name=f"hidden_{'last' if layer == -1 else layer}", layer=layer, size=H, **fields)  # pyright: ignore[reportArgumentType]


def values(seed: int, layer: int, num_tokens: int) -> np.ndarray:
    """Numbers that bfloat16 holds exactly, different for every sequence, layer and token."""
    drawn = np.random.default_rng((seed, layer + 1)).integers(-128, 129, (num_tokens, H))
    return (drawn / 16).astype(np.float32)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_states_cache(tmp_path_factory.mktemp("states") / "cache", [feature(layer) for layer in LAYERS])


def make_states_cache(folder: Path, features: list[FeatureInfo]) -> Path:
    identity = msgspec.structs.replace(make_identity("packed"), features=tuple(features))
    writer = CacheWriter.open(folder, make_manifest(1, identity))
    records = []
    for seed in range(NUM_SEQUENCES):
        record = make_record(seed, num_tokens=7 + 3 * seed, is_chat=True, supervised="holes" if seed % 2 else "all")
        num_tokens = record.sequence.num_tokens
        made = {f.name: values(seed, f.layer, num_tokens) for f in features}
        records.append(replace(record, distributions=replace(record.distributions, features=made)))
    writer.write_unit(0, records)
    writer.fold()
    return folder


@pytest.fixture
def cache(path: Path) -> Cache:
    return open_cache(path)


def expected_states(seed: int, num_tokens: int, layers: tuple[int, ...]) -> torch.Tensor:
    return torch.stack([torch.from_numpy(values(seed, layer, num_tokens)) for layer in layers], dim=1).bfloat16()


def test_the_mask_is_of_the_tokens_that_are_predicted(cache: Cache) -> None:
    sequence = cache[1].sequence
    mask_N = loss_mask(sequence)
    assert not mask_N[0]
    assert np.flatnonzero(mask_N).tolist() == [t + 1 for t in sequence.positions_P if t + 1 < sequence.num_tokens]


def test_inner_layers_are_chosen_by_layer_or_by_name(cache: Cache) -> None:
    assert choose_features(cache, [], last="before_norm").names == ["hidden_2", "hidden_3", "hidden_6"]
    assert choose_features(cache, [], last="after_norm").names == ["hidden_2", "hidden_3", "hidden_last"]
    assert choose_features(cache, ["hidden_3", "hidden_2"], last=None).names == ["hidden_3", "hidden_2"]


@pytest.mark.parametrize(
    ("features", "last", "message"),
    [
        (
            [feature(2, positions="supervised"), feature(6)],
            "before_norm",
            "keeps no hidden states of inner layers at all tokens",
        ),
        ([feature(2), feature(-1)], "before_norm", "no last state before the final norm at all tokens"),
        ([feature(2), feature(6)], "after_norm", "no last state after the final norm at all tokens"),
    ],
)
def test_a_cache_without_the_states_is_refused_in_one_sentence(
    tmp_path: Path, features: list[FeatureInfo], last: str, message: str
) -> None:
    identity = msgspec.structs.replace(make_identity("packed"), features=tuple(features))
    CacheWriter.open(tmp_path / "cache", make_manifest(0, identity)).fold()
    with pytest.raises(ConfigError, match=message):
        choose_features(open_cache(tmp_path / "cache"), [], last=last)


def test_a_feature_that_leaves_tokens_out_is_refused_by_name(tmp_path: Path) -> None:
    identity = msgspec.structs.replace(make_identity("packed"), features=(feature(2, stride=2), feature(6)))
    CacheWriter.open(tmp_path / "cache", make_manifest(0, identity)).fold()
    with pytest.raises(ConfigError, match="'hidden_2' leaves positions out"):
        choose_features(open_cache(tmp_path / "cache"), ["hidden_2"], last=None)
    with pytest.raises(ConfigError, match="no feature 'hidden_9'; it has hidden_2, hidden_6"):
        choose_features(open_cache(tmp_path / "cache"), ["hidden_9"], last=None)


def test_files_hold_the_states_of_every_token(path: Path, cache: Cache, tmp_path: Path) -> None:
    export_speculators(cache, str(path), tmp_path / "data")
    for seed in range(NUM_SEQUENCES):
        tensors = load_file(tmp_path / "data" / "hidden_states" / f"hs_{seed}.safetensors")
        ids_N = cache[seed].sequence.input_ids_N
        assert tensors["token_ids"].tolist() == ids_N.tolist()
        assert torch.equal(tensors["hidden_states"], expected_states(seed, len(ids_N), (2, 3, 6)))


def test_a_stopped_export_goes_on_and_another_one_is_refused(path: Path, cache: Cache, tmp_path: Path) -> None:
    out = tmp_path / "data"
    export_specforge(cache, str(path), out, algorithm="eagle3")
    kept, lost = out / "0.ckpt", out / "3.ckpt"
    before, content = kept.stat().st_mtime_ns, torch.load(lost)
    lost.unlink()
    export_specforge(cache, str(path), out, algorithm="eagle3")
    assert kept.stat().st_mtime_ns == before
    assert all(torch.equal(content[name], tensor) for name, tensor in torch.load(lost).items())
    with pytest.raises(ConfigError, match=r"another export \(format 'specforge-eagle3' and not 'specforge-dflash'"):
        export_specforge(cache, str(path), out, algorithm="dflash")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty and no export of kdcache"):
        export_specforge(cache, str(path), tmp_path / "other", algorithm="eagle3")


def test_a_killed_export_begins_again_and_a_damaged_one_is_said(path: Path, cache: Cache, tmp_path: Path) -> None:
    out = tmp_path / "data"
    out.mkdir()
    (out / ".kdcache-export.json.12.partial").write_text("{")
    export_specforge(cache, str(path), out, algorithm="eagle3")
    (out / "kdcache-export.json").write_text('{"cache": ')
    with pytest.raises(ConfigError, match="is damaged"):
        export_specforge(cache, str(path), out, algorithm="eagle3")


def test_the_command_says_what_it_wrote(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "specforge", str(path), "--out", str(tmp_path / "data"), "--algorithm", "dspark"]) == 0
    out = capsys.readouterr().out
    assert "5 sequences, 65 tokens" in out
    assert "hidden_2 (layer 2), hidden_3 (layer 3)\n" in out
    assert "hidden_last" in out
    assert main(["export", "specforge", str(path), "--out", str(tmp_path / "more"), "--tokens-only"]) == 2
    assert "--tokens-only is for speculators" in capsys.readouterr().err


class TestSpeculators:
    """The package itself reads what we write."""

    @pytest.fixture(autouse=True)
    def package(self) -> None:
        pytest.importorskip("speculators.train.data")

    @pytest.mark.parametrize("with_states", [True, False], ids=["files", "shards"])
    def test_its_reader_takes_every_sequence(self, path: Path, cache: Cache, tmp_path: Path, with_states: bool) -> None:
        from speculators.train.data import ArrowDataset

        out = tmp_path / "data"
        export_speculators(cache, str(path), out, with_states=with_states)
        transfer = None if with_states else self.transfer(out)
        data = ArrowDataset(max_len=64, datapath=out, transfer=transfer, on_missing="raise")
        assert len(data) == NUM_SEQUENCES
        assert data.approx_lengths == cache.num_tokens_S.tolist()
        for seed in range(NUM_SEQUENCES):
            item, sequence = data[seed], cache[seed].sequence
            states = expected_states(seed, sequence.num_tokens, (2, 3, 6))
            assert item["input_ids"].tolist() == sequence.input_ids_N.tolist()
            assert item["loss_mask"].tolist() == loss_mask(sequence).astype(int).tolist()
            assert torch.equal(item["hidden_states"], states[:, :2].flatten(1))
            assert torch.equal(item["verifier_last_hidden_states"], states[:, 2])

    def test_what_it_checks_of_its_own_files_holds_for_ours(self, path: Path, cache: Cache, tmp_path: Path) -> None:
        from speculators.data_generation.offline import check_hidden_states, find_corrupt_hidden_state_indices

        export_speculators(cache, str(path), tmp_path / "data")
        folder = tmp_path / "data" / "hidden_states"
        assert find_corrupt_hidden_state_indices(folder, list(range(NUM_SEQUENCES))) == {}
        for seed in range(NUM_SEQUENCES):
            check_hidden_states(load_file(folder / f"hs_{seed}.safetensors"), cache[seed].sequence.input_ids_N.tolist())

    def test_the_backend_is_registered_and_goes_into_worker_processes(self, path: Path, cache: Cache, tmp_path: Path) -> None:
        out = tmp_path / "data"
        export_speculators(cache, str(path), out, with_states=False)
        transfer = pickle.loads(pickle.dumps(self.transfer(out)))
        assert torch.equal(transfer.get_cached(2)["hidden_states"], expected_states(2, cache[2].sequence.num_tokens, (2, 3, 6)))
        assert transfer.get_cached(NUM_SEQUENCES) is None
        with pytest.raises(ConfigError, match="generates nothing"):
            transfer.get_generated({})

    def test_a_folder_of_another_snapshot_is_refused(self, path: Path, cache: Cache, tmp_path: Path) -> None:
        out = tmp_path / "data"
        export_speculators(cache, str(path), out, with_states=False)
        made = json.loads((out / "kdcache-export.json").read_text())
        (out / "kdcache-export.json").write_text(json.dumps(made | {"snapshot": "0" * 64}))
        with pytest.raises(ConfigError, match="another snapshot"):
            self.transfer(out)
        with pytest.raises(ConfigError, match=r"has no kdcache-export\.json"):
            self.transfer(tmp_path)

    @pytest.mark.slow
    def test_its_trainer_knows_the_backend(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        from kdcache.export.speculators_training import main as train

        monkeypatch.setattr("sys.argv", ["train", "--help"])
        with pytest.raises(SystemExit, match="0"):
            train()
        out = capsys.readouterr().out
        assert "--kdcache-cache" in out
        assert "kdcache" in out.partition("--hidden-states-backend {")[2].partition("}")[0]

    def transfer(self, out: Path):
        from hs_connectors import HiddenStatesBackend

        import kdcache.export.speculators_backend  # noqa: F401

        backend = HiddenStatesBackend.registry["kdcache"]
        parser = argparse.ArgumentParser()
        backend.add_train_args(parser)
        return backend.from_train_args(parser.parse_args([]), str(out))


class TestSpecForge:
    """The package itself reads what we write."""

    @pytest.fixture(autouse=True)
    def package(self) -> None:
        pytest.importorskip("specforge.algorithms.eagle3.data")

    def test_eagle3(self, path: Path, cache: Cache, tmp_path: Path) -> None:
        from specforge.algorithms.eagle3.data import build_offline_reader, normalize_offline_sample
        from specforge.runtime.data_plane.feature_store import load_feature_file

        export_specforge(cache, str(path), tmp_path / "data", algorithm="eagle3")
        refs = build_offline_reader(str(tmp_path / "data"), run_id="r", ttt_length=7, max_len=64).read()
        assert len(refs) == NUM_SEQUENCES
        for seed, ref in enumerate(refs):
            item = normalize_offline_sample(load_feature_file(ref.feature_store_uri.removeprefix("file://")), 64)
            sequence = cache[seed].sequence
            states = expected_states(seed, sequence.num_tokens, (2, 3, -1))
            assert item["input_ids"][0].tolist() == sequence.input_ids_N.tolist()
            assert torch.equal(item["hidden_state"][0], states[:, :2].flatten(1))
            assert torch.equal(item["target"][0], states[:, 2])

    @pytest.mark.parametrize("algorithm", ["dflash", "dspark"])
    def test_the_dflash_family(self, path: Path, cache: Cache, tmp_path: Path, algorithm: str) -> None:
        from specforge.algorithms.common import dflash_family_data as family
        from specforge.runtime.data_plane.feature_store import load_feature_file

        names = ["hidden_2", "hidden_3"]
        export_specforge(cache, str(path), tmp_path / "data", algorithm=algorithm, features=names)  # pyright: ignore[reportArgumentType]
        make = family.build_dspark_offline_normalizer if algorithm == "dspark" else family.build_offline_normalizer
        for seed in range(NUM_SEQUENCES):
            item = make(64)(load_feature_file(str(tmp_path / "data" / f"{seed}.ckpt")))
            num_tokens = cache[seed].sequence.num_tokens
            assert torch.equal(item["hidden_states"][0], expected_states(seed, num_tokens, (2, 3)).flatten(1))
            if algorithm == "dspark":
                assert torch.equal(item["target_last_hidden_states"][0], expected_states(seed, num_tokens, (-1,))[:, 0])


def test_states_are_read_without_the_packages_of_trainers(cache: Cache) -> None:
    chosen = choose_features(cache, [], last="after_norm")
    states = drafter_states(cache, 4, chosen.all)
    assert [found.tolist() for found in states.hidden] == [values(4, layer, 19).tolist() for layer in (2, 3, -1)]
