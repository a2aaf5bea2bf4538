from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from student_families import FAMILIES, logits, tiny
from tiny_model import build_tiny_model
from transformers import AutoModelForCausalLM

from kdcache.config.cut import LayersConfig
from kdcache.config.load import convert_config
from kdcache.config.train import StudentConfig
from kdcache.errors import ConfigError
from kdcache.train.body import output_projection
from kdcache.train.init import build
from kdcache.train.init.build import kept_weights
from kdcache.train.init.cut import cut_student
from kdcache.train.init.from_teacher import cut_from_teacher
from kdcache.train.init.layers import Statistics, chosen_layers
from kdcache.train.init.proof import skipped
from kdcache.train.student import without_progress_bars

SUBSETS = [(1, 3), (0, 3), (2,)]


def never() -> Statistics:
    raise AssertionError("nothing has to be measured")


def spoken(influence: list[float], angles: Sequence[tuple[int, int, float]] = ()) -> Statistics:
    """Statistics of a teacher with this block influence, and these angles between depths; all others are wide."""
    between = np.full((len(influence) + 1, len(influence) + 1), 5.0)
    for start, end, angle in angles:
        between[start, end] = angle
    counts = {"num_sequences": np.array([2]), "num_positions": np.array([10])}
    return {"block_influence": np.array(influence), "angles": between, **counts}


def test_the_layers_of_least_block_influence_are_left_out() -> None:
    config = LayersConfig(drop=2)
    assert chosen_layers(config, 5, lambda: spoken([9.0, 1.0, 4.0, 1.0, 8.0])) == (0, 2, 4)
    assert chosen_layers(config, 5, lambda: spoken([1.0, 1.0, 1.0, 1.0, 8.0])) == (2, 3, 4), "of equals, the first"


def test_the_neighbours_over_which_states_turn_least_are_left_out() -> None:
    config = LayersConfig(drop=2, by="angular_distance")
    assert chosen_layers(config, 5, lambda: spoken([0.0] * 5, [(2, 4, 1.0), (1, 3, 2.0), (0, 1, 0.1)])) == (0, 1, 4)


@pytest.mark.parametrize(
    ("layers", "num_layers", "expected"),
    [
        ({"every": 2}, 12, (1, 3, 5, 7, 9, 11)),
        ({"every": 3}, 12, (2, 5, 8, 11)),
        ({"every": 2}, 5, (2, 4)),
        ({"every": 1}, 3, (0, 1, 2)),
        ({"count": 5}, 12, (1, 4, 6, 9, 11)),
        ({"count": 1}, 12, (11,)),
        ({"keep": (0, 5)}, 6, (0, 5)),
        ({"pattern": "distilbert"}, 12, (0, 2, 4, 7, 9, 11)),
        ({"pattern": "distilbert"}, 6, (0, 2, 5)),
    ],
)
def test_the_layers_that_are_kept(layers: dict[str, Any], num_layers: int, expected: tuple[int, ...]) -> None:
    assert chosen_layers(LayersConfig(**layers), num_layers, never) == expected


def test_all_layers_are_kept_where_nothing_is_said() -> None:
    assert chosen_layers(None, 3, never) == (0, 1, 2)


