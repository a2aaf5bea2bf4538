"""The student's forward over packed rows, and a look at whether a model does what the trainer assumes.

Shape letters: B rows, T tokens per row, H hidden, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kdcache.errors import ConfigError

_MAGNIFIED = 1024.0
_TOLERANCE = 1e-3


def hidden_states(model: PreTrainedModel, input_ids_BT: Tensor, position_ids_BT: Tensor) -> Tensor:
    """(B, T, H) what the output projection reads, for packed rows.

    Without an attention mask and a cache of keys, transformers starts a new document wherever position_ids do not rise by
    one and masks attention (also in sliding-window layers) to the document; `check_architecture` tests that it did.
    """
    return model.base_model(input_ids=input_ids_BT, position_ids=position_ids_BT, use_cache=False).last_hidden_state


def output_projection(model: PreTrainedModel) -> torch.nn.Linear:
    """(V, H) weight and perhaps a bias: what makes logits of hidden states.

    Raises:
        ConfigError: the model has none.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear):
        raise ConfigError(f"{type(model).__name__} has no linear output projection; expected a causal language model")
    return head


@torch.no_grad()
def has_plain_head(model: PreTrainedModel) -> bool:
    """Whether logits are the output projection of the hidden states and nothing else: no scale, no soft cap.

    Looked at with the projection's weight magnified, since a soft cap shows in large logits only; by a power of two, which
    can be undone to the bit.
    """
    ids_1T = _probe_ids(model)
    positions_1T = torch.arange(ids_1T.shape[1], device=ids_1T.device)[None]
    head = output_projection(model)
    head.weight.mul_(_MAGNIFIED)
    try:
        plain = head(hidden_states(model, ids_1T, positions_1T))
        return _close(plain, model(input_ids=ids_1T, position_ids=positions_1T, use_cache=False).logits)
    finally:
        head.weight.div_(_MAGNIFIED)


@torch.no_grad()
def keeps_documents_apart(model: PreTrainedModel) -> bool:
    """Whether a packed document's hidden states are those it has alone."""
    ids_1T = _probe_ids(model)
    positions_1T = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]], device=ids_1T.device)
    packed = hidden_states(model, ids_1T, positions_1T)[:, 5:]
    return _close(packed, hidden_states(model, ids_1T[:, 5:], positions_1T[:, 5:]))


def check_architecture(model: PreTrainedModel) -> None:
    """Refuse a model for which the trainer would silently compute something else; costs four forwards of eight tokens.

    Raises:
        ConfigError: attention (or state) crosses packed documents, or logits are more than the output projection.
    """
    was_training = model.training
    model.eval()
    name = type(model).__name__
    if not keeps_documents_apart(model):
        raise ConfigError(f"student.config_from: {name} lets packed documents see each other; this trainer cannot train it")
    if not has_plain_head(model):
        raise ConfigError(
            f"student.config_from: {name} scales or caps its logits, which the fused loss does not; "
            "turn that off in student.overrides"
        )
    model.train(was_training)


def _probe_ids(model: PreTrainedModel) -> Tensor:
    return (torch.arange(8, device=model.device) * 7 + 1)[None] % int(model.config.vocab_size)


def _close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= _TOLERANCE * b.abs().max())
