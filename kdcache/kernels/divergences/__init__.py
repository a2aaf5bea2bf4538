"""Which divergences there are, what each may be asked for, and what it needs of the record. Formulas: `reference`.

Standard library only: configs, docs and tests read the same table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

from kdcache import extensions
from kdcache.errors import LossError
from kdcache.kernels.divergences.base import BUCKET_ONLY, TAIL_POLICIES, Divergence, Option, Requirements

__all__ = ["DIVERGENCES", "TAIL_POLICIES", "Divergence", "Option", "Requirements", "find_kind", "get_divergence"]

# A stored tail mass is a float32 near 1 subtracted from 1: what is below half a unit in its last place is not known.
SMALLEST_KNOWN_MASS = 2.0**-24

_SUPPORT_ONLY = Requirements(
    ("bucket", "drop"),
    unbiased=False,
    temperature=False,
    tail_sample=False,
    because="it compares logits on the support, which must be exact, and has neither a tail nor a temperature",
)


@dataclass(frozen=True, slots=True)
class ForwardKL(Divergence):
    """KL(teacher || student): the classic, and the only one that unbiased entries are enough for."""

    name = "forward_kl"
    requirements = Requirements(
        TAIL_POLICIES,
        unbiased=True,
        temperature=True,
        tail_sample=False,
        because="with unbiased entries the tail is in the entries, and they were sampled at temperature 1",
    )


@dataclass(frozen=True, slots=True)
class ReverseKL(Divergence):
    """KL(student || teacher).

    Attributes:
        floor: a teacher's mass below it counts as this much: a mass of 0 would make the loss infinite. In (0, 1).
    """

    name = "reverse_kl"
    per_position = ("floor",)
    floor: Option = SMALLEST_KNOWN_MASS

    def __post_init__(self) -> None:
        self._check("floor", 0, 1, ends="()")


@dataclass(frozen=True, slots=True)
class JensenShannon(Divergence):
    """Generalised Jensen-Shannon divergence over beta (1 - beta): forward KL at beta 0, reverse KL at 1, and no jump there.

    Attributes:
        beta: the teacher's share of the mixture, in [0, 1].
        floor: see `ReverseKL`; for beta = 1 only.
        gkd_scale: 1 leaves the division out, as the GKD paper and TRL do: at beta 0.5 a quarter of the loss and its gradient,
            towards beta 0 and 1 nothing, and with a jump at both. 0 divides.
    """

    name = "jensen_shannon"
    per_position = ("beta", "floor")
    beta: Option = 0.5
    floor: Option = SMALLEST_KNOWN_MASS
    gkd_scale: float = 0.0

    @property
    def factor(self) -> float:
        """What loss and gradient are multiplied with, for a beta that is a number."""
        return self.beta * (1 - self.beta) if self.gkd_scale and 0 < self.beta < 1 else 1.0

    def __post_init__(self) -> None:
        self._check("beta", 0, 1)
        self._check("floor", 0, 1, ends="()")
        if not isinstance(self.gkd_scale, (int, float)) or self.gkd_scale not in (0, 1):
            raise LossError(f"{self.name}: gkd_scale is {self.gkd_scale!r}, but must be 0 or 1")


@dataclass(frozen=True, slots=True)
class SkewKL(Divergence):
    """KL(teacher || skew * teacher + (1 - skew) * student).

    Attributes:
        skew: in [0, 1); 0 is the forward KL.
    """

    name = "skew_kl"
    per_position = ("skew",)
    skew: Option = 0.1

    def __post_init__(self) -> None:
        self._check("skew", 0, 1, ends="[)")


@dataclass(frozen=True, slots=True)
class SkewReverseKL(Divergence):
    """KL(student || (1 - skew) * teacher + skew * student): at most log(1 / skew), whatever the teacher's tail.

    Attributes:
        skew: in (0, 1); for 0 there is `reverse_kl`.
    """

    name = "skew_reverse_kl"
    per_position = ("skew",)
    skew: Option = 0.1

    def __post_init__(self) -> None:
        self._check("skew", 0, 1, ends="()")


@dataclass(frozen=True, slots=True)
class SelfEvolution(Divergence):
    """KL(teacher || proxy), the proxy a mixture of the student with the teacher and the target id, at positions that are hard.

    OUR RECONSTRUCTION of Self-Evolution KD (arXiv 2412.15303), of which neither code nor equations could be read: do not expect
    the paper's figures. A guide g = lam * teacher + (1 - lam) * the target id alone; a position is hard where KL(g || student)
    is above `threshold`; there the proxy is (1 - mu) * student + mu * g with mu = max_share * gap / (gap + softness), gap that
    KL. No derivative goes through mu. Elsewhere, and without a target id, mu is 0 and this is the forward KL.

    Attributes:
        lam: the teacher's share of the guide, in [0, 1].
        threshold: in nats, at least 0.
        max_share: the largest mu, in [0, 1); 0 is the forward KL everywhere.
        softness: the gap in nats at which mu is half of max_share, at least 0; 0 gives every hard position max_share.
    """

    name = "self_evolution"
    per_position = ("lam", "threshold", "max_share", "softness")
    lam: Option = 0.5
    threshold: Option = 1.0
    max_share: Option = 0.5
    softness: Option = 1.0
    requirements = replace(BUCKET_ONLY, target=True)

    def __post_init__(self) -> None:
        self._check("lam", 0, 1)
        self._check("threshold", 0, math.inf)
        self._check("max_share", 0, 1, ends="[)")
        self._check("softness", 0, math.inf)

    def measures(self) -> dict[str, Divergence]:
        """`hard_share`: the share of the positions that are hard."""
        return {"hard_share": HardShare(self.lam, self.threshold)}


@dataclass(frozen=True, slots=True)
class HardShare(Divergence):
    """1 where `SelfEvolution` calls a position hard, else 0; without a gradient: a measure, no loss."""

    name = "hard_share"
    per_position = ("lam", "threshold")
    lam: Option = 0.5
    threshold: Option = 1.0
    requirements = SelfEvolution.requirements


@dataclass(frozen=True, slots=True)
class AdaptiveKL(Divergence):
    """Forward and reverse KL, weighted at every position by where teacher and student differ: in the head or in the rest.

    Attributes:
        head_mass: the head is the teacher's most probable ids whose masses add up to no more, and always the first. (0, 1].
        floor: see `ReverseKL`.
    """

    name = "adaptive_kl"
    per_position = ("head_mass", "floor")
    head_mass: Option = 0.5
    floor: Option = SMALLEST_KNOWN_MASS

    def __post_init__(self) -> None:
        self._check("head_mass", 0, 1, ends="(]")
        self._check("floor", 0, 1, ends="()")


@dataclass(frozen=True, slots=True)
class TotalVariation(Divergence):
    """Half the sum of absolute differences."""

    name = "total_variation"


@dataclass(frozen=True, slots=True)
class Hellinger(Divergence):
    """The squared Hellinger distance, in [0, 1]."""

    name = "hellinger"


@dataclass(frozen=True, slots=True)
class AlphaBeta(Divergence):
    """The alpha-beta divergence of ABKD. Its limits are `forward_kl` at (1, 0) and `reverse_kl` at (0, 1).

    Attributes:
        a: exponent of the teacher, alpha in the paper, in (0, 4].
        b: exponent of the student, beta in the paper, in (0, 4].
    """

    name = "alpha_beta"
    per_position = ("a", "b")
    a: Option = 0.2
    b: Option = 0.7

    def __post_init__(self) -> None:
        self._check("a", 0, 4, ends="(]")
        self._check("b", 0, 4, ends="(]")


@dataclass(frozen=True, slots=True)
class DecoupledTopK(Divergence):
    """KL of the support's total mass, plus that mass times the KL within the support at a temperature of its own.

    Attributes:
        inner_temperature: of the KL within the support, which is multiplied by its square; above 0. At 1 the whole is the
            forward KL with a tail bucket.
    """

    name = "decoupled_top_k"
    per_position = ("inner_temperature",)
    inner_temperature: Option = 2.0
    requirements = Requirements(
        ("bucket",),
        unbiased=False,
        temperature=False,
        tail_sample=False,
        because="it needs the exact mass of the support, and its only temperature is inner_temperature",
    )

    def __post_init__(self) -> None:
        self._check("inner_temperature", 0, 1e6, ends="(]")


@dataclass(frozen=True, slots=True)
class TailAwareKL(Divergence):
    """Forward KL with a tail bucket, plus the mass of the tail times the KL within it, from a sample of the tail.

    For exact entries with unbiased estimates of others (threshold and top_k_sampled records; `num_exact_P`). The gradient is
    unbiased: it is linear in the tail's masses, as the head and the tail's mass are exact. The value is not: the estimates'
    own entropy is not linear, and adds a number on which the student has no influence; to compare values use `forward_kl`.

    Attributes:
        tail_weight: of the KL within the tail; at least 0, and at 1 the gradient is that of the forward KL over the whole
            vocabulary. The paper has 2 over the mean mass of the tail within the sequence.
    """

    name = "tail_aware_kl"
    per_position = ("tail_weight",)
    tail_weight: Option = 2.0
    requirements = Requirements(
        ("bucket",),
        unbiased=False,
        temperature=False,
        tail_sample=True,
        because="the shape of the tail is not in a record of top entries and a tail mass, and a sample of it stands for "
        "temperature 1 next to an exact head",
    )

    def __post_init__(self) -> None:
        self._check("tail_weight", 0, 1e6)


@dataclass(frozen=True, slots=True)
class CenteredMSE(Divergence):
    """Mean squared difference of the logits on the support, each side about its own mean."""

    name = "centered_mse"
    requirements = _SUPPORT_ONLY


@dataclass(frozen=True, slots=True)
class HingeRanking(Divergence):
    """Pairs of the support that the student does not rank as the teacher does, by at least a margin.

    Attributes:
        margin: of the student's logits, at least 0.
    """

    name = "hinge_ranking"
    per_position = ("margin",)
    margin: Option = 1.0
    requirements = _SUPPORT_ONLY

    def __post_init__(self) -> None:
        self._check("margin", 0, 1e6)


@dataclass(frozen=True, slots=True)
class LogisticRanking(Divergence):
    """As `HingeRanking` with the logistic function: a Bradley-Terry model of the teacher's order."""

    name = "logistic_ranking"
    requirements = _SUPPORT_ONLY


