"""The `vllm` teacher: the offline engine's own prompt logprobs, through the flattest container its public API has.

A sequence is a prompt; one token is generated after it. vLLM's "prompt logprob i" is the distribution for token i given the
tokens before it: our position i-1. The last position is the generated token's row. Each row has k+1 columns: the token that
came, then the k most probable, among which it may appear again.

Shape letters: N tokens of a sequence, P supervised positions, K entries per position.
"""

from __future__ import annotations

import gc
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kdcache.config.capture import TeacherConfig
from kdcache.errors import TeacherError
from kdcache.format.manifest import SelectionInfo, TeacherIdentity
from kdcache.format.record import Distributions, TokenSequence
from kdcache.teacher.base import answer, check_sequences, first_line, no_positions, top_k_of
from kdcache.teacher.batches import groups_of_tokens
from kdcache.teacher.checkpoint import check_model_name, short_name, weights_digest
from kdcache.teacher.vllm_options import RESOURCE_OPTIONS, engine_options

# vLLM and torch read these when they are imported. At its own default vLLM prints some forty lines per engine, at WARNING still
# twenty, none of them about the user's input; what ends a capture is raised. Some come before it sets its loggers up.
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"].upper())
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch
    import vllm
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.platforms import current_platform
    from vllm.transformers_utils.config import get_config

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput, SamplingParams

log = logging.getLogger(__name__)

STEPS_PER_GROUP = 4
"""Sequences are given to the engine in groups of about this many scheduler steps. The flat container holds some 85 bytes per
entry until it is converted (at k = 64 and 8192 tokens per step: 180 MB per group)."""


class VllmTeacher:
    """A model in vLLM's offline engine; see the module's docstring."""

    def __init__(self, config: TeacherConfig) -> None:
        """Start the engine. On a CPU it runs in this process and uses the process's threads.

        Raises:
            TeacherError: the model does not load.
        """
        check_model_name(config.model)
        self._is_cpu = bool(current_platform.is_cpu())
        self._batch_tokens = config.batch_tokens
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        options = engine_options(config, _model_fields(config), is_cpu=self._is_cpu)
        self._eager_python = self._is_cpu and bool(options["enforce_eager"])
        self._llm: LLM | None = _start(config.model, options, is_cpu=self._is_cpu)
        self._identity = _identity(config, self._llm, self._is_cpu)

    @property
    def identity(self) -> TeacherIdentity:
        """See `Teacher`. context_length is one less than the engine's: the token that it generates needs a place."""
        return self._identity

    def score(self, sequences: Sequence[TokenSequence], selection: SelectionInfo) -> Iterator[Distributions]:
        """See `Teacher`."""
        k = top_k_of(selection, vocab_size=self._identity.vocab_size, backend="vllm")
        if self._llm is None:
            raise TeacherError(f"the teacher {self._identity.model!r} is closed")
        check_sequences(sequences, self._identity)
        return self._score_all(sequences, k)

    def close(self) -> None:
        """See `Teacher`."""
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = None
            _clean_up()

    def _score_all(self, sequences: Sequence[TokenSequence], k: int) -> Iterator[Distributions]:
        for group in groups_of_tokens(sequences, STEPS_PER_GROUP * self._batch_tokens):
            outputs = self._generate([s.input_ids_N.tolist() for s in group if s.supervised_N.any()], k)
            outputs.reverse()
            for sequence in group:
                # Popped, so that a group's containers are freed as they are read.
                yield read_output(outputs.pop(), sequence, k) if sequence.supervised_N.any() else no_positions()

    def _generate(self, prompts: list[list[int]], k: int) -> list[RequestOutput]:
        if not prompts:
            return []
        if self._llm is None:
            raise TeacherError(f"the teacher {self._identity.model!r} was closed while it was scoring")
        # One helper of vLLM's sampler is compiled on first use, which costs up to twenty seconds and saves microseconds.
        stance = torch.compiler.set_stance("force_eager") if self._eager_python else nullcontext()
        try:
            with stance:
                requests: list[Any] = [{"prompt_token_ids": prompt} for prompt in prompts]
                return self._llm.generate(requests, _sampling_params(k), use_tqdm=False)
        except Exception as error:  # the engine is a program of its own: an out-of-memory error comes in a dozen types
            self.close()  # requests of the failed call are still in its queue
            raise TeacherError(f"vLLM failed on the teacher {self._identity.model!r}: {_reason(error)}") from error


