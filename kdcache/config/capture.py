"""The config of a capture.

`configs/capture-*.yaml` are complete, commented examples; `kdcache.config.load` reads them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from kdcache import extensions
from kdcache.config.base import Config, Fraction, NonNegative, NonNegativeFloat, Positive, Seconds
from kdcache.config.chat import check_arguments, parse_moment
from kdcache.config.features import FeatureConfig as FeatureConfig
from kdcache.config.remote import RemoteConfig
from kdcache.config.secrets import refuse_secrets
from kdcache.config.selection import CodecConfig, SelectionConfig
from kdcache.config.teacher import TeacherConfig


class WindowConfig(Config, frozen=True, kw_only=True):
    """What happens to a text that is longer than a sequence. Nothing is dropped silently: whatever is left out is counted.

    Attributes:
        size: most tokens in a sequence.
        policy: `split` cuts a long item into consecutive windows; `truncate` keeps the first window and reports how many tokens
            were left out; `error` names the long item and stops.
        overlap: `split` only: how many tokens of the previous window each further window repeats, as context. Each position is
            recorded once. The last repeated position belongs to the later window, which holds its target.
    """

    size: Positive = 1024
    policy: Literal["split", "truncate", "error"] = "split"
    overlap: NonNegative = 0

    def __post_init__(self) -> None:
        if self.overlap >= self.size:
            raise ValueError(f"overlap is {self.overlap}, but must be smaller than size, {self.size}")
        if self.overlap and self.policy != "split":
            raise ValueError("overlap is for policy 'split' only")


class InputConfig(Config, frozen=True, kw_only=True):
    """What the teacher reads.

    Attributes:
        format: `txt` (each file is one text), `lines` (each line of a text file is one text), `jsonl` (JSON objects, one per
            line, in an array, or one after another), `parquet`, `arrow` (IPC file or stream), `dataset` (a hub name or local
            path for the `datasets` library), or the format of an installed package. Text and JSON may be compressed with gzip
            or zstd.
        paths: files, folders or glob patterns, for all formats except `dataset`. Folders are searched for the format's endings
            (`jsonl`: .jsonl, .ndjson, .json, also with .gz or .zst). Relative to the working directory; read in sorted order.
        dataset: `dataset` only: hub name or local path.
        dataset_config: `dataset` only: name of the configuration, if there are several.
        split: `dataset` only: which split, as `datasets.load_dataset` takes it.
        revision: `dataset` only: hub commit or tag. Pin it when streaming: the content of a stream is not hashed.
        streaming: `dataset` only: read it without downloading all of it first; needs `limit`.
        limit: most items to read; null for all.
        content: what an item is: `text`, `messages` (a chat: a list of {role, content}), or `ids` (token ids).
        field: the column or key that holds it. null for `text`, `messages` or `input_ids`, depending on the content; a chat is
            also looked for in `conversations`, `conversation`, `chat`, and in `prompt` with `completion`.
        domain_field: the column or key that holds an item's domain (`wiki`, `code`), a text that is stored with its sequences
            for `kdcache derive --where "domain == 'code'"`; null for none.
        group_field: the column or key of what the answers to one prompt have in common, a text or a whole number; null for
            none. The loader then puts both answers of a pair into one batch (`loader.pairs`).
        preference_field: the column or key that says which answer of a group is which: `chosen` or `rejected`; null for none.
        supervise: `all` positions, or only those that predict what the `assistant` says (`messages` only). Messages of weight 0
            (keys `weight`, `train`, `training`) are left out in both cases.
        one_item_per: `messages` only: `chat` trains on every answer as the template writes it in the whole chat. `answer` makes
            an item of each of the assistant's messages, which is the last message there and the only one that is trained on:
            for templates that write a message differently when more follows, such as those that drop earlier thoughts.
        add_special_tokens: text only: let the tokenizer add its own (usually BOS).
        chat_template: path of a Jinja file to use instead of the tokenizer's template; null for the tokenizer's own.
        template_arguments: variables for the chat template, as in {enable_thinking: false}; an item's `chat_template_kwargs`
            take precedence.
        template_time: the time for a chat template that writes the date, as in 2026-01-31. null for the time at which the
            capture started, which is recorded and used again by every rank and after every stop.
        window: what happens to long texts.
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
    group_field: str | None = None
    preference_field: str | None = None
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
                raise ValueError("streaming needs `limit`, because the plan is made before anything is read")
        elif not self.paths or self.dataset is not None or self.streaming:
            raise ValueError(f"format {self.format!r} takes `paths`, and neither `dataset` nor `streaming`")
        if self.supervise == "assistant" and self.content != "messages":
            raise ValueError("supervise 'assistant' needs content 'messages'")
        is_of_chats = self.one_item_per != "chat" or self.template_arguments or self.template_time is not None
        if is_of_chats and self.content != "messages":
            raise ValueError("one_item_per, template_arguments and template_time are for content 'messages' only")
        if (self.group_field is None) != (self.preference_field is None):
            raise ValueError("group_field and preference_field belong together: one names the prompt, the other its answers")
        if self.group_field is not None and (self.window.policy == "split" or self.one_item_per == "answer"):
            raise ValueError(
                "group_field: an answer must be one sequence to be one of a pair; use window.policy 'error' or 'truncate' and "
                "one_item_per 'chat'"
            )
        check_arguments(self.template_arguments)
        if self.template_time is not None:
            parse_moment(self.template_time)


