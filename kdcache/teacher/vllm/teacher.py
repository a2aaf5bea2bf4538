"""The `vllm` teacher: each sequence is a prompt of the offline engine, after which one token is generated and dropped.

There are two routes from the engine's logits to a record:

- worker: `worker.py` selects where the logits are, a chunk of positions at a time; what it keeps of a group comes back as one
  buffer.
- public: the engine's own prompt logprobs, in the flattest container that its API has. vLLM's "prompt logprob i" is the
  distribution for token i given the tokens before it: our position i-1. The last position is that of the generated token. Each
  position has k + 1 columns: the token that came, then the k most probable, among which it may appear again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import msgspec

from kdcache.config.capture import GenerateConfig, TeacherConfig
from kdcache.errors import ConfigError, FormatError, TeacherError
from kdcache.format.manifest import FeatureInfo, SelectionInfo, TeacherIdentity
from kdcache.format.output_projection import OutputProjection
from kdcache.format.record import Distributions, TokenSequence
from kdcache.half_precision import warn_if_emulated
from kdcache.shown import get_logger
from kdcache.teacher.base import check_selectable, check_sequences, no_positions, top_k_of
from kdcache.teacher.batches import groups_of_tokens
from kdcache.teacher.checkpoint import check_model_name
from kdcache.teacher.features import (
    HiddenShape,
    Source,
    check_askable,
    is_read,
    no_features,
    source_of,
    with_no_vectors,
)
from kdcache.teacher.generation import Ending, Generated, Observe, Prompt, check_prompts, end_tokens
from kdcache.teacher.sidecars import no_sidecar
from kdcache.teacher.tokenizer import Tokenizer
from kdcache.teacher.vllm import (
    engine,  # first: it quietens vLLM before that is imported
    inner,
)
from kdcache.teacher.vllm.adapter import adapter_rank
from kdcache.teacher.vllm.generate import Writer, check_read_whole, write_answers
from kdcache.teacher.vllm.options import chunk_positions, engine_options, stored_dtype
from kdcache.teacher.vllm.requests import (
    PROBE_LENGTHS,
    largest_difference,
    probe_texts,
    public_params,
    read_output,
    worker_params,
    worker_steps,
)
from kdcache.teacher.vllm.signatures import (
    WORKER_OPTIONS,
    WORKER_PARTS,
    WORKER_SAMPLING,
    WRITING_PARTS,
    fault_of_parameters,
    faults_of,
    version_note,
)
from kdcache.teacher.vllm.wire import NOTHING, AskedFeatures, pack_asked, pack_requests, read_buffer, with_features
from kdcache.teacher.vllm.worker import CaptureExtension
from kdcache.teacher.vllm.worker_projection import projection_from

# isort: split
import torch
import vllm

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput, SamplingParams
    from vllm.lora.request import LoRARequest

log = get_logger(__name__)

PUBLIC_STEPS_PER_GROUP = 4
"""The engine gets sequences in groups of about this many scheduler steps. The flat container holds about 85 bytes per entry
until it is converted (at k = 64 and 8192 tokens per step, 180 MB per group)."""

PUBLIC_KINDS = ("top_k", "top_p_k")
"""The selections that can be made from the k most probable tokens alone."""

EXTENSION = f"{CaptureExtension.__module__}.{CaptureExtension.__qualname__}"

PROBE_K, TOP_1 = 8, SelectionInfo(kind="top_k", params={"k": 1})
PROBE_ERROR_NATS = {"float32": 1e-3}
"""The most that the routes may differ on the probe, by dtype."""
PROBE_ERROR_HALF_NATS = 0.25
"""In half precision: projecting another number of positions rounds differently, by a unit in a logit's last digit."""


