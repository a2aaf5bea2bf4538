"""Width: which channels, neurons and heads stay, and that the weights that stay are theirs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from student_families import FAMILIES, ids, logits, tiny
from transformers import AutoModelForCausalLM, PreTrainedModel

from kdcache.config.cut import LayersConfig, WidthConfig
from kdcache.errors import ConfigError
from kdcache.teacher.hf.axes import axes_of
from kdcache.train.init import narrow
from kdcache.train.init.cut import Cut, cut_student
from kdcache.train.init.measure import measured
from kdcache.train.init.narrow import proven_orders
from kdcache.train.init.width import Kept
from kdcache.train.student import without_progress_bars

TIED = {"gpt2", "phi", "gpt_neox", "falcon"}
"""Families whose heads are, together, always as wide as the hidden states."""

EXPERTS = {"gpt_oss"}


def cut(teacher: PreTrainedModel, layers: LayersConfig | None = None, **width: Any) -> Cut:
    return cut_student(teacher, layers, WidthConfig(**width), lambda: measured(teacher, [row.numpy() for row in ids(teacher)]))


def masked(model: Any, modules: list[Any], kept: list[np.ndarray]) -> torch.Tensor:
    """The model's logits with all else that these projections read set to 0."""
    handles = []
    for module, indices in zip(modules, kept, strict=True):
        width = module.weight.shape[0] if type(module).__name__ == "Conv1D" else module.weight.shape[1]
        mask = torch.zeros(width)
        mask[torch.from_numpy(indices)] = 1
        handles.append(module.register_forward_pre_hook(lambda m, args, mask=mask: (args[0] * mask,)))
    found = logits(model)
    for handle in handles:
        handle.remove()
    return found


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return float((found - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


def projections(model: Any, name: str) -> list[Any]:
    return [module for path, module in model.named_modules() if path.endswith(name)]


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - TIED - EXPERTS))
def test_full_width_is_the_teacher_bit_for_bit(name: str) -> None:
    teacher = tiny(name)
    groups = axes_of(teacher).key_value_heads
    student = cut(teacher, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=groups).student
    assert torch.equal(logits(student), logits(teacher))
    theirs = teacher.state_dict()
    assert all(torch.equal(weight, theirs[key]) for key, weight in student.state_dict().items())


@pytest.mark.parametrize(
    ("name", "projection"),
    [
        ("llama_tied", "down_proj"),
        ("gpt2", "mlp.c_proj"),
        ("phi3", "down_proj"),
        ("gpt_neox", "4h_to_h"),
        ("gemma2", "down_proj"),
    ],
)
def test_neurons_that_are_left_out_are_neurons_that_do_nothing(name: str, projection: str) -> None:
    teacher = tiny(name)
    made = cut(teacher, intermediate_size=20)
    assert made.kept.neurons is not None
    assert {len(indices) for indices in made.kept.neurons} == {20}
    assert close(logits(made.student), masked(teacher, projections(teacher, projection), list(made.kept.neurons)))


