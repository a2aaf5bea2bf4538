"""The model that is captured, and how it is run; the section `teacher` of a capture's config."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from kdcache import extensions
from kdcache.config.base import Config, Positive
from kdcache.config.server import ServerConfig
from kdcache.credentials import find_secret


class VllmConfig(Config, frozen=True, kw_only=True):
    """How vLLM runs the teacher.

    Attributes:
        gpu_memory_utilization: share of a GPU's memory that the engine may use.
        tensor_parallel_size: GPUs that hold one model together.
        route: where entries are selected. `worker` selects inside the engine, if that is proven correct when it starts;
            `public` reads vLLM's own prompt logprobs: the same numbers, several times slower; `auto` tries `worker` and falls
            back to `public` with a warning.
    """

    gpu_memory_utilization: Annotated[float, Meta(gt=0, le=1)] = 0.9
    tensor_parallel_size: Positive = 1
    route: Literal["auto", "worker", "public"] = "auto"


class FakeConfig(Config, frozen=True, kw_only=True):
    """The fake teacher, whose distributions are made of hashes: for trying out the commands without a model.

    Attributes:
        vocab_size: token ids that its distributions cover.
        context_length: most tokens in a sequence.
        seed: another seed is another teacher.
    """

    vocab_size: Positive = 1000
    context_length: Positive = 4096
    seed: int = 0


class TeacherConfig(Config, frozen=True, kw_only=True):
    """The model that is captured.

    Attributes:
        model: hub id or local folder in the Hugging Face layout; for `fake`, any name.
        backend: `vllm`, `transformers`, `served` (a server that is already running, see `server`), `fake`, or `auto`: vLLM
            where it is installed and imports, otherwise transformers; or the name of an installed package's backend.
        revision: hub commit or tag; null for the default.
        adapter: vLLM, worker route: local folder of a LoRA adapter (PEFT's format) to apply to the model; null for none. One
            that changes embeddings or output projection is refused: merge it into the model.
        tokenizer: hub id or folder; null for the model's own.
        dtype: that of weights and activations; `auto` takes the checkpoint's. Where a CPU only emulates it, one warning says
            how much faster float32 would be.
        quantization: vLLM's name of a method, or null for what the checkpoint says. With `served`, what you know of the
            server's.
        tokens_per_forward: most tokens in one forward pass (transformers) or one scheduler step (vLLM).
        chunk_positions: positions whose logits exist at once (vLLM: worker route); memory is this x vocabulary x 2 bytes (4
            in float32), and on a GPU up to 256 MiB more for the selection, 512 MiB with a sampler's filters.
        num_threads: CPU threads of the model; null for the library's default.
        strict: fail instead of warning where `auto` would fall back (to vLLM's public route, or from a broken vLLM to
            transformers), and where a server's tokenizer cannot be compared with ours.
        engine_options: further keyword arguments of `vllm.LLM`, `from_pretrained` or another package's backend. Those that
            can change the teacher's numbers are part of its identity. `trust_remote_code: true` runs Python code that comes
            with the model, with your rights: read that code first.
        vllm: backend `vllm` only: how it runs the teacher.
        fake: backend `fake` only: its size and seed.
        server: backend `served` only: where the server is, and how it is asked.
    """

    model: str
    backend: str = "auto"
    revision: str | None = None
    adapter: str | None = None
    tokenizer: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantization: str | None = None
    tokens_per_forward: Positive = 8192
    chunk_positions: Positive = 512
    num_threads: Positive | None = None
    strict: bool = False
    engine_options: dict[str, str | int | float | bool | dict[str, Any] | None] = msgspec.field(default_factory=dict)
    vllm: VllmConfig = VllmConfig()
    fake: FakeConfig = FakeConfig()
    server: ServerConfig = ServerConfig()

    @property
    def trusts_remote_code(self) -> bool:
        """Whether Python code that comes with the model may run: only where this config itself says so."""
        return self.engine_options.get("trust_remote_code") is True

    def __post_init__(self) -> None:
        if not extensions.is_known("teachers", self.backend):
            raise ValueError(f"backend is {self.backend!r}, expected one of {', '.join(extensions.names('teachers'))}")
        secret = find_secret(self.engine_options, path="engine_options")
        if secret is not None:
            raise ValueError(
                f"{secret} looks like a secret, by name or value, and would be written into the cache; remove it, and set "
                "HF_TOKEN in the environment, or the variable that the engine reads"
            )
        self._check_sections()
        if self.backend == "served" and self.server.url is None:
            raise ValueError("backend 'served' needs server.url, as in http://host:8000/v1")
        if self.adapter is not None and (self.backend not in ("auto", "vllm") or self.vllm.route == "public"):
            raise ValueError(
                f"adapter is for backend 'vllm' on its worker route, not for {self.backend!r} on route {self.vllm.route!r}; "
                "otherwise merge it into its model and name the merged folder"
            )

    def _check_sections(self) -> None:
        vllm_is_possible = self.backend in ("auto", "vllm")
        for name, backend, section, is_possible in (
            ("vllm", "vllm", self.vllm, vllm_is_possible),
            ("fake", "fake", self.fake, self.backend == "fake"),
            ("server", "served", self.server, self.backend == "served"),
        ):
            if section != type(section)() and not is_possible:
                raise ValueError(f"{name} is for backend {backend!r} only, not for {self.backend!r}")