class GenerateConfig(Config, frozen=True, kw_only=True):
    """How the teacher answers prompts, when it writes the texts itself. The input's items are the prompts: texts, chats up
    to the assistant's turn, or ids. By default it draws from its whole distribution.

    Only the answers are recorded: the positions that predict their tokens, including the token that ends them. A stop string's
    tokens belong to the answer. The distributions are the teacher's own, before temperature and filters.

    Attributes:
        temperature: that of the draws; 0 takes the most probable token each time.
        top_k: draw among this many most probable tokens; 0 for all.
        top_p: draw among the most probable tokens that together reach this mass.
        min_p: draw among tokens with at least this share of the most probable token's probability.
        n: answers per prompt.
        max_tokens: most tokens of an answer. Prompt and answer must fit into input.window.size.
        stop: texts that end an answer.
        stop_token_ids: tokens that end an answer, in addition to the end tokens of model and tokenizer.
        ignore_eos: do not end at the end tokens of model and tokenizer.
        seed: that of the draws. Each answer's own seed is a function of this one, the prompt's tokens and which answer it is.
        long_prompts: a prompt that leaves less room than max_tokens in input.window.size: `error` names it and stops, `skip`
            leaves it out and counts it.
        last_answer: a chat that ends with a message of the assistant: `error` names it and stops, `skip` leaves that message
            out, counts it, and has the teacher answer instead.
        capture_filtered: record the distributions that the tokens were drawn from, after temperature and filters, instead of
            the teacher's own.
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
            raise ValueError(
                "capture_filtered needs a temperature above 0: at 0 nothing is drawn, so there is nothing to record"
            )


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
    """How the work is done: where, by how many processes, and what happens when part of it fails. Does not affect the
    cache's contents and may change between runs.

    Attributes:
        executor: `local`, this process; or `ray`, which spreads the units over `replicas` actors of a Ray cluster.
        rank: `local` only: this process captures the units u with u % world_size == rank. Start one process per rank, in any
            order, at any time, on machines that share the input and `out` (a network disk or an object store).
        world_size: `local` only: ranks that share the units.
        replicas: `ray` only: actors, each with its own teacher. There may be more than the cluster has room for: the others
            start as room becomes free.
        gpus_per_replica: `ray` only: GPUs that each actor asks the cluster for. null for as many as its engine computes on (for
            vLLM tensor x pipeline parallel), or none where the cluster has none at the start. Set it for a cluster that starts
            without GPUs, and for transformers with a `device_map`.
        ray_address: `ray` only: address of a running cluster; `local` starts one on this machine; null joins the one that
            RAY_ADDRESS or this machine knows, and otherwise starts one.
        retries: how often a failed unit is tried again before it is given up.
        max_failed: most units to set aside, with the reason, while the capture continues; the next run tries them again. With 0
            the first unit that keeps failing stops the capture.
        skip_failing: find the sequences that make a unit fail, skip them, name them, and publish the rest.
        stall_seconds: when the teacher has not answered for this long, report it, print every thread's stack and stop; null to
            wait for ever.
        load_stall_seconds: the same for loading the teacher, including the download of its weights.
        progress_path: file with the state of the run as JSON, rewritten every few seconds. null for `<out>.progress.json`, with
            the rank in its name where there are several; in the working directory for a cache in an object store.
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
            raise ValueError(f"rank is {self.rank}, but must be below world_size, {self.world_size}: ranks start at 0")
        if self.executor == "ray" and self.world_size > 1:
            raise ValueError("executor 'ray' spreads the units itself: use `replicas`, not `world_size`")
        is_of_ray = self.replicas > 1 or self.gpus_per_replica is not None or self.ray_address is not None
        if self.executor != "ray" and is_of_ray:
            raise ValueError("replicas, gpus_per_replica and ray_address are for executor 'ray' only")