@pytest.mark.parametrize("name", ["llama_tied", "qwen2", "qwen3", "phi3", "gemma3", "gpt_oss", "smollm3"])
@pytest.mark.parametrize("groups", [1, 2])
def test_heads_that_are_left_out_are_heads_that_do_nothing(name: str, groups: int) -> None:
    teacher = tiny(name)
    made = cut(teacher, num_attention_heads=2, num_key_value_heads=groups)
    assert made.kept.heads is not None
    size = axes_of(teacher).head_dim
    channels = [(heads[:, None] * size + np.arange(size)).ravel() for heads in made.kept.heads]
    assert close(logits(made.student), masked(teacher, projections(teacher, "o_proj"), channels))
    assert made.student.config.num_key_value_heads == groups
    for heads in made.kept.heads:
        of_group = np.bincount(heads // 2, minlength=2)
        assert sorted(of_group) == ([0, 2] if groups == 1 else [1, 1]), "groups stay whole, or shrink alike"


def sliced_by_name(teacher: Any, channels: np.ndarray) -> dict[str, torch.Tensor]:
    """A Llama's weights cut to some channels, written plainly."""
    keep, weights = torch.from_numpy(channels), {}
    for name, weight in teacher.state_dict().items():
        if any(part in name for part in ("norm", "embed", "q_proj", "k_proj", "v_proj", "gate", "up_proj", "lm_head")):
            weights[name] = weight[..., keep]
        else:
            assert "o_proj" in name or "down_proj" in name
            weights[name] = weight[keep]
    return weights


def test_channels_are_cut_from_every_weight_that_has_them() -> None:
    teacher = tiny("mistral")
    made = cut(teacher, hidden_size=24)
    assert made.kept.channels is not None
    expected = sliced_by_name(teacher, made.kept.channels)
    found = made.student.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    assert (made.student.config.hidden_size, made.student.config.head_dim) == (24, 8), "heads stay as wide as they were"


def entering(model: Any) -> torch.Tensor:
    """What enters the first layer."""
    seen: list[torch.Tensor] = []
    layer = model.get_decoder().layers[0]
    handle = layer.register_forward_pre_hook(lambda m, a, k: seen.append(a[0] if a else k["hidden_states"]), with_kwargs=True)
    logits(model)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_scaled_by_the_hidden_size_come_out_as_they_were(name: str, tied: bool) -> None:
    teacher = tiny(name, tie_word_embeddings=tied)
    made = cut(teacher, hidden_size=24)
    channels = torch.from_numpy(made.kept.channels)
    torch.testing.assert_close(entering(made.student), entering(teacher)[..., channels], rtol=1e-5, atol=1e-5)
    # What the output projection makes of a state is what the teacher's makes of it, on these channels.
    state = torch.randn(1, 24, generator=torch.Generator().manual_seed(2))
    theirs = teacher.model.norm.weight.detach().clone()
    teacher.model.norm.weight.data = theirs[channels]
    expected = teacher.model.norm(state) @ teacher.lm_head.weight[:, channels].T
    torch.testing.assert_close(made.student.lm_head(made.student.model.norm(state)), expected, rtol=1e-4, atol=1e-4)
    assert made.student.config.tie_word_embeddings == tied


def test_the_most_active_stay() -> None:
    teacher = tiny("llama")
    with torch.no_grad():
        for layer in teacher.model.layers:
            layer.mlp.up_proj.weight[5:15] *= 100.0  # neurons
            layer.self_attn.v_proj.weight[8:] *= 100.0  # the second group
            layer.input_layernorm.weight[:8] = 0.01  # channels
            layer.post_attention_layernorm.weight[:8] = 0.01
    made = cut(teacher, hidden_size=24, intermediate_size=10, num_attention_heads=2)
    kept = made.kept
    assert kept.channels is not None
    assert kept.neurons is not None
    assert kept.heads is not None
    assert kept.groups is not None
    assert kept.channels.tolist() == list(range(8, 32))
    assert all(neurons.tolist() == list(range(5, 15)) for neurons in kept.neurons)
    assert all(groups.tolist() == [1] for groups in kept.groups)
    assert all(heads.tolist() == [2, 3] for heads in kept.heads)


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - TIED))
def test_layers_and_widths_together_give_a_model_that_loads(name: str, tmp_path: Path) -> None:
    teacher = tiny(name)
    sizes: dict[str, Any] = {"hidden_size": 24, "num_attention_heads": 2} | (
        {} if name in EXPERTS else {"intermediate_size": 20}
    )
    made = cut(teacher, LayersConfig(drop=1), **sizes)
    assert len(made.layers) == 3
    with without_progress_bars():
        made.student.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(
            tmp_path, dtype=torch.float32, attn_implementation=made.student.config._attn_implementation
        )
    assert torch.equal(logits(again), logits(made.student))
    assert again.config.hidden_size == 24


def test_where_the_parts_of_a_fused_projection_lie_is_found_by_a_proof() -> None:
    every = Kept(np.arange(2), (np.arange(2),) * 4, (np.arange(2),) * 4, (np.arange(2),) * 4)
    assert proven_orders(tiny("phi3"), every) == ("apart", "apart"), "queries, keys, values one after another; gate, then up"
    assert proven_orders(tiny("llama"), every)[0] == "together"


def test_a_model_that_depends_on_the_order_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(narrow, "ORDERS", (("together", "together"),))
    with pytest.raises(ConfigError, match="it is not known where the parts of a head or a neuron lie"):
        cut(tiny("phi3"), num_attention_heads=2)


@pytest.mark.parametrize(
    ("name", "width", "message"),
    [
        ("llama", {"num_attention_heads": 3}, "2 heads share keys and values, so it must be a multiple of 2: 2 or 4"),
        ("llama", {"num_attention_heads": 1}, "must be a multiple of 2: 2;"),
        ("llama", {"num_attention_heads": 3, "num_key_value_heads": 2}, "expected one of 2, 4"),
        ("llama", {"num_attention_heads": 4, "num_key_value_heads": 1}, "expected one of 1, 2"),
        ("llama", {"hidden_size": 40}, r"student\.width\.hidden_size is 40, but the teacher has 32"),
        ("llama", {"intermediate_size": 49}, r"student\.width\.intermediate_size is 49, but the teacher has 48"),
        ("gpt2", {"hidden_size": 16}, "always as wide as the hidden states, so neither can be cut"),
        ("gpt_neox", {"num_attention_heads": 2}, "always as wide as the hidden states, so neither can be cut"),
        ("gpt_oss", {"intermediate_size": 24}, r"lie in experts \(model\.layers\.0\.mlp\.experts"),
    ],
)
def test_sizes_that_cannot_be_are_one_sentence(name: str, width: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cut(tiny(name), **width)


def test_without_text_to_measure_on_it_says_what_to_name() -> None:
    for layers, width in [(LayersConfig(drop=1), None), (None, WidthConfig(hidden_size=24))]:
        with pytest.raises(ConfigError, match=r"name the text as student\.statistics\.data"):
            cut_student(tiny("llama"), layers, width)


def test_text_is_measured_once_and_only_where_it_decides() -> None:
    teacher, asked = tiny("llama"), []

    def measure() -> Any:
        asked.append(1)
        return measured(teacher, [row.numpy() for row in ids(teacher)])

    ask: Callable[[], Any] = measure
    assert cut_student(teacher, LayersConfig(every=2), None, ask).statistics is None
    assert not asked
    cut_student(teacher, LayersConfig(drop=1), WidthConfig(hidden_size=24), ask)
    assert asked == [1]
