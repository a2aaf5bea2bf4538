"""Requests of both routes, and what the public one's answers mean; the texts of the proof.

Shape letters: N tokens of a sequence, K entries per position.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import vllm
from numpy.typing import NDArray

from kdcache.errors import TeacherError
from kdcache.format.manifest import SelectionInfo
from kdcache.format.record import Distributions, TokenSequence, sequence_key
from kdcache.teacher.select.found import record_of_most_probable

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams

PROBE_LENGTHS = (5, 3)
"""The proof's eight tokens are two texts of one step, so that a row that is taken from another request's place is seen too."""


def probe_texts(vocab_size: int, context_length: int) -> list[TokenSequence]:
    """The proof's texts, each cut to what the model reads."""
    ids = (np.arange(sum(PROBE_LENGTHS)) * 7919 + 11) % vocab_size
    parts = np.split(ids.astype(np.int32), np.cumsum(PROBE_LENGTHS)[:-1])
    return [_plain_sequence(part_N[:context_length]) for part_N in parts]


def largest_difference(text: TokenSequence, ours: Distributions, theirs: Distributions) -> float:
    """In nats, between the routes' entries, by token, and their targets; infinite where a number is missing."""
    ids_PK, logprobs_PK = theirs.padded()
    known = [dict(zip(ids, logprobs, strict=True)) for ids, logprobs in zip(ids_PK.tolist(), logprobs_PK.tolist(), strict=True)]
    # A token that the other route has not among its k may tie for the last place.
    expected_PK = [
        [row.get(token, min(row.values())) for token in ids] for row, ids in zip(known, ours.padded()[0].tolist(), strict=True)
    ]
    targets_P = text.target_ids_P
    ours_P, theirs_P = (answer.target_logprobs(targets_P)[targets_P >= 0] for answer in (ours, theirs))
    errors = np.abs(np.concatenate([(ours.padded()[1] - expected_PK).ravel(), ours_P - theirs_P]))
    return float(np.nan_to_num(errors, nan=np.inf).max(initial=0.0))


def read_output(output: RequestOutput, sequence: TokenSequence, selection: SelectionInfo) -> Distributions:
    """One finished request as a record: the shift by one and the extra column are undone here and nowhere else.

    Raises:
        TeacherError: the engine's rows are not those of the sequence's tokens.
    """
    k = selection.params["k"]
    ids_NK, logprobs_NK = _rows(output.prompt_logprobs, k)
    last_ids_1K, last_logprobs_1K = _rows(output.outputs[0].logprobs, k)
    if not np.array_equal(ids_NK[:, 0], sequence.input_ids_N[1:]) or len(last_ids_1K) != 1:
        raise TeacherError(
            f"{sequence.source}: vLLM {vllm.__version__} gave {len(ids_NK)} + {len(last_ids_1K)} rows that do not belong to "
            f"the {sequence.num_tokens} tokens of the sequence; use teacher.backend transformers"
        )
    ids_NK = np.concatenate([ids_NK, last_ids_1K])[sequence.supervised_N]
    logprobs_NK = np.concatenate([logprobs_NK, last_logprobs_1K])[sequence.supervised_N]
    return record_of_most_probable(sequence, selection, (ids_NK[:, 1:], logprobs_NK[:, 1:], logprobs_NK[:, 0]))


def _rows(flat: Any, k: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """(rows, k+1) ids and logprobs of a `FlatLogprobs`. The None of the first prompt token has no entries in it."""
    ids, logprobs = np.array(flat.token_ids, np.int32), np.array(flat.logprobs, np.float32)
    if len(ids) % (k + 1):
        raise TeacherError(f"vLLM {vllm.__version__} gave {len(ids)} entries, which are not rows of k + 1 = {k + 1}")
    return ids.reshape(-1, k + 1), logprobs.reshape(-1, k + 1)


def public_params(k: int) -> SamplingParams:
    """Of a request for a prompt's k most probable tokens; since vLLM 0.24 such a request reads no prefix cache."""
    return vllm.SamplingParams(
        prompt_logprobs=k, logprobs=k, max_tokens=1, temperature=0.0, flat_logprobs=True, detokenize=False
    )


def worker_params(extra_args: dict[str, Any]) -> SamplingParams:
    """Of a request whose rows are selected in the worker."""
    # What the prefix cache holds is not computed, and would have no rows.
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
