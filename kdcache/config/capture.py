"""What a capture may be asked for. Frozen, keyword-only, unknown keys refused; imports nothing heavy.

`configs/capture-*.yaml` are complete, commented examples; `kdcache.config.load` reads them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from kdcache import extensions
from kdcache.config.base import Config, Fraction, NonNegative, NonNegativeFloat, Positive, Seconds
from kdcache.config.chat import check_arguments, parse_moment
from kdcache.config.remote import RemoteConfig
from kdcache.config.secrets import refuse_secrets
from kdcache.config.selection import CodecConfig, SelectionConfig
from kdcache.config.teacher import TeacherConfig


class WindowConfig(Config, frozen=True, kw_only=True):
    """How a text longer than a sequence may be is treated. Nothing is dropped without being asked for and counted.

    Attributes:
        size: most tokens in a sequence.
        policy: `split` cuts a long item into windows, one after another; `truncate` keeps the first window and reports how many
            tokens were left out; `error` refuses a long item, naming it.
        overlap: `split` only: tokens of the window before that each further window starts with, as context; each position is
            recorded once, the last one of them in the later window, where its target is.
    """

    size: Positive = 1024
    policy: Literal["split", "truncate", "error"] = "split"
    overlap: NonNegative = 0

    def __post_init__(self) -> None:
        if self.overlap >= self.size:
            raise ValueError(f"overlap is {self.overlap}, but must be smaller than size, {self.size}")
        if self.overlap and self.policy != "split":
            raise ValueError("overlap is for policy 'split' alone")


class InputConfig(Config, frozen=True, kw_only=True):
    """What the teacher reads.

    Attributes:
        format: `txt` (each file is one text), `lines` (each line of a text file is one), `jsonl` (JSON objects on lines, in an
            array, or one after another), `parquet`, `arrow` (IPC file or stream), or `dataset` (the `datasets` library: a hub
            name or a local path). Text and JSON may be compressed by gzip or zstd.
        paths: files, folders or glob patterns, for all formats but `dataset`; folders are searched for the format's endings
            (`jsonl`: .jsonl, .ndjson, .json, also with .gz or .zst). Relative to the working directory; read in sorted order.
        dataset: `dataset` only: hub name or local path.
        dataset_config: `dataset` only: the configuration's name, where there are several.
        split: `dataset` only: which split, as `datasets.load_dataset` takes it.
        revision: `dataset` only: hub commit or tag. Pin it when streaming: a stream's content is not hashed.
        streaming: `dataset` only: read without downloading it whole; needs `limit`.
        limit: most items to read; null for all.
        content: what an item is: `text`, `messages` (a chat: list of {role, content}), or `ids` (token ids).
        field: the column or key that holds it; null for `text`, `messages` or `input_ids`, by content. A chat is looked for in
            `conversations`, `conversation`, `chat` and `prompt` with `completion` as well.
        domain_field: the column or key that holds an item's domain (`wiki`, `code`): text that is kept with its sequences, for
            `kdcache derive --where "domain == 'code'"`; null for none.
        supervise: `all` positions, or only those that predict what the assistant says (`messages` only). Messages of weight 0
            (keys `weight`, `train`, `training`) are left out of either.
        one_item_per: `messages` only: `chat`, in which every answer is learnt as the template writes it there; or `answer`:
            each of the assistant's messages is the last one of an item of its own, and alone learnt there. For templates that
            write a message otherwise when more follows, such as those that leave out earlier thoughts.
        add_special_tokens: text only: let the tokenizer add its own (usually BOS).
        chat_template: path of a Jinja file to use in place of the tokenizer's template; null for the tokenizer's own.
        template_arguments: variables for the chat template, as in {enable_thinking: false}; a row's `chat_template_kwargs` come
            before them.
        template_time: what time it is for a chat template that writes the date, as in 2026-01-31; null for when the capture
            began, which is kept for every rank and resume.
        window: how long texts are treated.
    """

    format: str
    paths: tuple[str, ...] = ()
    dataset: str | None = None
    dataset_config: str | None = None
    split: str = "train"
    revision: str | None = None
    streaming: bool = False
    limit: Positive | None = None
    content: Literal["text", "messages", "ids"] = "text"
    field: str | None = None
    domain_field: str | None = None
    supervise: Literal["all", "assistant"] = "all"
    add_special_tokens: bool = True
    one_item_per: Literal["chat", "answer"] = "chat"
    chat_template: str | None = None
    template_arguments: dict[str, Any] = msgspec.field(default_factory=dict)
    template_time: str | None = None
    window: WindowConfig = WindowConfig()

    def __post_init__(self) -> None:
        if not extensions.is_known("inputs", self.format):
            raise ValueError(f"format is {self.format!r}, but must be one of {', '.join(extensions.names('inputs'))}")
        if self.format == "dataset":
            if self.dataset is None or self.paths:
                raise ValueError("format 'dataset' takes `dataset` (a hub name or a path) and no `paths`")
            if self.streaming and self.limit is None:
                raise ValueError("streaming needs `limit`: the plan is made before anything is read")
        elif not self.paths or self.dataset is not None or self.streaming:
            raise ValueError(f"format {self.format!r} takes `paths`, and neither `dataset` nor `streaming`")
        if self.supervise == "assistant" and self.content != "messages":
            raise ValueError("supervise 'assistant' needs content 'messages'")
        is_of_chats = self.one_item_per != "chat" or self.template_arguments or self.template_time is not None
        if is_of_chats and self.content != "messages":
            raise ValueError("one_item_per, template_arguments and template_time are for content 'messages' alone")
        check_arguments(self.template_arguments)
        if self.template_time is not None:
            parse_moment(self.template_time)


class GenerateConfig(Config, frozen=True, kw_only=True):
    """How the teacher answers prompts, where it writes the texts itself. The input's items are the prompts: texts, chats up to
    the assistant's turn, or ids. As it is, it draws from its whole distribution.

    Only the answers are recorded: the positions that predict their tokens, the token that ends them included. A stop string's
    tokens belong to the answer. The distributions are the teacher's own, before temperature and filters.

    Attributes:
        temperature: of the draws; 0 takes the most probable token each time.
        top_k: draw among so many most probable tokens; 0 for all.
        top_p: draw among the most probable tokens that reach this mass together.
        min_p: draw among tokens of at least this share of the most probable one's probability.
        n: answers to each prompt.
        max_tokens: most tokens of an answer. With its prompt it must fit into input.window.size.
        stop: texts after which an answer ends.
        stop_token_ids: tokens after which an answer ends, beside the model's and the tokenizer's end tokens.
        ignore_eos: do not end at the model's and the tokenizer's end tokens.
        seed: of the draws; each answer's is a function of it, the prompt's tokens and the answer's number.
        long_prompts: a prompt that does not leave room for max_tokens in input.window.size: `error` names it and stops, `skip`
            leaves it out and counts it.
        last_answer: a chat that ends with the assistant's words: `error` names it and stops, `skip` leaves these
            words out, counts them, and has the teacher answer instead.
        capture_filtered: record the distributions that were drawn from, after temperature and filters, in place of the
            teacher's own.
    """

    temperature: NonNegativeFloat = 1.0
    top_k: NonNegative = 0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    min_p: Fraction = 0.0
    n: Positive = 1
    max_tokens: Positive = 256
    stop: tuple[Annotated[str, Meta(min_length=1)], ...] = ()
    stop_token_ids: tuple[NonNegative, ...] = ()
    ignore_eos: bool = False
    seed: NonNegative = 0
    long_prompts: Literal["error", "skip"] = "error"
    last_answer: Literal["error", "skip"] = "error"
    capture_filtered: bool = False

    def __post_init__(self) -> None:
        if self.temperature == 0 and self.n > 1:
            raise ValueError(f"n is {self.n}, but at temperature 0 all answers to a prompt are the same; set n to 1")
        if self.temperature == 0 and self.capture_filtered:
            raise ValueError("capture_filtered needs a temperature above 0: at 0 nothing is drawn, so there is no distribution")


class FeatureConfig(Config, frozen=True, kw_only=True):
    """Hidden states of one layer, kept beside the distributions, at supervised positions alone.

    Attributes:
        layer: 0 for what the embeddings give, i for what layer i gives, counted from 1; -1 for the last one, which is behind
            the final norm: what the output projection takes. The convention of `output_hidden_states` in transformers.
        dtype: `float16`, 2 bytes per number, off by at most |x| 2^-11, and nothing beyond 65504; or `int8`, 1 byte per number
            and 4 per row, off by at most 1/254 of the row's largest magnitude.
        pooling: `none`, a row per position; `mean` of a sequence's positions, or the `last` of them: one row per sequence.
        name: of the column, in letters, digits and underscores; null for one that says layer and pooling, as in `hidden_last`
            or `hidden_12_mean`.
    """

    layer: Annotated[int, Meta(ge=-1)]
    dtype: Literal["float16", "int8"] = "float16"
    pooling: Literal["none", "mean", "last"] = "none"
    name: str | None = None

    def __post_init__(self) -> None:
        if self.name is not None and not (self.name.isascii() and self.name.replace("_", "a").isalnum()):
            raise ValueError(f"name is {self.name!r}, but it is for a column: letters, digits and underscores")

    @property
    def full_name(self) -> str:
        """The name that the cache gives it."""
        layer = "last" if self.layer == -1 else str(self.layer)
        return self.name or f"hidden_{layer}" + (f"_{self.pooling}" if self.pooling != "none" else "")


class ShardConfig(Config, frozen=True, kw_only=True):
    """How the work is cut into units, each of which becomes one shard.

    Attributes:
        unit_chars: characters of text (ids: tokens) per unit. A unit is what a crash can lose.
        unit_items: most items per unit; with `streaming`, the exact number.
        record_batch_bytes: about this many bytes of sequences in each Arrow record batch.
    """

    unit_chars: Positive = 2_000_000
    unit_items: Positive = 10_000
    record_batch_bytes: Positive = 4 * 1024 * 1024


class RunConfig(Config, frozen=True, kw_only=True):
    """How the work is done: where, by how many, and what happens when some of it fails. Decides nothing of what the cache
    holds, so it may be another in each run of the same capture.

    Attributes:
        executor: `local`, this process; or `ray`, which spreads the units over `replicas` actors of a Ray cluster.
        rank: `local` only: this process does the units u with u % world_size == rank. Start one process for each rank, in any
            order, at any time, on machines that share the input and `out` (a network disk or an object store).
        world_size: `local` only: ranks that share the units.
        replicas: `ray` only: actors, each with a teacher of its own. They may be more than the cluster has room for: the
            others start when there is room.
        gpus_per_replica: `ray` only: GPUs that each actor asks the cluster for; null for as many as its engine computes on
            (for vLLM tensor x pipeline parallel), or none where the cluster has none at the start. Set it for a cluster that
            grows from no GPUs, and for transformers with a `device_map`.
        ray_address: `ray` only: of a running cluster; `local` starts one on this machine; null joins the one that RAY_ADDRESS
            or this machine knows, and else starts one.
        retries: how often a unit that failed is tried again before it is given up.
        max_failed: most units to set aside, with their reason, while the rest goes on; the next run tries them again. With 0
            the first unit that keeps failing stops the capture.
        skip_failing: find the sequences that make a unit fail, skip them, name them, and publish the rest.
        stall_seconds: when the teacher has answered nothing for so long, say so, print every thread's stack and stop; null to
            wait for ever.
        load_stall_seconds: the same for loading the teacher, a download of its weights included.
        progress_path: file that holds the state of the run as JSON, rewritten every few seconds; null for
            `<out>.progress.json`, with the rank in its name where there are several. Of a cache in an object store the
            file is in the working directory.
    """

    executor: Literal["local", "ray"] = "local"
    rank: NonNegative = 0
    world_size: Positive = 1
    replicas: Positive = 1
    gpus_per_replica: NonNegative | None = None
    ray_address: str | None = None
    retries: NonNegative = 1
    max_failed: NonNegative = 0
    skip_failing: bool = False
    stall_seconds: Seconds | None = 1800.0
    load_stall_seconds: Seconds | None = 7200.0
    progress_path: str | None = None

    def __post_init__(self) -> None:
        if self.rank >= self.world_size:
            raise ValueError(f"rank is {self.rank}, but must be below world_size, {self.world_size}: ranks count from 0")
        if self.executor == "ray" and self.world_size > 1:
            raise ValueError("executor 'ray' spreads the units itself: use `replicas`, not `world_size`")
        is_of_ray = self.replicas > 1 or self.gpus_per_replica is not None or self.ray_address is not None
        if self.executor != "ray" and is_of_ray:
            raise ValueError("replicas, gpus_per_replica and ray_address are for executor 'ray' alone")


class CaptureConfig(Config, frozen=True, kw_only=True):
    """A whole capture: input -> teacher -> selection -> codec -> cache.

    Attributes:
        out: directory of the new cache, created if missing; or a URI, `s3://BUCKET/PREFIX` or `gs://BUCKET/PREFIX`. One capture
            per directory.
        remote: how an object store is reached.
        generate: null: the teacher reads the input. A section: it answers it.
        features: hidden states to keep beside the distributions, as in [{layer: -1, dtype: int8}]; each with `layer` (0 what
            the embeddings give, i what layer i gives, -1 the last, which the output projection takes), `dtype` (float16, int8),
            `pooling` (none: a row per position; mean, last: one per sequence) and `name`. A row takes the model's hidden size
            x 2 bytes (float16) or + 4 bytes (int8); --dry-run says what it comes to.
    """

    input: InputConfig
    teacher: TeacherConfig
    generate: GenerateConfig | None = None
    selection: SelectionConfig = SelectionConfig()
    features: tuple[FeatureConfig, ...] = ()
    codec: CodecConfig = CodecConfig()
    out: str
    shards: ShardConfig = ShardConfig()
    remote: RemoteConfig = RemoteConfig()
    run: RunConfig = RunConfig()

    @property
    def codec_id(self) -> str:
        """The codec that `codec.id` names; for `auto` the one that suits the selection."""
        if self.codec.id != "auto":
            return self.codec.id
        return "packed" if self.selection.kind in ("top_k", "top_p_k") else "archive"

    def __post_init__(self) -> None:
        self._check_features()
        recorded = {name: getattr(self, name) for name in self.__struct_fields__ if name not in ("run", "remote")}
        refuse_secrets(recorded, "the cache's manifests")
        if self.generate is None:
            return
        if self.teacher.backend == "served":
            raise ValueError(
                "generate: the served teacher only reads; use teacher.backend vllm or transformers to have the teacher answer"
            )
        if self.generate.max_tokens >= self.input.window.size:
            raise ValueError(
                f"generate.max_tokens is {self.generate.max_tokens} and input.window.size, for prompt and answer together, "
                f"{self.input.window.size}; raise the window, up to the teacher's context, or make max_tokens smaller"
            )
        cuts = self.input.window.policy == "truncate" or self.input.window.overlap
        if cuts or self.input.supervise != "all" or self.input.one_item_per != "chat":
            raise ValueError(
                "with `generate`, prompts are not cut and the answers are what is recorded: leave out input.window.policy, "
                "input.window.overlap, input.supervise and input.one_item_per; generate.long_prompts says what becomes of long "
                "prompts"
            )

    def _check_features(self) -> None:
        names = [feature.full_name for feature in self.features]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"features: two of them have the name {twice!r}; give one of them another `name`")
        if self.features and self.teacher.backend == "served":
            raise ValueError("features: a server gives no hidden states; use teacher.backend vllm or transformers")
        if self.features and self.teacher.vllm.route == "public":
            raise ValueError("features: vLLM's public route gives no hidden states; set teacher.vllm.route to worker or auto")
