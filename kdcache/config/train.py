"""The config of a training run.

`configs/train-*.yaml` are complete, commented examples; `kdcache.config.load` reads them.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from kdcache.config.base import Config, Fraction, NonNegative, NonNegativeFloat, Positive, PositiveFloat
from kdcache.config.cut import LayersConfig, StatisticsConfig, WidthConfig
from kdcache.config.loader import LoaderConfig
from kdcache.config.remote import RemoteConfig
from kdcache.config.secrets import refuse_secrets
from kdcache.config.terms import OF_LOGITS, TermConfig, WeightSchedule

Beta = Annotated[float, Meta(ge=0, lt=1)]
Scalar = str | int | float | bool | None


class StudentConfig(Config, frozen=True, kw_only=True):
    """The model that is trained.

    Attributes:
        model: folder in the Hugging Face layout or hub id, possibly the teacher's; its `config.json` is the base.
        revision: hub commit or tag; null for the default.
        init: `random` builds new weights from the configuration; `pretrained` loads the weights of `model`; `from_teacher`
            copies those of some layers of `model`, or of some of their width; `model` is then the teacher.
        overrides: fields of that configuration to change, as in {hidden_size: 128}; with `random` only.
        layers: with `from_teacher`, which layers are kept; null for all.
        width: with `from_teacher`, how wide they are; null for as wide as the teacher's.
        statistics: with `from_teacher`, the text that decides where the teacher's activations do.
        tokenizer: folder or hub id of the student's tokenizer; null for that of `model`. Its fingerprint must be the cache's.
        attention: transformers' name of the attention. `auto` is sdpa where the model has it and it computes everything that
            the configuration asks for, and eager elsewhere (gpt-oss has no sdpa; in Gemma 2, sdpa leaves out a soft cap).
    """

    model: str
    revision: str | None = None
    init: Literal["random", "pretrained", "from_teacher"] = "random"
    overrides: dict[str, Scalar | list[Scalar]] = msgspec.field(default_factory=dict)
    layers: LayersConfig | None = None
    width: WidthConfig | None = None
    statistics: StatisticsConfig = StatisticsConfig()
    tokenizer: str | None = None
    attention: str = "auto"

    def __post_init__(self) -> None:
        if self.init != "random" and self.overrides:
            raise ValueError("overrides change the shape of a student; they need init 'random'")
        if self.init != "from_teacher" and (self.layers or self.width):
            raise ValueError(f"layers and width are cut from a teacher, and init is {self.init!r}; set init to 'from_teacher'")


class LossConfig(Config, frozen=True, kw_only=True):
    """What a step minimises: alpha * divergence(teacher, student) + (1 - alpha) * cross-entropy with the text, or any terms.

    Attributes:
        alpha: 1 for distillation only, 0 for the text only.
        divergence: `forward_kl`, or another name of the table in kdcache/kernels/README.md; `kdcache info` lists those that a
            cache allows.
        divergence_options: the divergence's own parameters, as in {beta: 0.3}; the table has their defaults.
        tail: what happens to the teacher's mass outside the support. `bucket` compares it with the student's as one further
            token, `drop` leaves it out, `renormalize` scales the support to mass 1, `uniform` spreads it evenly over the ids
            outside the support. null takes the best known: `drop` for the forward KL and a cache of a random selection, which
            trains on all entries without bias; otherwise `bucket`, which reads the exact entries only.
        temperature: that of teacher and student; other than 1, it must be one of the cache's selection.temperatures.
        backend: `numba`, `torch` or `triton`; `auto` takes the fastest that fits the device and has been tested on one.
        chunk_positions: positions whose logits exist at once; memory is this x vocabulary x 2 or 4 bytes. null: 512 on a
            CPU (1024 in bfloat16); on a GPU 4096, or as many as make 2^29 logits (16,384 for 32,000 ids).
        float32_logits: with dtype bfloat16, compute the logits in float32. Rounding them is most of the gradient's error where
            the student is close to the teacher; on a CPU the product then takes several times as long.
        train_padding: for a student with more ids than the cache's vocabulary. false leaves these ids out, as if they did not
            exist: no probability, no gradient, so mask them when generating. true counts them as ids to which the teacher gives
            nothing. A teacher may have more ids than its student if no token of the tokenizer uses them: their mass counts as
            tail, and is `padding_mass` in `metrics.jsonl`.
        terms: further terms, added to the divergence and the cross entropy. A list in which one is a `divergence` or a
            `cross_entropy` replaces alpha, divergence, divergence_options, tail and temperature, which are its options then.
        projector_lr: learning rate of what terms train themselves (projectors), following the same schedule; they have no
            weight decay, and are kept in checkpoints, not in the finished model.
    """

    alpha: Fraction = 1.0
    divergence: str = "forward_kl"
    divergence_options: dict[str, float] = msgspec.field(default_factory=dict)
    tail: Literal["bucket", "drop", "renormalize", "uniform"] | None = None
    temperature: PositiveFloat = 1.0
    backend: Literal["auto", "numba", "torch", "triton"] = "auto"
    chunk_positions: Positive | None = None
    float32_logits: bool = False
    train_padding: bool = False
    terms: tuple[TermConfig, ...] = ()
    projector_lr: PositiveFloat = 1e-3

    @property
    def is_short_form(self) -> bool:
        """Whether divergence and cross entropy are those of `alpha` and the fields with it."""
        return not any(term.term in OF_LOGITS for term in self.terms)

    def __post_init__(self) -> None:
        self._check_balance()
        short = {name: getattr(self, name) for name in ("alpha", "divergence", "divergence_options", "tail", "temperature")}
        both = [name for name, value in short.items() if value != _SHORT_FORM[name]]
        if both and not self.is_short_form:
            term = next(term.term for term in self.terms if term.term in OF_LOGITS)
            raise ValueError(
                f"{both[0]} is {short[both[0]]!r}, but terms has {term!r}, which replaces it; give alpha as the terms' weights "
                "and the rest as options of the term"
            )

    def _check_balance(self) -> None:
        """Refuse what a first term, with which others are balanced, cannot have; that of the short form has a fixed weight."""
        terms = [] if self.is_short_form else [(i, term) for i, term in enumerate(self.terms) if term.weight != 0]
        if not terms:
            return
        (i, first), others = terms[0], terms[1:]
        if first.balance == "equal":
            raise ValueError(f"terms[{i}] ({first.term}) has balance: equal, but the others are balanced with it; leave it out")
        balanced = next((term for _, term in others if term.balance == "equal"), None)
        if balanced is not None and isinstance(first.weight, WeightSchedule):
            raise ValueError(
                f"terms[{i}] ({first.term}) has a weight schedule, which the term {balanced.term!r} with balance: equal would "
                "not follow; give the first term a fixed weight"
            )


_SHORT_FORM = {"alpha": 1.0, "divergence": "forward_kl", "divergence_options": {}, "tail": None, "temperature": 1.0}


class OptimizerConfig(Config, frozen=True, kw_only=True):
    """AdamW and its learning rate over time.

    Attributes:
        lr: highest learning rate.
        betas: decay of the two running means. With drawn entries at a moderate rate, 0.999 was the better second one: they
            reach a rare token in few steps, which a short memory makes small. In a few hundred steps at 4e-3 it was worse
            (benchmarks/LOG.md).
        weight_decay: on matrices; vectors (norms, biases) have none.
        grad_clip: largest norm of the whole gradient; null for no clipping.
        schedule: after the warm-up, `cosine` and `linear` fall to lr x final_fraction, `constant` stays.
        warmup_fraction: share of all steps during which the rate rises from 0.
        final_fraction: rate of the last step as a share of lr.
    """

    lr: PositiveFloat = 1e-3
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    weight_decay: NonNegativeFloat = 0.1
    grad_clip: PositiveFloat | None = 1.0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_fraction: Fraction = 0.05
    final_fraction: Fraction = 0.1


class HeldoutConfig(Config, frozen=True, kw_only=True):
    """Held-out text that is scored during training, for the curve.

    Attributes:
        data: JSON lines (also compressed), Parquet or Arrow, each item with `text` or `input_ids`; null to measure nothing
            during training.
        every_steps: steps between two measurements; the first is before step 1, and one more follows the last step.
        max_tokens: score at most this many tokens, in windows evenly spread over the file.
        window: most tokens in a sequence; longer texts are cut.
    """

    data: str | None = None
    every_steps: Positive = 100
    max_tokens: Positive = 20_000
    window: Annotated[int, Meta(ge=2)] = 256


class TrainConfig(Config, frozen=True, kw_only=True):
    """A whole training run: cache -> loader -> student -> loss -> optimiser, with checkpoints.

    Attributes:
        cache: directory of the cache, or its URI: `file://`, `s3://`, `gs://` or `hf://`.
        remote: how a cache in an object store is read, and where the bytes that were read are kept.
        accept: what to train in spite of. `incomplete`: the capture has not finished; trains on what it has published so far.
            `tokenizer`: the student's tokenizer has another fingerprint than the cache's; for tokenizers known to give the same
            ids.
        out: directory of the run: `run.json`, `metrics.jsonl`, `checkpoints/`, and at the end `model/` in the Hugging Face
            layout. The same command on the same directory resumes where it stopped.
        steps: optimiser steps; give this or `epochs`.
        epochs: passes over the cache; give this or `steps`.
        seed: that of the student's initial weights and of dropout; the order of reading has its own, `loader.seed`.
        num_threads: CPU threads; null for the library's default.
        device: `auto` takes CUDA where it is available.
        dtype: that of the matrix products, including the logits; weights and optimiser state are float32 either way.
        checkpoint_every_steps: steps between two checkpoints; the last step always writes one.
        max_skipped_steps: how many steps with a non-finite loss or gradient may be skipped (the weights are not updated, and
            the batch counts as read) before the run stops. 0 stops at the first. Raise it to resume a run that it stopped.
        heldout: what is measured during training.
    """

    cache: str
    remote: RemoteConfig = RemoteConfig()
    accept: tuple[Literal["incomplete", "tokenizer"], ...] = ()
    out: str
    student: StudentConfig
    loader: LoaderConfig = LoaderConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    steps: Positive | None = None
    epochs: Positive | None = None
    seed: NonNegative = 0
    num_threads: Positive | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    checkpoint_every_steps: Positive = 200
    max_skipped_steps: NonNegative = 0
    heldout: HeldoutConfig = HeldoutConfig()

    def __post_init__(self) -> None:
        refuse_secrets({name: getattr(self, name) for name in self.__struct_fields__ if name != "remote"}, "the run's folder")
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either `steps` or `epochs`, and not both")
