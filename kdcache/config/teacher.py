"""The model that is captured, and how it is run; the part `teacher` of a capture's config."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from kdcache.config.server import ServerConfig
from kdcache.credentials import find_secret

Positive = Annotated[int, Meta(ge=1)]


class TeacherConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The model that is captured.

    Attributes:
        model: hub id or local folder in the Hugging Face layout; for `fake`, any name.
        backend: `vllm`, `transformers`, `served` (a server that runs already, see `server`), `fake`, or `auto`: vLLM where it
            is installed and imports, else transformers.
        revision: hub commit or tag; null for the default.
        adapter: vLLM, worker route: local folder of a LoRA adapter (PEFT's format) to put on the model; null for none. One that
            changes embeddings or output projection is refused: merge it into the model.
        tokenizer: hub id or folder; null for the model's own.
        dtype: of weights and activations; `auto` takes the checkpoint's. Where a CPU only emulates it, one warning says how
            much faster float32 would be.
        batch_tokens: most tokens in one forward pass (transformers) or one scheduler step (vLLM).
        positions_per_chunk: positions whose logits exist at once (vLLM: worker route); memory is this x vocabulary x 2 bytes (4
            in float32), and on a GPU up to 256 MiB beside them for the selection, 512 MiB with a sampler's filters.
        num_threads: CPU threads of the model; null for the library's default.
        gpu_memory_utilization: vLLM on a GPU: share of its memory.
        tensor_parallel_size: vLLM: GPUs that hold one model.
        route: vLLM: where entries are selected. `worker`: inside the engine, where that proves right at its start; `public`:
            vLLM's own prompt logprobs, the same numbers several times slower; `auto`: `worker`, else `public` with a warning.
        strict: stop instead of warning where `auto` would take second best (`public`, or transformers for a broken vLLM), and
            where a server's tokenizer cannot be compared with ours.
        quantization: vLLM's name of a method, or null for what the checkpoint says.
        engine_options: further keyword arguments of `vllm.LLM` or `from_pretrained`. Those that can move the teacher's numbers
            are part of its identity. `trust_remote_code: true` runs Python code that lies beside the model, with your rights:
            read that code first.
        vocab_size: `fake` only.
        context_length: `fake` only.
        seed: `fake` only.
        server: `served` only: where it is, and how it is asked.
    """

    model: str
    backend: str = "auto"
    revision: str | None = None
    adapter: str | None = None
    tokenizer: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    batch_tokens: Positive = 8192
    positions_per_chunk: Positive = 512
    num_threads: Positive | None = None
    gpu_memory_utilization: Annotated[float, Meta(gt=0, le=1)] = 0.9
    tensor_parallel_size: Positive = 1
    route: Literal["auto", "worker", "public"] = "auto"
    strict: bool = False
    quantization: str | None = None
    engine_options: dict[str, str | int | float | bool | dict[str, Any] | None] = {}
    vocab_size: Positive = 1000
    context_length: Positive = 4096
    seed: int = 0
    server: ServerConfig = ServerConfig()

    @property
    def trusts_remote_code(self) -> bool:
        """Whether Python code that lies beside the model may run: only where this config itself says so."""
        return self.engine_options.get("trust_remote_code") is True

    def __post_init__(self) -> None:
        secret = find_secret(self.engine_options, path="engine_options")
        if secret is not None:
            raise ValueError(
                f"{secret} is a secret by its name or its look, and these options are written into the cache; leave it "
                "out; set HF_TOKEN in the environment, or the variable that the engine reads"
            )
        if self.backend == "served" and self.server.url is None:
            raise ValueError("backend 'served' needs server.url, as in http://host:8000/v1")
        if self.backend != "served" and self.server != ServerConfig():
            raise ValueError(f"server is for backend 'served' alone, not for {self.backend!r}")
        if self.adapter is not None and (self.backend not in ("auto", "vllm") or self.route == "public"):
            raise ValueError(
                f"adapter is for backend 'vllm' on its worker route, not for {self.backend!r} on route {self.route!r}; "
                "elsewhere, merge it into its model and name the merged folder"
            )