@dataclass(frozen=True, slots=True)
class SoftSpearman(Divergence):
    """1 - Spearman's correlation of soft ranks on the support, in [0, 2].

    Attributes:
        strength: how soft the ranks are; towards 0 they become hard and their gradient vanishes. (0, 1e6].
    """

    name = "soft_spearman"
    per_position = ("strength",)
    strength: Option = 1.0
    requirements = _SUPPORT_ONLY

    def __post_init__(self) -> None:
        self._check("strength", 0, 1e6, ends="(]")


DIVERGENCES: dict[str, type[Divergence]] = {
    kind.name: kind
    for kind in (
        ForwardKL, ReverseKL, JensenShannon, SkewKL, SkewReverseKL, SelfEvolution, AdaptiveKL, TotalVariation, Hellinger,
        AlphaBeta, DecoupledTopK, TailAwareKL, CenteredMSE, HingeRanking, LogisticRanking, SoftSpearman,
    )
}  # fmt: skip
"""By name."""

MEASURES: dict[str, type[Divergence]] = {HardShare.name: HardShare}
"""Functions of the same buckets that are watched, and never asked for as a loss."""


def get_divergence(name: str | Divergence, **options: Any) -> Divergence:
    """The divergence of this name with these options; one that is already made comes back as it is.

    Raises:
        LossError: an unknown divergence, an unknown option, or an option is outside its range.
    """
    if isinstance(name, Divergence):
        return name
    kind = find_kind(name)
    for option in options:
        if option not in kind.__match_args__:
            raise LossError(f"{name} has no option {option!r}; it has {', '.join(map(repr, kind.__match_args__)) or 'none'}")
    return kind(**options)