class VllmTeacher:
    """A model in vLLM's offline engine; see the module's docstring."""

    def __init__(self, config: TeacherConfig) -> None:
        """Start the engine. On a CPU it runs in this process and uses the process's threads.

        Raises:
            ConfigError: an adapter of a kind that cannot be captured, or an engine option that a capture refuses.
            TeacherError: the model does not load, or the worker route was demanded and does not work.
        """
        check_model_name(config.model)
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        self._rank = None if config.adapter is None else adapter_rank(config.adapter)
        self._config = config
        self._llm: LLM | None = None
        self._adapter: LoRARequest | None = None
        self._problem = ""
        self._is_in_worker = config.vllm.route != "public" and self._start_with_worker()
        if self._llm is None:
            self._start(None)

    @property
    def identity(self) -> TeacherIdentity:
        """See `Teacher`. context_length is one less than the engine's, which generates a token after each sequence."""
        return self._identity

    @property
    def hidden_shape(self) -> HiddenShape:
        """See `FeatureTeacher`; the public route gives no hidden states."""
        return self._hidden_shape

    @property
    def route(self) -> str:
        """`worker` or `public`."""
        return "worker" if self._is_in_worker else "public"

    def score(
        self, sequences: Sequence[TokenSequence], selection: SelectionInfo, features: Sequence[FeatureInfo] = ()
    ) -> Iterator[Distributions]:
        """See `Teacher`."""
        vocab_size = self._identity.vocab_size
        if self._is_in_worker:
            check_selectable(selection, vocab_size=vocab_size)
        else:
            backend, reason = "vllm (public route)", f" (no worker route: {self._problem})" if self._problem else ""
            if features:
                raise no_features(backend + reason)
            top_k_of(selection, vocab_size=vocab_size, backend=backend, kinds=PUBLIC_KINDS, reason=reason)
        if self._llm is None:
            raise TeacherError(f"the teacher {self._identity.model!r} is closed")
        check_sequences(sequences, self._identity)
        check_askable(features, self._hidden_shape)
        self._show_layers(features)
        return self._score_all(sequences, selection, AskedFeatures(features))

    def generate(
        self, prompts: Sequence[Prompt], config: GenerateConfig, tokenizer: Tokenizer, observe: Observe = lambda _: None
    ) -> Iterator[Generated]:
        """See `GeneratingTeacher`."""
        if self._llm is None:
            raise TeacherError(f"the teacher {self._identity.model!r} is closed")
        check_prompts(prompts, config, self._identity)
        if faults := faults_of(self._llm, WRITING_PARTS):
            raise TeacherError(f"vLLM {vllm.__version__} cannot write answers: {faults[0]}; use teacher.backend transformers")
        check_read_whole(self._llm, prompts, config)
        return self._write(prompts, Ending(config, tokenizer, end_tokens(config, tokenizer.end_ids)), tokenizer, observe)

    def output_projection(self) -> OutputProjection:
        """See `SidecarTeacher`."""
        if not self._is_in_worker:
            raise no_sidecar("output_projection", "vLLM's public route")
        return projection_from(self._fetch("kdcache_projection"))

    def activation_statistics(self, sequences: Sequence[TokenSequence]) -> dict[str, Any]:  # noqa: ARG002
        """See `SidecarTeacher`."""
        raise no_sidecar("activation_statistics", "vLLM, whose fused kernels show no channels,")

    def close(self) -> None:
        """See `Teacher`."""
        if self._llm is not None:
            engine.stop_engine(self._llm)
            self._llm = None
            engine.clean_up()

    def _start(self, extension: str | None, layers: Sequence[int] = ()) -> None:
        config, is_cpu, model_fields = self._config, engine.runs_on_cpu(), engine.model_fields(self._config)
        options = engine_options(config, model_fields, is_cpu=is_cpu, extension=extension, rank=self._rank, layers=layers)
        # Before the engine binds its threads: measuring would unbind them.
        warn_if_emulated(config.dtype if config.dtype != "auto" else stored_dtype(model_fields), "cpu" if is_cpu else "cuda")
        self._eager_python = is_cpu and bool(options["enforce_eager"])
        self._llm = engine.start_engine(config.model, options)
        self._identity = engine.identity_of(config, self._llm)
        if config.adapter is not None:
            self._put_on(config.adapter)
        self._hidden_shape = engine.hidden_shape_of(self._llm)
        self._shown: frozenset[Source] = frozenset()
        self._handed = tuple(layers)
        self._chunk = chunk_positions(config, self._identity.vocab_size, is_cpu=is_cpu)

    def _put_on(self, adapter: str) -> None:
        """Load the adapter; if that fails, raise TeacherError and leave no engine running."""
        try:
            self._adapter = engine.load_adapter(self._engine, adapter)
        except TeacherError:
            self.close()
            raise

    def _start_with_worker(self) -> bool:
        """Start the engine with our part in its worker; if that does not work, say so and leave no engine running.

        Raises:
            TeacherError: it does not work, and the config leaves no other route.
        """
        problem, note = self._try_worker(), version_note(vllm.__version__)
        if problem is None:
            if note is not None:
                log.warning("%s: signatures and the proof on eight tokens are fine; selection happens in its worker", note)
            return True
        self.close()
        problem += f" ({note})" if note is not None else ""
        sentence = f"the teacher {self._config.model!r} cannot be captured inside vLLM's worker: {problem}"
        if self._config.adapter is not None:
            raise TeacherError(f"{sentence}; merge teacher.adapter into its model, and name the merged folder as teacher.model")
        if self._config.vllm.route == "worker" or self._config.strict:
            raise TeacherError(f"{sentence}; set teacher.vllm.route to public, which gives the same numbers, slower")
        log.warning("%s; using vLLM's own prompt logprobs, which are slower", sentence)
        self._problem = problem
        return False

    def _try_worker(self) -> str | None:
        """Start the engine and prove the worker route on a probe; gives what is wrong, or None."""
        if "worker_extension_cls" in self._config.engine_options:
            return "engine_options has a worker_extension_cls of its own"
        wanted = ((vllm.SamplingParams, WORKER_SAMPLING), (vllm.EngineArgs, WORKER_OPTIONS))
        if problem := next(filter(None, (fault_of_parameters(*each) for each in wanted)), None):
            return problem
        self._start(EXTENSION)
        if faults := faults_of(self._engine, WORKER_PARTS):
            return faults[0]
        try:
            problems = [problem for problem in self._call_workers("kdcache_install") if problem]
            return problems[0] if problems else self._misfit_of_adapter() or self._compare_routes()
        except (TeacherError, FormatError) as error:
            return str(error)

    def _misfit_of_adapter(self) -> str | None:
        """Which of the adapter's weights fit no part of the model on any worker: vLLM ignores them silently."""
        if self._adapter is None:
            return None
        answers = self._call_workers("kdcache_misfits")
        misfits = sorted(set.intersection(*map(set, answers)))
        return f"of teacher.adapter, the weights of {', '.join(misfits[:3])} fit no part of the model" if misfits else None

    def _compare_routes(self) -> str | None:
        """Compare both routes on a few tokens; gives what differs by more than the engine's numerics, or None."""
        vocab_size = self._identity.vocab_size
        texts, allowed = (
            probe_texts(self._identity.vocab_size, self._identity.context_length),
            self._engine.llm_engine.model_config.max_logprobs,
        )
        k = min(PROBE_K, vocab_size, allowed if allowed > 0 else vocab_size)
        selection = SelectionInfo(kind="top_k", params={"k": k})
        ours = list(self._score_in_worker(texts, selection))
        # One by one, which batches differently. With an adapter, on a CPU, vLLM's own prompt logprobs need it.
        theirs = [answer for text in texts for answer in self._score_publicly([text], selection)]
        error = max(map(largest_difference, texts, ours, theirs))
        if error <= PROBE_ERROR_NATS.get(self._identity.dtype, PROBE_ERROR_HALF_NATS):
            return None
        return f"on a probe of {sum(PROBE_LENGTHS)} tokens its logprobs are {error:.3g} nats away from vLLM's own"

    def _show_layers(self, features: Sequence[FeatureInfo]) -> None:
        """Have the worker show states inside the model, if any are asked for, and prove them once.

        Raises:
            ConfigError: it cannot.
        """
        wanted = [feature for feature in inner.inner_features(features) if source_of(feature) not in self._shown]
        if not wanted:
            return
        sources, is_eager = frozenset(map(source_of, wanted)), engine.is_eager(self._engine)
        problem = inner.refusal(sources, is_eager=is_eager, num_ranks=engine.num_tensor_ranks(self._engine))
        if problem is None and not is_eager:
            self._hand_out(inner.layers_to_hand_out(sources, self._hidden_shape.num_layers))
        problem = problem or next(filter(None, self._call_workers("kdcache_watch")), None)
        problem = problem or inner.prove(wanted, self._probe_features, is_eager=is_eager)
        if problem is not None:
            raise ConfigError(f"features: vLLM cannot give {wanted[0].name!r}: {problem}")
        self._shown |= sources

    def _hand_out(self, layers: set[int]) -> None:
        """Start the engine again with a model that hands out these layers, too, unless it does already."""
        if layers <= set(self._handed):
            return
        if "worker_cls" in self._config.engine_options:
            raise ConfigError(f"features: engine_options has a worker_cls of its own; leave it out, or {inner.EAGER}")
        log.info("starting the engine again: a compiled model must know at its start that it shows its layers")
        self.close()
        self._start(EXTENSION, sorted(layers | set(self._handed)))
        if problem := next(filter(None, self._call_workers("kdcache_install")), None):
            raise TeacherError(f"the teacher {self._config.model!r} cannot be captured inside vLLM's worker: {problem}")

    def _probe_features(self, asked: AskedFeatures) -> Iterator[Distributions]:
        return self._score_in_worker(probe_texts(self._identity.vocab_size, self._identity.context_length), TOP_1, asked)

    def _score_all(
        self, sequences: Sequence[TokenSequence], selection: SelectionInfo, asked: AskedFeatures
    ) -> Iterator[Distributions]:
        num_tokens, vocab_size = self._config.tokens_per_forward, self._identity.vocab_size
        steps = (
            worker_steps(selection, asked.features, vocab_size, num_tokens) if self._is_in_worker else PUBLIC_STEPS_PER_GROUP
        )
        for group in groups_of_tokens(sequences, steps * num_tokens):
            if self._is_in_worker:
                yield from self._score_in_worker(group, selection, asked)
            else:
                yield from self._score_publicly(group, selection)

    def _score_in_worker(
        self, group: Sequence[TokenSequence], selection: SelectionInfo, features: AskedFeatures = NOTHING
    ) -> Iterator[Distributions]:
        asked = [sequence for sequence in group if is_read(sequence, features.features)]
        if not asked:
            return (with_no_vectors(no_positions(selection), features.features) for _ in group)
        num_positions = sum(len(sequence.positions_P) for sequence in asked)
        plain, wanted = msgspec.to_builtins(selection), pack_asked(features, asked)
        began = self._call_workers("kdcache_begin", num_positions, self._chunk, plain, self._identity.vocab_size, wanted)
        self._raise_for(next(filter(None, began), None))
        self._generate(asked, [worker_params(extra_args) for extra_args in pack_requests(asked)])
        buffer = self._fetch_buffer()
        if wanted is None:
            return read_buffer(group, selection, buffer)
        answers = zip(group, read_buffer(group, selection, buffer), strict=True)
        problem, *packed = self._fetch("kdcache_features")
        self._raise_for(problem)
        return with_features(answers, features.features, packed)

    def _fetch(self, method: str) -> Any:
        """What the one worker says whose answer counts."""
        packed = [packed for packed in self._call_workers(method) if packed is not None]
        if len(packed) != 1:
            raise TeacherError(
                f"{len(packed)} of vLLM's workers answered for the teacher {self._identity.model!r}, expected one"
            )
        return packed[0]

    def _fetch_buffer(self) -> list[Any]:
        """What was selected of the group; raises TeacherError if the selection failed."""
        problem, *buffer = self._fetch("kdcache_end")
        self._raise_for(problem)
        return buffer

    def _raise_for(self, problem: str | None) -> None:
        if problem is not None:
            raise TeacherError(
                f"the selection in vLLM's worker failed on the teacher {self._identity.model!r}: {problem}; where memory ran "
                f"out, make teacher.chunk_positions ({self._config.chunk_positions}) smaller"
            )

    def _score_publicly(self, group: Sequence[TokenSequence], selection: SelectionInfo) -> Iterator[Distributions]:
        k = selection.params["k"]
        asked = [sequence for sequence in group if sequence.supervised_N.any()]
        outputs = self._generate(asked, [public_params(k)] * len(asked))
        outputs.reverse()
        for sequence in group:
            # Popped, so that a group's containers are freed as they are read.
            yield read_output(outputs.pop(), sequence, selection) if sequence.supervised_N.any() else no_positions(selection)

    def _generate(self, sequences: Sequence[TokenSequence], params: list[SamplingParams]) -> list[RequestOutput]:
        if not sequences:
            return []
        requests: list[Any] = [{"prompt_token_ids": sequence.input_ids_N.tolist()} for sequence in sequences]
        with self._translated_errors(), self._python_as_it_is():
            return self._engine.generate(requests, params, lora_request=self._adapter, use_tqdm=False)

    def _write(self, prompts: Sequence[Prompt], ending: Ending, tokenizer: Tokenizer, observe: Observe) -> Iterator[Generated]:
        with self._translated_errors(), self._python_as_it_is():
            answers = list(write_answers(Writer(self._engine, self._adapter), prompts, ending, tokenizer, observe))
        yield from answers

    def _python_as_it_is(self) -> AbstractContextManager[Any]:
        # vLLM's sampler would compile a helper on first use, which costs up to twenty seconds and saves microseconds.
        return torch.compiler.set_stance("force_eager") if self._eager_python else nullcontext()

    def _call_workers(self, method: str, *args: Any) -> list[Any]:
        with self._translated_errors():
            return self._engine.collective_rpc(method, args=args)

    @property
    def _engine(self) -> LLM:
        if self._llm is None:
            raise TeacherError(f"the teacher {self._identity.model!r} was closed while it was scoring")
        return self._llm

    @contextmanager
    def _translated_errors(self) -> Iterator[None]:
        try:
            yield
        except TeacherError:
            raise
        except Exception as error:  # an engine runs out of memory in a dozen types of error
            self.close()  # requests of the failed call are still in its queue
            model = self._identity.model
            raise TeacherError(f"vLLM failed on the teacher {model!r}: {engine.reason_of(error)}") from error
