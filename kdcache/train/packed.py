"""The student's forward over packed rows, and a look at whether a model does what the trainer assumes.

Shape letters: B rows, T tokens per row, H hidden, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kdcache.errors import ConfigError
from kdcache.loss.chunks import Head
from kdcache.train.finite import not_finite_weight

# A scale shows in logits of any size, a soft cap in large ones only.
_MAGNIFIED = (1.0, 1024.0)
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


def logits_head(model: PreTrainedModel) -> Head:
    """What becomes of the output projection's product, as the configuration has it; `has_head` tests that it does.

    A scale multiplies as `logit_scale` (Cohere) and divides as `logits_scaling` (Granite); a soft cap is Gemma's.
    """
    config = model.config.get_text_config()
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    return Head(logit_scale=scale, softcap=getattr(config, "final_logit_softcapping", None))


def apply_head(head: Head, product: Tensor) -> Tensor:
    """Logits of the product with the output projection, in its dtype; its padding stays."""
    logits = product * head.logit_scale
    return logits if head.softcap is None else head.softcap * (logits / head.softcap).tanh()


@torch.no_grad()
def has_head(model: PreTrainedModel, head: Head) -> bool:
    """Whether the model's logits are the output projection of its hidden states, scaled and capped as `head` says, and no more.

    Looked at with the projection's weight as it is, and magnified by a power of two, which can be undone to the bit.
    """
    return all(_has_head(model, head, times) for times in _MAGNIFIED)


def _has_head(model: PreTrainedModel, head: Head, times: float) -> bool:
    ids_1T = _probe_ids(model)
    positions_1T = torch.arange(ids_1T.shape[1], device=ids_1T.device)[None]
    projection = output_projection(model)
    projection.weight.mul_(times)
    try:
        ours = apply_head(head, projection(hidden_states(model, ids_1T, positions_1T)).float())
        return _close(ours, model(input_ids=ids_1T, position_ids=positions_1T, use_cache=False).logits)
    finally:
        projection.weight.div_(times)


@torch.no_grad()
def keeps_documents_apart(model: PreTrainedModel) -> bool:
    """Whether a packed document's hidden states are those it has alone."""
    ids_1T = _probe_ids(model)
    positions_1T = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]], device=ids_1T.device)
    packed = hidden_states(model, ids_1T, positions_1T)[:, 5:]
    return _close(packed, hidden_states(model, ids_1T[:, 5:], positions_1T[:, 5:]))


def check_architecture(model: PreTrainedModel) -> None:
    """Refuse a model for which the trainer would silently compute something else; costs six forwards of eight tokens.

    Raises:
        ConfigError: attention (or state) crosses packed documents, or logits are made in a way that the loss does not know.
    """
    was_training = model.training
    model.eval()
    name = type(model).__name__
    weight = not_finite_weight(model)
    if weight is not None:
        raise ConfigError(f"student: the weight {weight!r} of {name} is not finite; take another checkpoint")
    if not keeps_documents_apart(model):
        raise ConfigError(f"student.config_from: {name} lets packed documents see each other; this trainer cannot train it")
    if not has_head(model, logits_head(model)):
        raise ConfigError(
            f"student.config_from: the logits of {name} are not its output projection of the hidden states, scaled as "
            "logit_scale or logits_scaling and capped as final_logit_softcapping of its configuration say, and the loss knows "
            "nothing else"
        )
    model.train(was_training)


def _probe_ids(model: PreTrainedModel) -> Tensor:
    return (torch.arange(8, device=model.device) * 7 + 1)[None] % int(model.config.vocab_size)


def _close(a: Tensor, b: Tensor) -> bool:
    """But for roundings of the dtype that b was computed in."""
    tolerance = max(_TOLERANCE, 4 * torch.finfo(b.dtype).eps)
    return bool((a.float() - b.float()).abs().max() <= tolerance * b.float().abs().max())