class CaptureConfig(Config, frozen=True, kw_only=True):
    """A whole capture: input -> teacher -> selection -> codec -> cache.

    Attributes:
        out: directory of the new cache, created if missing; or a URI, `s3://BUCKET/PREFIX` or `gs://BUCKET/PREFIX`. One capture
            per directory.
        remote: how an object store is reached.
        generate: null: the teacher reads the input. A section: it answers the input.
        features: states of the teacher's layers to store with the distributions, as in [{layer: -1, dtype: int8}]. Each has
            `layer` (0 the embeddings' output, i the stream after layer i, -1 after the final norm), `kind` (hidden, queries,
            keys, values, attention), `positions` (supervised, all), `stride`, `pooling`, `dtype` (float16, bfloat16, int8),
            `scale`, `projection` and `name`; configs/capture-features.yaml shows all. --dry-run prints what each takes.
        sidecars: what to keep once for the whole cache. `output_projection`: the teacher's, which makes every logit of layer
            -1, and its final norm; `activation_statistics`: of a few hundred sequences, what students are cut from their
            teacher by (transformers only). May be asked for later, too.
    """

    input: InputConfig
    teacher: TeacherConfig
    generate: GenerateConfig | None = None
    selection: SelectionConfig = SelectionConfig()
    features: tuple[FeatureConfig, ...] = ()
    sidecars: tuple[Literal["output_projection", "activation_statistics"], ...] = ()
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
                "generate: a served teacher can only read; to have it answer, use teacher.backend vllm or transformers"
            )
        if self.generate.max_tokens >= self.input.window.size:
            raise ValueError(
                f"generate.max_tokens is {self.generate.max_tokens}, but prompt and answer together must fit into "
                f"input.window.size, {self.input.window.size}; raise that, up to the teacher's context, or lower max_tokens"
            )
        if self.input.group_field is not None:
            raise ValueError(
                "generate: the teacher writes the answers here, so input.group_field and preference_field must be null"
            )
        cuts = self.input.window.policy == "truncate" or self.input.window.overlap
        if cuts or self.input.supervise != "all" or self.input.one_item_per != "chat":
            raise ValueError(
                "with `generate`, prompts are not cut and only the answers are recorded: leave out input.window.policy, "
                "input.window.overlap, input.supervise and input.one_item_per; generate.long_prompts decides about long prompts"
            )

    def _check_features(self) -> None:
        names = [feature.full_name for feature in self.features]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"features: two have the name {twice!r}; give one of them another `name`")
        if len(set(self.sidecars)) < len(self.sidecars):
            raise ValueError(f"sidecars: one is named twice: {', '.join(self.sidecars)}")
        if self.sidecars and self.teacher.backend == "served":
            raise ValueError("sidecars: a server gives no weights; use teacher.backend vllm or transformers")
        if self.features and self.teacher.backend == "served":
            raise ValueError("features: a server gives no hidden states; use teacher.backend vllm or transformers")
        if self.features and self.teacher.vllm.route == "public":
            raise ValueError("features: vLLM's public route gives no hidden states; set teacher.vllm.route to worker or auto")
