"""The requests of both routes, what the answers of the public one mean, and the texts of the proof."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import vllm
from numpy.typing import NDArray

from kdcache.errors import TeacherError
from kdcache.format.manifest import FeatureInfo, SelectionInfo
from kdcache.format.record import Distributions, TokenSequence, sequence_key
from kdcache.teacher.features import bytes_per_position
from kdcache.teacher.select.found import layout_of, record_of_most_probable

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams

PROBE_LENGTHS = (5, 3)
"""The proof's eight tokens are two texts of one step, so that it also notices numbers taken from another request."""


WORKER_STEPS_PER_GROUP = 32
"""The last step of a group is seldom full, so larger groups waste less. The buffer takes 8 bytes per entry."""

WORKER_GROUP_BYTES = 256 * 2**20


def worker_steps(selection: SelectionInfo, features: Sequence[FeatureInfo], vocab_size: int, tokens_per_step: int) -> int:
    """How many steps of the scheduler a group of the worker route takes, so that its buffer and its features have room."""
    # Features are in the worker's buffer, and once more on the way.
    per_position = layout_of(selection, vocab_size).bytes_per_position + bytes_per_position(features)
    return max(1, min(WORKER_STEPS_PER_GROUP, WORKER_GROUP_BYTES // (per_position * tokens_per_step)))


def probe_texts(vocab_size: int, context_length: int) -> list[TokenSequence]:
    """The texts of the proof, each cut to what the model reads."""
    ids = (np.arange(sum(PROBE_LENGTHS)) * 7919 + 11) % vocab_size
    parts = np.split(ids.astype(np.int32), np.cumsum(PROBE_LENGTHS)[:-1])
    return [_plain_sequence(part_N[:context_length]) for part_N in parts]


def largest_difference(text: TokenSequence, ours: Distributions, theirs: Distributions) -> float:
    """The largest difference in nats between the routes' entries, by token, and targets; infinite if a number is missing."""
    ids_PK, logprobs_PK = theirs.padded()
    known = [dict(zip(ids, logprobs, strict=True)) for ids, logprobs in zip(ids_PK.tolist(), logprobs_PK.tolist(), strict=True)]
    # A token that the other route does not have among its k may tie for the last rank.
    expected_PK = [
        [each.get(token, min(each.values())) for token in ids]
        for each, ids in zip(known, ours.padded()[0].tolist(), strict=True)
    ]
    target_ids_P = text.target_ids_P
    ours_P, theirs_P = (answer.target_logprobs(target_ids_P)[target_ids_P >= 0] for answer in (ours, theirs))
    errors = np.abs(np.concatenate([(ours.padded()[1] - expected_PK).ravel(), ours_P - theirs_P]))
    return float(np.nan_to_num(errors, nan=np.inf).max(initial=0.0))


def read_output(output: RequestOutput, sequence: TokenSequence, selection: SelectionInfo) -> Distributions:
    """The record of one finished request. The shift by one and the extra column are undone here and nowhere else.

    Raises:
        TeacherError: the engine's logprobs are not those of the sequence's tokens.
    """
    k = selection.params["k"]
    ids_NK, logprobs_NK = _columns(output.prompt_logprobs, k)
    last_ids_1K, last_logprobs_1K = _columns(output.outputs[0].logprobs, k)
    if not np.array_equal(ids_NK[:, 0], sequence.input_ids_N[1:]) or len(last_ids_1K) != 1:
        raise TeacherError(
            f"{sequence.source}: vLLM {vllm.__version__} gave logprobs of {len(ids_NK)} + {len(last_ids_1K)} positions that do "
            f"not belong to the {sequence.num_tokens} tokens of the sequence; use teacher.backend transformers"
        )
    ids_NK = np.concatenate([ids_NK, last_ids_1K])[sequence.supervised_N]
    logprobs_NK = np.concatenate([logprobs_NK, last_logprobs_1K])[sequence.supervised_N]
    return record_of_most_probable(sequence, selection, (ids_NK[:, 1:], logprobs_NK[:, 1:], logprobs_NK[:, 0]))


def _columns(flat: Any, k: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """(positions, k + 1) ids and logprobs of a `FlatLogprobs`. The None of the first prompt token has no entries there."""
    ids, logprobs = np.array(flat.token_ids, np.int32), np.array(flat.logprobs, np.float32)
    if len(ids) % (k + 1):
        raise TeacherError(f"vLLM {vllm.__version__} gave {len(ids)} entries, expected k + 1 = {k + 1} for each position")
    return ids.reshape(-1, k + 1), logprobs.reshape(-1, k + 1)


def public_params(k: int) -> SamplingParams:
    """Parameters of a request for the k most probable tokens of a prompt; since vLLM 0.24 it reads no prefix cache."""
    return vllm.SamplingParams(
        prompt_logprobs=k, logprobs=k, max_tokens=1, temperature=0.0, flat_logprobs=True, detokenize=False
    )


def worker_params(extra_args: dict[str, Any]) -> SamplingParams:
    """Parameters of a request whose entries are selected in the worker."""
    # What the prefix cache holds is not computed, so nothing could be selected there.
    return vllm.SamplingParams(
        max_tokens=1, temperature=0.0, detokenize=False, skip_reading_prefix_cache=True, extra_args=extra_args
    )


def _plain_sequence(input_ids_N: NDArray[np.int32]) -> TokenSequence:
    supervised_N = np.ones(len(input_ids_N), np.bool_)
    return TokenSequence(
        input_ids_N=input_ids_N,
        supervised_N=supervised_N,
        roles_N=np.zeros(len(input_ids_N), np.uint8),
        turn_starts=np.zeros(1, np.int32),
        source="probe",
        key=sequence_key(input_ids_N, supervised_N, ""),
    )
