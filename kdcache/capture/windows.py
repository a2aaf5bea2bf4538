"""Tokens of one item -> the sequences that the teacher reads.

Which window records which position (each window has `size` tokens, and the next one starts `size - overlap` tokens later):

- Every position of the item is recorded exactly once; position t of the item is token t and what the teacher says comes next.
- A window records all its positions, except the first `overlap - 1` of a later window, which the one before has recorded.
- At a seam the last position of a window predicts a token that lies outside it. Without overlap
  the position is recorded there without a target (a student still learns the teacher's distribution from it). With an overlap
  that position's token is in the next window too: the position is recorded there instead, with its target and `overlap - 1`
  tokens before it as context.

So with an overlap no target is lost, and the overlapping tokens are all the context that the first recorded position has.

`truncate` keeps the first `size` tokens; the last of them is recorded without a target. `error` refuses longer items.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kdcache.config.capture import WindowConfig
from kdcache.errors import InputError
from kdcache.format.record import TokenSequence, sequence_key


@dataclass(frozen=True, slots=True, eq=False)
class TokenizedItem:
    """One item as one or more tokens; fields as in TokenSequence, except for ids of int64, which are not checked yet."""

    input_ids_N: NDArray[np.int64]
    supervised_N: NDArray[np.bool_]
    roles_N: NDArray[np.uint8]
    turn_starts: NDArray[np.int32]
    source: str
    domain: str = ""
    group: bytes = b""
    preference: str = ""


def cut_windows(item: TokenizedItem, window: WindowConfig, template_fingerprint: str) -> list[TokenSequence]:
    """Cut one item into its sequences, in order; the module's docstring says what each records.

    A sequence's source is the item's, with "#0", "#1", ... where there are several. A window that starts inside a turn has 0 as
    its first turn start.

    Raises:
        InputError: policy `error`, and the item is longer than window.size.
    """
    num_tokens = len(item.input_ids_N)
    if num_tokens > window.size and window.policy == "error":
        raise InputError(
            f"{item.source}: {num_tokens} tokens, but input.window.size is {window.size} and its policy is 'error'; "
            "raise the size, or set the policy to 'split' or 'truncate'"
        )
    bounds = list(window_bounds(num_tokens, window))
    sequences = []
    for index, (start, stop) in enumerate(bounds):
        source = item.source if len(bounds) == 1 else f"{item.source}#{index}"
        recorded_N = _recorded(index, stop - start, is_last=index == len(bounds) - 1, overlap=window.overlap)
        sequences.append(_window(item, slice(start, stop), recorded_N, source, template_fingerprint))
    return sequences


def window_bounds(num_tokens: int, window: WindowConfig) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of each window over one or more tokens; the last one ends with the tokens, unless truncated."""
    if window.policy != "split":
        yield 0, min(num_tokens, window.size)
        return
    start, stop = 0, 0
    while stop < num_tokens:
        stop = min(start + window.size, num_tokens)
        yield start, stop
        start += window.size - window.overlap


def num_truncated_tokens(num_tokens: int, window: WindowConfig) -> int:
    """Count the tokens of an item that no window holds."""
    return max(0, num_tokens - window.size) if window.policy == "truncate" else 0


def supervise_assistant(assistant_mask_N: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Supervise position t if token t+1 is the assistant's, (N,) bool; so never the last position.

    Args:
        assistant_mask_N: (N,) bool, whether token t is the assistant's.
    """
    return np.append(assistant_mask_N[1:], False)


def _recorded(index: int, length: int, *, is_last: bool, overlap: int) -> NDArray[np.bool_]:
    recorded_N = np.ones(length, np.bool_)
    if overlap and index:
        recorded_N[: overlap - 1] = False
    if overlap and not is_last:
        recorded_N[-1] = False
    return recorded_N


def _window(
    item: TokenizedItem, where: slice, recorded_N: NDArray[np.bool_], source: str, template_fingerprint: str
) -> TokenSequence:
    input_ids_N = item.input_ids_N[where].astype(np.int32)
    supervised_N = item.supervised_N[where] & recorded_N
    starts = item.turn_starts
    inside = starts[(starts >= where.start) & (starts < where.stop)] - where.start
    is_mid_turn = (starts < where.start).any() and (len(inside) == 0 or inside[0] != 0)
    return TokenSequence(
        input_ids_N=input_ids_N,
        supervised_N=supervised_N,
        roles_N=item.roles_N[where].astype(np.uint8),
        turn_starts=np.concatenate([[0], inside] if is_mid_turn else [inside]).astype(np.int32),
        source=source,
        key=sequence_key(input_ids_N, supervised_N, template_fingerprint),
        domain=item.domain,
        group=item.group,
        preference=item.preference,
    )