@pytest.mark.parametrize("count", range(1, 25))
def test_a_spread_has_that_many_layers_and_the_last(count: int) -> None:
    kept = chosen_layers(LayersConfig(count=count), 24, never)
    assert len(set(kept)) == count
    assert kept[-1] == 23


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"keep": (0, 4)}, r"student\.layers\.keep names layer 4, but the teacher has 4: 0 to 3"),
        ({"every": 5}, r"student\.layers\.every is 5, but the teacher has 4 layers"),
        ({"count": 5}, r"student\.layers\.count is 5, but the teacher has 4 layers"),
        ({"drop": 4}, r"student\.layers\.drop is 4, but the teacher has 4 layers and one has to stay"),
    ],
)
def test_layers_that_the_teacher_lacks_are_one_sentence(layers: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        chosen_layers(LayersConfig(**layers), 4, never)


def test_half_of_an_odd_number_of_layers_is_refused() -> None:
    with pytest.raises(ConfigError, match="halves an even number of layers, and the teacher has 5"):
        chosen_layers(LayersConfig(pattern="distilbert"), 5, never)


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ({"init": "from_teacher", "layers": {}}, "nothing is given; give exactly one of every, count, keep, pattern and drop"),
        ({"init": "from_teacher", "layers": {"every": 2, "count": 3}}, "every and count is given"),
        ({"init": "from_teacher", "layers": {"keep": [2, 1]}}, "each once and in ascending order"),
        ({"init": "pretrained", "layers": {"every": 2}}, "set init to 'from_teacher'"),
        ({"init": "from_teacher", "overrides": {"hidden_size": 8}}, "they need init 'random'"),
    ],
)
def test_contradictions_are_refused_before_anything_is_loaded(student: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        convert_config({"model": "teacher", **student}, StudentConfig)


@pytest.mark.parametrize("name", FAMILIES)
def test_all_layers_give_the_teachers_logits_bit_for_bit(name: str) -> None:
    teacher = tiny(name)
    assert torch.equal(logits(cut_student(teacher).student), logits(teacher))


@pytest.mark.parametrize("name", FAMILIES)
def test_some_layers_are_the_teacher_with_the_others_skipped(name: str) -> None:
    teacher = tiny(name)
    for kept in SUBSETS:
        student = cut_student(teacher, LayersConfig(keep=kept)).student
        with skipped(teacher, kept):
            expected = logits(teacher)
        assert torch.equal(logits(student), expected)
        assert not torch.equal(expected, logits(teacher))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_saved_student_loads_by_its_own_configuration(name: str, tmp_path: Path) -> None:
    student = cut_student(tiny(name), LayersConfig(keep=(0, 3))).student
    with without_progress_bars():
        student.save_pretrained(tmp_path)
        attention = student.config._attn_implementation
        again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation=attention)
    assert again.config.num_hidden_layers == 2
    assert torch.equal(logits(again), logits(student))


def test_weights_are_copies_equal_to_the_bit() -> None:
    teacher = tiny("qwen2")
    student = cut_student(teacher, LayersConfig(keep=(1, 3))).student
    expected = kept_weights(teacher, (1, 3))
    assert list(student.state_dict()) == list(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in student.state_dict().items())
    theirs = {tensor.data_ptr() for tensor in teacher.state_dict().values()}
    assert not theirs & {tensor.data_ptr() for tensor in student.state_dict().values()}
    assert output_projection(student).weight is student.get_input_embeddings().weight, "tied, as the teacher's are"


@pytest.mark.parametrize(
    ("name", "kept", "field", "expected"),
    [
        ("qwen2", (0, 3), "max_window_layers", 1),
        ("qwen2", (0, 3), "layer_types", ["full_attention", "sliding_attention"]),
        ("gemma3", (1, 3), "layer_types", ["full_attention", "full_attention"]),
        ("smollm3", (1, 2), "no_rope_layers", [0, 1]),
        ("qwen3_moe", (1, 3), "mlp_only_layers", [0]),
        ("deepseek_v3", (1, 2, 3), "first_k_dense_replace", 1),
        ("llama", (1, 3), "eos_token_id", [1, 0, 2, 3]),
    ],
)
def test_what_a_configuration_says_of_single_layers_follows(
    name: str, kept: tuple[int, ...], field: str, expected: Any
) -> None:
    teacher = tiny(name)
    if field == "eos_token_id":  # as long as the teacher is deep, and about tokens
        teacher.config.eos_token_id = expected
    assert getattr(cut_student(teacher, LayersConfig(keep=kept)).student.config, field) == expected


def test_layers_that_know_their_number_are_refused_in_one_sentence() -> None:
    teacher = tiny("gpt2", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(ConfigError, match="what they compute depends on their number"):
        cut_student(teacher, LayersConfig(keep=(1, 3)))


def test_a_window_longer_than_the_look_is_compared_too(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = tiny("qwen2", sliding_window=50)
    wrong = cut_student(teacher, LayersConfig(keep=(0, 1))).student.config
    monkeypatch.setattr(build, "config_with_layers", lambda config, kept: wrong)
    with pytest.raises(ConfigError, match=r"self_attn\.layer_type is 'sliding_attention' in the teacher"):
        cut_student(teacher, LayersConfig(keep=(2, 3)))


def test_a_student_of_a_config_is_float32_whatever_the_checkpoint(tmp_path: Path) -> None:
    folder = build_tiny_model(tmp_path)
    AutoModelForCausalLM.from_pretrained(folder).to(torch.bfloat16).save_pretrained(folder)
    config = convert_config({"model": str(folder), "init": "from_teacher", "layers": {"keep": [1]}}, StudentConfig)
    student = cut_from_teacher(config).student
    assert student.config.num_hidden_layers == 1
    assert next(student.parameters()).dtype == torch.float32
    assert next(cut_from_teacher(config, dtype="auto").student.parameters()).dtype == torch.bfloat16