def find_kind(name: str) -> type[Divergence]:
    """The class of this name, ours or another package's.

    Raises:
        LossError: it is unknown.
    """
    if name in DIVERGENCES:
        return DIVERGENCES[name]
    if not extensions.is_known("divergences", name):
        known = [*DIVERGENCES, *extensions.names("divergences")]
        raise LossError(f"divergence is {name!r}, but must be one of {', '.join(map(repr, known))}")
    kind = extensions.find("divergences", name)
    if not (isinstance(kind, type) and issubclass(kind, Divergence) and kind.name == name):
        raise LossError(f"divergence {name!r} is not a Divergence of this name, but {kind!r}; mend the package that brings it")
    return kind


def requirements_table() -> str:
    """Markdown: one line per divergence. README.md of this folder holds it, and a test compares them."""
    lines = ["| divergence | options | tail | unbiased entries | temperature | per position |", "|---|---|---|---|---|---|"]
    for name, kind in DIVERGENCES.items():
        needs, made = kind.requirements, kind()
        options = ", ".join(f"{field.name} = {getattr(made, field.name):.3g}" for field in fields(kind))
        unbiased = "with an exact head" if needs.tail_sample else "yes" if needs.unbiased else "no"
        answers = (unbiased, "yes" if needs.temperature else "no", ", ".join(kind.per_position))
        tails = ", ".join(needs.tails)
        lines.append(f"| `{name}` | {options} | {tails} | {' | '.join(answers)} |")
    return "\n".join(lines) + "\n"
