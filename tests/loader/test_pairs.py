"""Both answers to a prompt come in one batch, from the input's own words on: order, resume, ranks, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kdcache
from kdcache.capture.executors.run import run_capture
from kdcache.cli.main import main
from kdcache.config.capture import CaptureConfig
from kdcache.config.load import convert_config
from kdcache.config.loader import LoaderConfig, MixConfig
from kdcache.errors import ConfigError, CorruptCacheError, InputError, StateError
from kdcache.format.record import NO_TARGET
from kdcache.loader.loader import Loader
from kdcache.loader.order.pairs import find_bundles, find_bundles_reference
from kdcache.store.verify import verify_cache

CONFIG = LoaderConfig(seq_len=48, batch_rows=2, pairs=True, with_target_logprobs=True, num_threads=0)


def write_lines(path: Path, num_prompts: int = 12) -> Path:
    """Prompts with a chosen and a rejected answer, in no order; one without its second, and texts of no group."""
    lines = []
    for n in range(num_prompts):
        lines.append({"text": f"prompt {n}: yes{'!' * (n % 5)}", "prompt": n, "answer": "chosen"})
        lines.append({"text": f"prompt {n}: no, {'la' * (n % 7)}", "prompt": n, "answer": "rejected"})
    lines += [{"text": "alone", "prompt": "x", "answer": "chosen"}, {"text": "no group", "prompt": None, "answer": None}]
    order = np.random.default_rng(0).permutation(len(lines))
    path.write_text("".join(json.dumps(lines[i]) + "\n" for i in order))
    return path


def capture(folder: Path, num_prompts: int = 12, out: str | None = None, **changes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    marks = {"group_field": "prompt", "preference_field": "answer"}
    paths = [str(write_lines(folder / "a.jsonl", num_prompts))]
    fields = {
        "input": {"format": "jsonl", "paths": paths, "window": {"size": 24, "policy": "truncate"}} | marks | changes,
        "teacher": {"model": "fake", "backend": "fake", "fake": {"vocab_size": 300, "context_length": 24}},
        "selection": {"k": 60}, "codec": {"id": "raw"}, "out": out or str(folder / "cache"), "shards": {"unit_items": 5},
        "run": {"progress_path": str(folder / "progress.json")},
    }  # fmt: skip
    run_capture(convert_config(fields, CaptureConfig))
    return folder / "cache"


@pytest.fixture(scope="module")
def cache_of_pairs(tmp_path_factory) -> Path:
    return capture(tmp_path_factory.mktemp("pairs"))


def epoch_of(loader) -> list:
    return list(loader)


def names_of(cache, batch) -> list[tuple[bytes, str]]:
    """Group and preference of each of the batch's sequences."""
    sequences = [cache[int(i)].sequence for i in batch.sequence_indices_S]
    return [(sequence.group, sequence.preference) for sequence in sequences]


@given(
    st.lists(st.tuples(st.sampled_from([bytes(16), b"a" * 16, b"b" * 16, b"b" * 15 + b"\0"]), st.integers(0, 2)), max_size=30)
)
def test_items_are_those_of_the_definition(sequences):
    groups = np.frombuffer(b"".join(group for group, _ in sequences), np.uint8).reshape(-1, 16)
    bundles = find_bundles(groups, np.array([code for _, code in sequences], np.uint8))
    expected = find_bundles_reference([group for group, _ in sequences], [code for _, code in sequences])
    assert list(zip(bundles.firsts.tolist(), bundles.seconds.tolist(), strict=True)) == expected
    assert sorted(bundles.sequences(np.arange(len(bundles))).tolist()) == list(range(len(sequences)))


def test_both_answers_come_together_and_every_sequence_once(cache_of_pairs):
    assert verify_cache(cache_of_pairs).problems == []
    with kdcache.open(cache_of_pairs) as cache, Loader(cache, CONFIG) as loader:
        batches = epoch_of(loader)
        seen = np.concatenate([batch.sequence_indices_S for batch in batches])
        assert sorted(seen.tolist()) == list(range(26))
        assert loader.report().num_sequences == 26
        assert sum(len(batch.pairs) for batch in batches) == 12
        for batch in batches:
            names = names_of(cache, batch)
            for chosen, rejected in batch.pairs.tolist():
                assert names[chosen][0] == names[rejected][0] != b""
                assert (names[chosen][1], names[rejected][1]) == ("chosen", "rejected")
            paired = {index for pair in batch.pairs.tolist() for index in pair}
            alone = [names[index] for index in range(len(names)) if index not in paired]
            assert all(group == b"" or preference == "chosen" for group, preference in alone)


def test_target_logprobs_are_the_teachers_own(cache_of_pairs):
    """As the record says them, whether the target is an entry or not."""
    with kdcache.open(cache_of_pairs) as cache, Loader(cache, CONFIG) as loader:
        batch = next(iter(loader))
        records = [cache[int(i)] for i in batch.sequence_indices_S]
        expected = np.concatenate([r.distributions.target_logprobs(r.sequence.target_ids_P) for r in records])
        np.testing.assert_array_equal(batch.teacher.target_logprobs_P, expected)
        assert (np.isnan(expected) == (batch.target_ids_P == NO_TARGET)).all()
        inside_P = (batch.teacher.token_ids_PK == batch.target_ids_P[:, None]).any(axis=1)
        assert 0 < inside_P.sum() < np.isfinite(expected).sum()


