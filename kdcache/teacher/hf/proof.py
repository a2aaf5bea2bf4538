"""Compare, when a model is loaded, what it says of a few texts together with what it says of each alone.

Whatever a forward derives from its batch (factors from the longest text, statistics, padding) shows as a difference. The
remedy is a rule about which texts may share a forward; otherwise the model is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcache.errors import TeacherError
from kdcache.shown import get_logger

log = get_logger(__name__)

Sharing = Literal["any", "equal", "alone"]
"""Which texts may share a forward: any, those of equal length, or none."""

Texts = Sequence[NDArray[np.int64]]
LogitsOf = Callable[[Texts], list[Tensor]]
"""Gives (P, V) logits of each text at `looked_at`, from one forward over all of them, padded as the backend pads."""

LENGTHS = (2, 12, 12)
LOOKED_AT = 16
BEST = 8
FAR_TOKENS, UNKNOWN_CONTEXT = 8, 2**15

_FLOOR_NATS = {torch.float32: 1e-3, torch.float64: 1e-3, torch.float16: 0.05}
_FLOOR_HALF_NATS = 0.25
"""How much rounding may change the mean of the BEST logprobs of a position: kernels are chosen by shape."""

_OPERATIONS = {"cpu": 2e10, "cuda": 1e13}
"""Weights times tokens that the longest text of the proof may take: a second or two."""
_TIMES_READ = 6
"""How often it is read: alone, again, with another end, and as the longest in a batch of three."""
_LONGEST = {"cpu": 512, "cuda": 4096}


def longest_text(model: Any, *, context: int, most: int) -> int:
    """How many tokens the proof's longest text has: up to the context for a small model, a few for a large one."""
    kind = model.device.type
    weights = max(sum(weight.numel() for weight in model.parameters()), 1)
    affordable = int(_OPERATIONS.get(kind, 1e13) / (weights * _TIMES_READ))
    return max(min(affordable, context, most, _LONGEST.get(kind, 4096)), min(LENGTHS[-1], context))


@torch.inference_mode()
def prove_sharing(logits_of: LogitsOf, model: Any, *, longest: int, name: str, what: str = "") -> Sharing:
    """Find out which texts may share a forward.

    Args:
        logits_of: the backend's own way to compute.
        model: for its vocabulary and dtype.
        longest: tokens of the longest text, see `longest_text`.
        name: the model's name, for messages.
        what: what is written after the texts, where `logits_of` gives the last position only; "" if texts are read.

    Raises:
        TeacherError: the model answers differently when asked the same again, or reads what comes later in a text.
    """
    with untouched_generators(model):
        proof = _Proof(logits_of, model, longest)
        _check_repeats(proof, name)
        if not what:
            _check_causal(proof, name)
        far = far_gap(model)
        *others, short, middle, last = proof.texts
        gaps = {"any": proof.gap([*others, short, middle], [last, short]), "equal": proof.gap([middle, last])}
    gaps["any"] = max(gaps["any"], far)
    kinds: tuple[Sharing, ...] = ("any", "equal")
    found: list[Sharing] = [kind for kind in kinds if gaps[kind] <= proof.explained]
    sharing = found[0] if found else "alone"
    if sharing != "any":
        log.warning(
            "%s: %s texts of different lengths together changes an answer by %.2g nats (rounding explains %.2g); %s",
            name, f"writing {what} after" if what else "reading", gaps["any"], proof.explained,
            "texts of equal length share a forward" if sharing == "equal" else "one text at a time, which is slow",
        )  # fmt: skip
    return sharing