def read_output(output: RequestOutput, sequence: TokenSequence, k: int) -> Distributions:
    """One finished request as a record: the shift by one and the extra column are undone here and nowhere else.

    Raises:
        TeacherError: the engine's rows are not those of the sequence's tokens.
    """
    ids_NK, logprobs_NK = _rows(output.prompt_logprobs, k)
    last_ids_1K, last_logprobs_1K = _rows(output.outputs[0].logprobs, k)
    if not np.array_equal(ids_NK[:, 0], sequence.input_ids_N[1:]) or len(last_ids_1K) != 1:
        raise TeacherError(
            f"{sequence.source}: vLLM {vllm.__version__} gave {len(ids_NK)} + {len(last_ids_1K)} rows that do not belong to "
            f"the {sequence.num_tokens} tokens of the sequence; use teacher.backend transformers"
        )
    ids_NK = np.concatenate([ids_NK, last_ids_1K])[sequence.supervised_N]
    logprobs_NK = np.concatenate([logprobs_NK, last_logprobs_1K])[sequence.supervised_N]
    return answer(sequence, ids_NK[:, 1:], logprobs_NK[:, 1:], logprobs_NK[:, 0])


def _rows(flat: Any, k: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """(rows, k+1) ids and logprobs of a `FlatLogprobs`. The None of the first prompt token has no entries in it."""
    ids, logprobs = np.array(flat.token_ids, np.int32), np.array(flat.logprobs, np.float32)
    if len(ids) % (k + 1):
        raise TeacherError(f"vLLM {vllm.__version__} gave {len(ids)} entries, which are not rows of k + 1 = {k + 1}")
    return ids.reshape(-1, k + 1), logprobs.reshape(-1, k + 1)


def _sampling_params(k: int) -> SamplingParams:
    return vllm.SamplingParams(
        prompt_logprobs=k, logprobs=k, max_tokens=1, temperature=0.0, flat_logprobs=True, detokenize=False
    )


def _model_fields(config: TeacherConfig) -> dict[str, Any]:
    """The model's config.json, also of a hub id; empty where it cannot be read, which the engine will then say."""
    try:
        trust_remote_code = bool(config.engine_options.get("trust_remote_code", False))
        return get_config(config.model, trust_remote_code=trust_remote_code, revision=config.revision).to_dict()
    except Exception as error:
        log.debug("%s: %s", config.model, first_line(error))
        return {}


def _start(model: str, options: dict[str, Any], *, is_cpu: bool) -> LLM:
    try:
        with _our_process(is_cpu=is_cpu):
            return vllm.LLM(model=model, **options)
    except Exception as error:  # whatever a checkpoint, the hub client or the engine can raise
        _clean_up()
        raise TeacherError(f"the model {model!r} does not load with vLLM: {_reason(error)}") from error


@contextmanager
def _our_process(*, is_cpu: bool) -> Iterator[None]:
    """Start an engine without leaving marks: environment (LD_PRELOAD among it) and torch's thread setter are put back.

    On a CPU the engine runs in this process, unless the user's environment says otherwise: its worker process would be bound to
    all cores but one, and it would need a guarded main module.
    """
    environment, set_num_threads = dict(os.environ), torch.set_num_threads
    if is_cpu:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_num_threads = set_num_threads
        os.environ.clear()
        os.environ.update(environment)


def _clean_up() -> None:
    """Give memory and process groups back, so that another engine can start in this process."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cleanup_dist_env_and_memory()


def _reason(error: Exception) -> str:
    """The telling sentence of an error; pydantic hides it behind a heading and before a dump of the input."""
    text = str(error)
    if "validation error" in text.partition("\n")[0] and "Value error, " in text:
        text = text.partition("Value error, ")[2].partition(" [type=")[0]
    else:
        text = first_line(error)
    return text.partition(". ")[0]


def _identity(config: TeacherConfig, llm: LLM, is_cpu: bool) -> TeacherIdentity:
    model_config = llm.llm_engine.model_config
    digest = weights_digest(config.model)
    options = {name: value for name, value in config.engine_options.items() if name not in RESOURCE_OPTIONS}
    return TeacherIdentity(
        model=short_name(config.model),
        revision=None if digest else getattr(model_config.hf_config, "_commit_hash", None) or config.revision,
        weights_digest=digest,
        architecture=str((model_config.hf_config.architectures or ["unknown"])[0]),
        vocab_size=model_config.get_vocab_size(),
        dtype=str(model_config.dtype).removeprefix("torch."),
        quantization=model_config.quantization,
        engine="vllm",
        engine_version=vllm.__version__,
        engine_options={
            "device": "cpu" if is_cpu else "cuda",
            "head_dtype": str(getattr(model_config, "head_dtype", model_config.dtype)).removeprefix("torch."),
            "tensor_parallel_size": config.tensor_parallel_size,
            **options,
        },
        context_length=model_config.max_model_len - 1,
    )
