"""What a capture keeps of each distribution, and how that becomes bytes."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from kdcache import extensions
from kdcache.config.base import Config, Positive, PositiveFloat

SELECTION_DEFAULTS: dict[str, dict[str, int | float]] = {
    "threshold": {"tau": 0.04},
    "top_k": {"k": 64},
    "top_p_k": {"p": 0.95, "k": 64},
    "sampled": {"num_draws": 50},
    "top_k_sampled": {"k": 64, "num_draws": 50},
}
"""kind -> its parameters, and their values where the config leaves them out. `auto` takes the first kind that has all given."""


class SelectionConfig(Config, frozen=True, kw_only=True):
    """What is kept of a distribution: which entries, and which numbers besides.

    The mass outside the entries and the logprob of the token that came next are always stored; temperatures and entropy are
    chosen.

    Attributes:
        kind: `auto`, the kind whose parameters are given: `top_k` where k is, `threshold` where none is. `threshold`, every
            token of probability tau or more, and of the others an unbiased sample, each at tau: what forward KL and
            cross-entropy learn most from per byte. `top_k`, the k most probable tokens, ties to the smaller id: about ten
            times the bytes, and all of it of use to every divergence. `top_p_k`, the most probable tokens until their mass
            reaches p, at most k. `sampled`, num_draws draws with replacement (Random Sampling KD). `top_k_sampled`, the k most
            probable and num_draws draws of the others. Samples are unbiased, and for losses that are linear in the teacher's
            probabilities; the other losses use the exact entries alone.
        k: `top_k`, `top_p_k`, `top_k_sampled`: entries per position; of `top_p_k`, the most. null: 64.
        p: `top_p_k`: probability mass to reach, in (0, 1]. null: 0.95.
        num_draws: `sampled`, `top_k_sampled`: draws per position. null: 50.
        tau: `threshold`: probability from which a token is always kept, in (0, 1]. null: 0.04, at most 26 entries and about 24
            bytes per position. Half of it takes about 1.5 times the bytes and halves the noise.
        seed: that of the random kinds; each draw is a function of it, the sequence and the position.
        temperatures: further temperatures at which students may be trained; each costs one number per position.
        entropy: keep the teacher's entropy, one number per position.
    """

    kind: Literal["auto", "threshold", "top_k", "top_p_k", "sampled", "top_k_sampled"] = "auto"
    k: Positive | None = None
    p: Annotated[float, Meta(gt=0, le=1)] | None = None
    num_draws: Annotated[int, Meta(ge=1, le=65535)] | None = None
    tau: Annotated[float, Meta(gt=0, le=1)] | None = None
    seed: int = 0
    temperatures: tuple[PositiveFloat, ...] = ()
    entropy: bool = False

    def __post_init__(self) -> None:
        given = {name: value for name in ("tau", "k", "p", "num_draws") if (value := getattr(self, name)) is not None}
        fitting = [kind for kind, params in SELECTION_DEFAULTS.items() if given.keys() <= params.keys()]
        if self.kind == "auto" and fitting:
            msgspec.structs.force_setattr(self, "kind", fitting[0])
        if self.kind not in fitting:
            stated = " and ".join(f"{name}={value}" for name, value in given.items())
            takes = ", ".join(SELECTION_DEFAULTS.get(self.kind, ())) or "the parameters of one kind"
            raise ValueError(
                f"{stated} given, but kind {self.kind!r} takes {takes}; set the kind that takes it, or null for it"
            )

    @property
    def params(self) -> dict[str, int | float]:
        """The kind's own parameters, as given or by default, without the seed."""
        defaults = SELECTION_DEFAULTS[self.kind].items()
        return {name: default if getattr(self, name) is None else getattr(self, name) for name, default in defaults}


class CodecConfig(Config, frozen=True, kw_only=True):
    """How the kept entries become bytes.

    Attributes:
        id: `auto`, `archive` for the random selections, whose entries are few, and `packed` for `top_k` and `top_p_k`.
            `packed` (fixed-width ids, float16 logprobs: read fastest), `quantized` (fixed-width ids, logprobs of a few bits,
            sums kept within 1), `archive` (smallest, read at millions of entries a second) or `raw` (int32, float32: exact);
            or the name of an installed package's codec.
        bits: bits of a logprob; `quantized`: 4 to 8; `archive`: 4 to 8 as there, or 16 for float16 as in `packed`; null for 8.
        params: parameters of an installed package's codec, by name.
    """

    id: str = "auto"
    bits: Literal[4, 5, 6, 7, 8, 16] | None = None
    params: dict[str, bool | int | float | str] = msgspec.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.id != "auto" and not extensions.is_known("codecs", self.id):
            known = ", ".join(map(repr, ["auto", *extensions.names("codecs")]))
            raise ValueError(f"id is {self.id!r}, expected one of {known}, or a codec whose package is installed")
        if self.bits is not None and self.id in ("auto", "packed", "raw"):
            raise ValueError(f"bits is for the codecs 'quantized' and 'archive'; leave it out for {self.id!r}")
        if self.bits == 16 and self.id == "quantized":
            raise ValueError("codec 'quantized' has 4 to 8 bits, not 16; 'packed' stores float16, and 'archive' with 16")
        if self.params and self.id in ("auto", *extensions.OWN["codecs"]):
            raise ValueError(f"params is for codecs of other packages; the only parameter of {self.id!r} may be bits")