def test_resumed_from_every_step_with_other_ranks_and_threads(cache_of_pairs):
    config = msgspec.structs.replace(CONFIG, num_threads=2)
    with Loader(cache_of_pairs, config) as loader:
        whole = [(batch.sequence_indices_S.tolist(), batch.pairs.tolist()) for batch in loader]
        whole += [(batch.sequence_indices_S.tolist(), batch.pairs.tolist()) for batch in loader]
        assert whole[: len(whole) // 2] != whole[len(whole) // 2 :]
    states = []
    with Loader(cache_of_pairs, CONFIG) as loader:
        for _ in range(2):
            states += [loader.state_dict() for _ in loader]
    for step, state in enumerate(states[:-1]):
        shares = []
        for rank in range(2):
            with Loader(cache_of_pairs, config, rank=rank, world_size=2) as loader:
                loader.load_state_dict(state)
                shares.append(next(iter(loader)))
        together = [index for share in shares for index in share.sequence_indices_S.tolist()]
        assert together == whole[step + 1][0]
        assert sum(len(share.pairs) for share in shares) == len(whole[step + 1][1])


def test_without_a_shuffle_items_come_in_the_order_of_the_cache(cache_of_pairs):
    with Loader(cache_of_pairs, msgspec.structs.replace(CONFIG, shuffle=False, packing_buffer=1)) as loader:
        read = np.concatenate([batch.sequence_indices_S for batch in loader])
    with kdcache.open(cache_of_pairs) as cache:
        bundles = find_bundles(*cache.groups_S)
    assert read.tolist() == bundles.sequences(np.arange(len(bundles))).tolist()


@pytest.mark.parametrize("order", ["global", "local"])
def test_several_caches_and_selections(cache_of_pairs, tmp_path, order):
    other = capture(tmp_path, num_prompts=5)
    config = msgspec.structs.replace(CONFIG, order=order, local_shards=2, mix=MixConfig(weights=(2.0, 1.0)))
    with kdcache.open(cache_of_pairs) as cache, kdcache.open(other) as second:
        some = cache.select(np.arange(3, 26))
        with Loader([some, second], config) as loader:
            batches = epoch_of(loader)
            assert loader.counts().num_sequences >= sum(2 * len(batch.pairs) for batch in batches)
            assert sum(len(batch.pairs) for batch in batches) > 5
            for batch in batches:
                names = [
                    (some[i] if i < len(some) else second[i - len(some)]).sequence for i in batch.sequence_indices_S.tolist()
                ]
                assert all(names[c].group == names[r].group for c, r in batch.pairs.tolist())


def test_old_states_can_be_resumed_and_other_streams_not(cache_of_pairs):
    plain = msgspec.structs.replace(CONFIG, pairs=False)
    with Loader(cache_of_pairs, plain) as loader:
        next(iter(loader))
        state = loader.state_dict()
    assert "pairs" not in state["config"]
    with Loader(cache_of_pairs, CONFIG) as loader, pytest.raises(StateError, match="pairs None, here True"):
        loader.load_state_dict(state)


def test_what_is_refused(cache_of_pairs, tmp_path):
    plain = capture(tmp_path / "plain", group_field=None, preference_field=None)
    with pytest.raises(ConfigError, match="does not say which answers belong to one prompt; capture it again"):
        Loader(plain, CONFIG)
    with kdcache.open(cache_of_pairs) as cache, pytest.raises(ConfigError, match="no two are the chosen and the rejected"):
        Loader(cache.filter(lambda _: cache.groups_S[1] == 1), CONFIG)
    with pytest.raises(ConfigError, match=r"seq_len is 24, but .* pairs and single sequences .* raise seq_len to"):
        Loader(cache_of_pairs, msgspec.structs.replace(CONFIG, seq_len=24))
    with pytest.raises(ConfigError, match="pairs needs packing 'first_fit'"):
        LoaderConfig(pairs=True, packing="none")
    with pytest.raises(ConfigError, match="group_field and preference_field belong together"):
        capture(tmp_path / "half", preference_field=None)
    with pytest.raises(ConfigError, match="an answer must be one sequence"):
        capture(tmp_path / "split", window={"size": 24})
    with pytest.raises(InputError, match=r"'text' is 'prompt .* but a preference is 'chosen', 'rejected' or null"):
        capture(tmp_path / "wrong", preference_field="text")
    (tmp_path / "b.jsonl").write_text('{"text": "a", "prompt": null, "answer": "chosen"}\n')
    with pytest.raises(InputError, match=r"but the item has no group \(see input.group_field\)"):
        capture(tmp_path / "groupless", paths=[str(tmp_path / "b.jsonl")])


def test_damage_to_a_preference_is_found(cache_of_pairs, tmp_path):
    import shutil

    shutil.copytree(cache_of_pairs, tmp_path / "cache")
    with kdcache.open(tmp_path / "cache") as cache:
        shard = tmp_path / "cache" / cache.manifest.shards[0].name
        group = next(cache[i].sequence.group for i in range(len(cache)) if cache[i].sequence.group)
    data = shard.read_bytes()
    shard.write_bytes(data.replace(group, bytes(15) + b"x"))
    with kdcache.open(tmp_path / "cache") as cache, pytest.raises(CorruptCacheError, match="digest"):
        [cache[i] for i in range(len(cache))]


def test_groups_survive_an_object_store_and_a_derivation(cache_of_pairs, tmp_path):
    afar = "memory://pairs-of-answers/cache"
    capture(tmp_path, out=afar)
    assert verify_cache(afar).problems == []
    plain = capture(tmp_path / "plain", num_prompts=3, group_field=None, preference_field=None)
    assert main(["derive", str(cache_of_pairs), str(plain), "--out", str(tmp_path / "both")]) == 0
    for address, num_pairs in ((afar, 12), (str(tmp_path / "both"), 12)):
        with Loader(address, CONFIG) as loader:
            assert sum(len(batch.pairs) for batch in loader) == num_pairs
