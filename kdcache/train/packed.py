"""A look at whether a student does what the trainer assumes."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kdcache.errors import ConfigError, KdcacheError
from kdcache.loss.chunks import Head
from kdcache.shown import first_line
from kdcache.teacher.hf.rotary import mend_rotary
from kdcache.train.body import hidden_states, output_projection, positions, text_config, vocab_size
from kdcache.train.finite import not_finite_weight

# A scale shows in logits of any size, a soft cap in large ones only.
_MAGNIFIED = (1.0, 1024.0)
_TOLERANCE = 1e-3


def logits_head(model: PreTrainedModel) -> Head:
    """What becomes of the output projection's product, as the configuration has it; `has_head` tests that it does.

    A scale multiplies as `logit_scale` (Cohere) and divides as `logits_scaling` (Granite); a soft cap is Gemma's.
    """
    config = text_config(model)
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
        whole = model(input_ids=ids_1T, use_cache=False, **positions(model, model, positions_1T)).logits
        return _close(ours, whole)
    finally:
        projection.weight.div_(times)


@torch.no_grad()
def keeps_documents_apart(model: PreTrainedModel) -> bool:
    """Whether a packed document's hidden states are those it has alone."""
    ids_1T = _probe_ids(model)
    last = getattr(text_config(model), "max_position_embeddings", None) or 2**15
    # The other document stands far out, where a long one ends.
    positions_1T = torch.tensor([[*(max(last - 5, 0) + i for i in range(5)), 0, 1, 2]], device=ids_1T.device)
    packed = hidden_states(model, ids_1T, positions_1T)[:, 5:]
    return _close(packed, hidden_states(model, ids_1T[:, 5:], positions_1T[:, 5:]))


@torch.no_grad()
def ignores_batch_mates(model: PreTrainedModel) -> bool:
    """Whether hidden states are the same next to another row, and in a packed row next to a document, that is far longer."""
    ids_1T = _probe_ids(model)
    most = getattr(text_config(model), "max_position_embeddings", None) or 2**15
    near_1T = torch.arange(8, device=ids_1T.device)[None]
    alone = hidden_states(model, ids_1T, near_1T)
    rows = hidden_states(model, torch.cat([ids_1T, ids_1T.flip(1)]), torch.cat([near_1T, near_1T + max(most - 8, 0)]))
    return _close(rows[:1], alone)


@torch.no_grad()
def ignores_what_follows(model: PreTrainedModel) -> bool:
    """Whether hidden states are the same with padding after them."""
    ids_1T = _probe_ids(model)
    positions_1T = torch.tensor([[0, 1, 2, 3, 4, 0, 0, 0]], device=ids_1T.device)
    padded = hidden_states(model, ids_1T, positions_1T)[:, :5]
    return _close(padded, hidden_states(model, ids_1T[:, :5], positions_1T[:, :5]))


def check_architecture(model: PreTrainedModel, *, is_packed: bool = True) -> None:
    """Refuse a model for which the trainer would silently compute something else; costs about ten forwards of eight tokens.

    Args:
        model: the student.
        is_packed: several documents share a row.

    Raises:
        ConfigError: weights that are not finite; attention (or state) crosses packed documents, or looks ahead; or logits are
            made in a way that the loss does not know.
    """
    was_training = model.training
    model.eval()
    mend_rotary(model)
    name = type(model).__name__
    weight = not_finite_weight(model)
    if weight is not None:
        raise ConfigError(f"student: the weight {weight!r} of {name} is not finite; take another checkpoint")
    try:
        _check_documents(model, name, is_packed)
        has_known_head = has_head(model, logits_head(model))
    except KdcacheError:
        raise
    except (AttributeError, TypeError, ValueError, LookupError, NotImplementedError) as error:  # of its own code, on plain text
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ConfigError(
            f"student.model: {name} cannot be run on text alone ({reason}); expected a causal language model"
        ) from error
    if not has_known_head:
        raise ConfigError(
            f"student.model: the logits of {name} are not its output projection of the hidden states, scaled as "
            "logit_scale or logits_scaling and capped as final_logit_softcapping of its configuration say, and the loss knows "
            "nothing else"
        )
    model.train(was_training)


def _check_documents(model: PreTrainedModel, name: str, is_packed: bool) -> None:
    if is_packed and not keeps_documents_apart(model):
        raise ConfigError(
            f"student.model: {name} lets packed documents see each other; set loader.packing to none, one document in each row"
        )
    if not ignores_batch_mates(model):
        raise ConfigError(
            f"student.model: {name} says something else of a text when another row is in the batch (it takes statistics "
            "or factors from it); this trainer cannot train it"
        )
    if not ignores_what_follows(model):
        raise ConfigError(f"student.model: {name} reads what follows a token; expected a causal language model")


def _probe_ids(model: PreTrainedModel) -> Tensor:
    return (torch.arange(8, device=model.device) * 7 + 1)[None] % vocab_size(model)


def _close(a: Tensor, b: Tensor) -> bool:
    """But for roundings of the dtype that b was computed in."""
    tolerance = max(_TOLERANCE, 4 * torch.finfo(b.dtype).eps)
    return bool((a.float() - b.float()).abs().max() <= tolerance * b.float().abs().max())
