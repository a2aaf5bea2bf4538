"""Statistics of activations against references written plainly, in float64."""

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "train"))
from student_families import FAMILIES, ids, tiny

from kdcache.teacher.hf.activations import ActivationWatch, added, angular_distances, block_influence, importance
from kdcache.teacher.hf.axes import Axes, axes_of

LENGTHS = [24, 17]


def watched(model: Any, lengths: list[int] | None = None) -> dict[str, Any]:
    rows = ids(model)
    with ActivationWatch(model) as watch:
        for length, row in zip(lengths or LENGTHS, rows, strict=True):
            with watch.texts([length]):
                model(input_ids=row[None, :length], use_cache=False)
    return watch.statistics()


def states_of(model: Any, length: int, row: int) -> np.ndarray:
    """(layers + 1, T, H) before the final norm, by hooks on the layers themselves."""
    seen: list[torch.Tensor] = []
    layers = model.get_decoder().layers if hasattr(model.get_decoder(), "layers") else model.get_decoder().h
    handles = [
        layers[0].register_forward_pre_hook(lambda m, a, k: seen.append(a[0] if a else k["hidden_states"]), with_kwargs=True)
    ]
    handles += [layer.register_forward_hook(lambda m, a, o: seen.append(o if torch.is_tensor(o) else o[0])) for layer in layers]
    model(input_ids=ids(model)[row : row + 1, :length], use_cache=False)
    for handle in handles:
        handle.remove()
    return np.stack([state[0].detach().double().numpy() for state in seen])


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))


def test_block_influence_of_the_golden_states() -> None:
    before, after = np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([[1.0, 1.0], [0.0, 2.0]])
    assert np.mean(1 - cosines(before, after)) == pytest.approx(0.1464466, abs=1e-7)

    class Layer(torch.nn.Module):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return torch.tensor(after, dtype=torch.float32)[None]

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList([Layer()])
            self.config = type("Config", (), {"get_text_config": lambda self: type("Text", (), {"num_hidden_layers": 1})()})()

    model = Model()
    with ActivationWatch(model, axes=Axes(2, 0, 0, 0, 0, {}, False, {})) as watch, watch.texts([2]):
        model.layers[0](torch.tensor(before, dtype=torch.float32)[None])
    assert block_influence(watch.statistics()) == pytest.approx([0.1464466], abs=1e-6)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "olmo2", "gpt_oss"])
@torch.no_grad()
def test_depths_are_those_of_a_plain_reference(name: str) -> None:
    model = tiny(name)
    found = watched(model)
    states = [states_of(model, length, row) for row, length in enumerate(LENGTHS)]
    turned = [np.concatenate([1 - cosines(s[layer], s[layer + 1]) for s in states]) for layer in range(4)]
    np.testing.assert_allclose(block_influence(found), [t.mean() for t in turned], atol=2e-6)
    last = [s[:, -1] for s in states]
    angles = [[np.mean([math.acos(min(1, cosines(s[i], s[j]))) / math.pi for s in last]) for j in range(5)] for i in range(5)]
    np.testing.assert_allclose(angular_distances(found), angles, atol=1e-4)
    assert found["num_positions"] == [41]
    assert found["num_sequences"] == [2]


@torch.no_grad()
def test_widths_are_those_of_a_plain_reference() -> None:
    model = tiny("llama")
    found = watched(model)
    layer = model.model.layers[2]
    for name, module, row in [("attention", layer.self_attn.o_proj, 2), ("neurons", layer.mlp.down_proj, 2)]:
        means = [np.abs(read_by(model, module, row, n)).mean(axis=0) for row, n in enumerate(LENGTHS)]
        np.testing.assert_allclose(importance(found, name)[row], np.sqrt(sum(m**2 for m in means)), rtol=1e-5)
    means = [np.abs(given_by(model, layer.post_attention_layernorm, row, n)).mean(axis=0) for row, n in enumerate(LENGTHS)]
    np.testing.assert_allclose(importance(found, "channels")[2 * 2 + 1], np.sqrt(sum(m**2 for m in means)), rtol=1e-5)


def read_by(model: Any, module: torch.nn.Module, row: int, length: int) -> np.ndarray:
    seen: list[torch.Tensor] = []
    handle = module.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    model(input_ids=ids(model)[row : row + 1, :length], use_cache=False)
    handle.remove()
    return seen[0][0].double().numpy()


def given_by(model: Any, module: torch.nn.Module, row: int, length: int) -> np.ndarray:
    seen: list[torch.Tensor] = []
    handle = module.register_forward_hook(lambda m, a, o: seen.append(o))
    model(input_ids=ids(model)[row : row + 1, :length], use_cache=False)
    handle.remove()
    return seen[0][0].double().numpy()


@torch.no_grad()
def test_batches_with_padding_and_chunks_give_the_same_sums() -> None:
    model = tiny("qwen3")
    alone, rows = watched(model), ids(model)
    with ActivationWatch(model) as watch, watch.texts(LENGTHS):
        model(input_ids=rows, use_cache=False)
    together = watch.statistics()
    with ActivationWatch(model) as watch:
        for length, row in zip(LENGTHS, rows, strict=True):
            with watch.texts([length]):
                first = model(input_ids=row[None, :10], use_cache=True)
                model(input_ids=row[None, 10:length], past_key_values=first.past_key_values, use_cache=True)
    for found in (together, watch.statistics()):
        assert found.keys() == alone.keys()
        for name, sums in alone.items():
            np.testing.assert_allclose(found[name], sums, rtol=1e-4, atol=1e-4, err_msg=name)


@torch.no_grad()
def test_what_two_captures_saw_is_added() -> None:
    model = tiny("llama")
    parts = []
    for length, row in zip(LENGTHS, ids(model), strict=True):
        with ActivationWatch(model) as watch, watch.texts([length]):
            model(input_ids=row[None, :length], use_cache=False)
        parts.append(watch.statistics())
    both, expected = added(*parts), watched(model)
    assert all(np.array_equal(both[name], sums) for name, sums in expected.items())


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_every_family_is_watched_and_left_as_it_was(name: str) -> None:
    model = tiny(name)
    before = model(input_ids=ids(model), use_cache=False).logits
    found = watched(model)
    assert torch.equal(model(input_ids=ids(model), use_cache=False).logits, before)
    assert not any(module._forward_hooks for module in model.modules())
    assert np.isfinite(np.concatenate([sums.ravel() for sums in found.values()])).all()
    assert block_influence(found).shape == (4,)
    assert found["channels"].shape[1] == 32
    assert ("attention" in found) == axes_of(model).are_heads_apart
    assert ("neurons" in found) == (name != "gpt_oss"), "its neurons are all in experts"