class _Proof:
    """A few texts, what the model says of each alone, and how much rounding explains."""

    def __init__(self, logits_of: LogitsOf, model: Any, longest: int) -> None:
        self._logits_of = logits_of
        vocab_size = int(model.config.get_text_config().vocab_size)
        rng = np.random.default_rng(20261128)
        lengths = [min(length, longest) for length in LENGTHS]
        # The longest comes first, then a short one: what a model keeps of the first shows in the second.
        order = [longest, *lengths] if longest > lengths[-1] else lengths
        self.texts: list[NDArray[np.int64]] = [rng.integers(0, vocab_size, length) for length in order]
        self.alone = {id(text): self.logprobs([text])[0] for text in self.texts}
        self.explained = _FLOOR_NATS.get(model.dtype, _FLOOR_HALF_NATS)
        if model.dtype in (torch.float16, torch.bfloat16):
            # Next to copies of itself, only rounding can move a text.
            copies = self.logprobs([self.texts[-1]] * 2)
            noise = max(distance(copy, self.alone[id(self.texts[-1])]) for copy in copies)
            self.explained = max(self.explained, 4 * min(noise, _FLOOR_HALF_NATS))

    def logprobs(self, texts: Texts) -> list[Tensor]:
        return [torch.log_softmax(logits_PV.float(), dim=-1) for logits_PV in self._logits_of(texts)]

    def gap(self, *batches: Texts) -> float:
        """The largest distance between a text's answer in one of these batches and its answer alone."""
        pairs = [(text, found) for batch in batches for text, found in zip(batch, self.logprobs(batch), strict=True)]
        return max(distance(found, self.alone[id(text)]) for text, found in pairs)


def _check_repeats(proof: _Proof, name: str) -> None:
    # Some models draw at random only in long texts, for example where attention is hashed.
    for text in (proof.texts[-1], proof.texts[-len(LENGTHS)], proof.texts[0]):
        again = distance(proof.logprobs([text])[0], proof.alone[id(text)])
        if again > proof.explained:
            raise TeacherError(asked_again(name))


def _check_causal(proof: _Proof, name: str) -> None:
    for text in (proof.texts[-1], proof.texts[0]):
        kept = len(text) // 2
        changed = np.concatenate([text[:kept], (text[kept:] + 1) % max(int(text.max()) + 1, 2)])
        found_PV, expected_PV = proof.logprobs([changed])[0], proof.alone[id(text)]
        is_before = torch.from_numpy(looked_at(len(text)) < kept).to(found_PV.device)
        if distance(found_PV[is_before], expected_PV[is_before]) > proof.explained:
            raise TeacherError(reads_ahead(name))


def asked_again(name: str) -> str:
    """The message about a model that answers differently when asked again."""
    return (
        f"the model {name!r} gives other numbers for the same text when asked again, by more than rounding: it draws at "
        "random, or keeps something of the previous text; its answers cannot be cached"
    )


def reads_ahead(name: str) -> str:
    """The message about a model that is not causal."""
    return (
        f"the model {name!r} reads tokens that come later in a text: its distributions change with them; a teacher must be a "
        "causal language model"
    )


def far_gap(model: Any) -> float:
    """How far a text's answer moves when another text of its batch stands at the end of the context.

    This asks about long texts a model that is too large to read one. 0.0 if the model takes no positions.
    """
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return 0.0
    config = model.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None) or UNKNOWN_CONTEXT
    near_1T = torch.arange(min(FAR_TOKENS, context), device=model.device)[None]
    ids_1T = (near_1T * 37 + 11) % config.vocab_size
    arguments = {
        "input_ids": torch.cat([ids_1T, ids_1T]),
        "position_ids": torch.cat([near_1T, near_1T + context - near_1T.shape[1]]),
    }
    try:
        both, alone = (
            model(**{name: values_BT[:size] for name, values_BT in arguments.items()}, use_cache=False).logits[0]
            for size in (2, 1)
        )
    except (RuntimeError, TypeError, ValueError, IndexError) as error:  # positions of another shape
        log.debug("positions of %s cannot be chosen: %s", type(model).__name__, error)
        return 0.0
    return distance(*(torch.log_softmax(logits_TV.float(), dim=-1) for logits_TV in (both, alone)))


def looked_at(length: int) -> NDArray[np.int64]:
    """The positions of a text that are compared, with its first and last."""
    return np.unique(np.linspace(0, length - 1, min(LOOKED_AT, length)).astype(np.int64))


def distance(found_PV: Tensor, expected_PV: Tensor) -> float:
    """The largest over positions of the mean difference in nats of the tokens that are likely alone; NaN equals NaN."""
    if not len(expected_PV):
        return 0.0
    best_PK = expected_PV.topk(min(BEST, expected_PV.shape[-1]), dim=-1).indices
    gap_PK = (found_PV.gather(1, best_PK) - expected_PV.gather(1, best_PK)).abs()
    return float(gap_PK.nan_to_num(nan=0.0).mean(dim=-1).max())


@contextmanager
def untouched_generators(model: Any) -> Iterator[None]:
    """Restore torch's random generators afterwards, whatever the model draws."""
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        yield
