import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from tiny_model import build_tiny_model

from kdcache.config.train import StudentConfig
from kdcache.errors import ConfigError, MismatchError
from kdcache.format.manifest import Identity
from kdcache.store.reader import open_reader
from kdcache.train.student import build_student, check_against_cache


@pytest.fixture(scope="module")
def identity(small_cache: Path) -> Identity:
    with open_reader(small_cache) as reader:
        return reader.manifest.identity


def _config(folder: Path, **settings: Any) -> StudentConfig:
    return StudentConfig(model=str(folder), **settings)


def test_the_seed_decides_the_weights(tiny_model_dir: Path) -> None:
    one, same, other = (build_student(_config(tiny_model_dir), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.get_input_embeddings().weight, same.get_input_embeddings().weight)
    assert not torch.equal(one.get_input_embeddings().weight, other.get_input_embeddings().weight)


def test_pretrained_starts_from_the_weights_of_the_folder(tiny_model_dir: Path) -> None:
    one, other = (build_student(_config(tiny_model_dir, init="pretrained"), seed=seed) for seed in (1, 2))
    assert torch.equal(one.get_input_embeddings().weight, other.get_input_embeddings().weight)


def test_overrides_change_the_shape_and_what_follows_from_it(tiny_model_dir: Path) -> None:
    config = build_student(_config(tiny_model_dir, overrides={"hidden_size": 32, "num_attention_heads": 4}), seed=0).config
    assert (config.hidden_size, config.num_attention_heads, config.head_dim) == (32, 4, 8)
    assert config.num_key_value_heads == 1, "the base said this itself, so it stays"


def test_a_head_size_that_the_base_states_on_purpose_stays(tiny_model_dir: Path, tmp_path: Path) -> None:
    fields = json.loads((tiny_model_dir / "config.json").read_text()) | {"head_dim": 20}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert build_student(_config(tmp_path, overrides={"hidden_size": 32}), seed=0).config.head_dim == 20


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"hiden_size": 32}, r"student\.overrides\.hiden_size: LlamaConfig has no such field; did you mean 'hidden_size'\?"),
        ({"hidden_size": 33}, r"student\.overrides: "),
        ({"hidden_size": "wide"}, r"student\.overrides: "),
        ({"hidden_act": "nonsense"}, r"student\.overrides: "),
    ],
)
def test_impossible_overrides_are_one_sentence(tiny_model_dir: Path, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_student(_config(tiny_model_dir, overrides=overrides), seed=0)


@pytest.mark.parametrize("init", ["random", "pretrained"])
def test_a_folder_that_holds_no_model_is_named(tmp_path: Path, init: Any) -> None:
    with pytest.raises(ConfigError, match=r"student\.model: no model"):
        build_student(_config(tmp_path, init=init), seed=0)
    with pytest.raises(ConfigError, match="missing-model"):
        build_student(_config(tmp_path / "missing-model", init=init), seed=0)


def test_the_teachers_own_tokenizer_and_vocabulary_fit(tiny_model_dir: Path, identity: Identity) -> None:
    config = _config(tiny_model_dir)
    check_against_cache(build_student(config, seed=0), config, identity, longest_sequence=256)


def test_another_tokenizer_is_refused_with_both_sides_unless_accepted(tiny_model_dir: Path, identity: Identity) -> None:
    config = _config(tiny_model_dir)
    theirs = msgspec.structs.replace(identity.tokenizer, fingerprint="f" * 64, name="another")
    other = msgspec.structs.replace(identity, tokenizer=theirs)
    model = build_student(config, seed=0)
    with pytest.raises(MismatchError, match=rf"{identity.tokenizer.fingerprint[:12]}.*'another' \(ffffffffffff, 512 ids\)"):
        check_against_cache(model, config, other, longest_sequence=10)
    check_against_cache(model, config, other, longest_sequence=10, accept=("tokenizer",))


def test_a_tokenizer_with_one_more_token_is_another(tiny_model_dir: Path, identity: Identity, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    build_tiny_model(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_tokens(["surprise"])
    tokenizer.save_pretrained(tmp_path)
    config = _config(tiny_model_dir, tokenizer=str(tmp_path))
    with pytest.raises(MismatchError, match=r"513 ids\) is not the one that made the cache"):
        check_against_cache(build_student(config, seed=0), config, identity, longest_sequence=10)


def test_a_vocabulary_too_small_for_the_teachers_ids_is_refused(tiny_model_dir: Path, identity: Identity) -> None:
    config = _config(tiny_model_dir, overrides={"vocab_size": 511})
    with pytest.raises(MismatchError, match=r"vocabulary of 511 .* 512 token ids .* student\.overrides\.vocab_size to 520"):
        check_against_cache(build_student(config, seed=0), config, identity, longest_sequence=10)


def test_a_context_too_short_for_the_caches_sequences_is_refused(tiny_model_dir: Path, identity: Identity) -> None:
    config = _config(tiny_model_dir, overrides={"max_position_embeddings": 20})
    with pytest.raises(MismatchError, match="max_position_embeddings is 20, but the cache's longest sequence has 21"):
        check_against_cache(build_student(config, seed=0), config, identity, longest_sequence=21)
