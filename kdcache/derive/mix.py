"""One cache of several teachers' caches of the same sequences: p = sum of w_i p_i, at each position.

| the caches' selections | the mixture's | what is stored |
|---|---|---|
| all `top_k` or `top_p_k` | `top_k`, k the smallest | the tokens that all caches have as entries, exact |
| all random (`sampled`, `threshold`, `top_k_sampled`) | `sampled`, 65535 draws | the tokens that any has, as estimates |

An exact cache does not tell the probability of a token that it did not keep (it is not 0): the token joins the tail. The
weighted sum of random caches' estimates is an estimate of the weighted sum, whatever draws they share; each sum becomes a count
of 1 / 65535, rounded up or down at random.

Every teacher's logprob of the target is known, and so is the mixture's. Entropies, normalisers at further temperatures and
hidden states of a mixture do not follow from those of its parts; they are left out.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

import kdcache
from kdcache.derive.reduction.entries import Entries, rebuilt, sum_per_position
from kdcache.derive.reduction.systematic import operation_seed, position_uniforms, systematic_counts
from kdcache.errors import ConfigError, InputError, MismatchError
from kdcache.format.manifest import Identity, SelectionInfo, TeacherIdentity, fingerprint
from kdcache.format.record import Distributions, SequenceRecord
from kdcache.format.selection import MAX_DRAWS, has_estimates


def check_weights(weights: Sequence[float], num_sources: int) -> None:
    """Raise ConfigError unless there is a weight for each cache, each above 0, and their sum is 1."""
    if num_sources < 2:
        raise ConfigError(f"mix: {num_sources} cache was given, expected two or more")
    if len(weights) != num_sources:
        raise ConfigError(f"mix: {len(weights)} weights for {num_sources} caches, expected one for each")
    if not all(0 < weight <= 1 for weight in weights) or abs(sum(weights) - 1) > 1e-6:
        raise ConfigError(f"mix: the weights are {', '.join(map(str, weights))}, expected numbers above 0 whose sum is 1")


def mixed_identity(identities: Sequence[Identity], names: Sequence[str], weights: Sequence[float], seed: int) -> Identity:
    """The identity of the mixture, but for its input and codec, which are the first one's.

    Raises:
        MismatchError: other tokenizers, vocabularies or sampler's filters. ConfigError: exact and random selections together.
    """
    for name, other in zip(names[1:], identities[1:], strict=True):
        _check_same_tokens(names[0], identities[0], name, other)
    selections = [identity.selection for identity in identities]
    selection = _mixed_selection(selections, names, weights, seed)
    return Identity(
        teacher=_mixed_teacher([identity.teacher for identity in identities], weights),
        tokenizer=identities[0].tokenizer,
        selection=selection,
        codec=identities[0].codec,
        input_fingerprint=identities[0].input_fingerprint,
        seeds=identities[0].seeds,
        generation=identities[0].generation,
        domains=identities[0].domains,
        groups=identities[0].groups,
    )


def mix_records(records: Sequence[SequenceRecord], weights: Sequence[float], selection: SelectionInfo) -> SequenceRecord:
    """The mixture of one sequence's records.

    Args:
        records: of equal tokens and masks, from one cache each.
        weights: one for each, their sum 1.
        selection: the mixture's.

    Raises:
        InputError: the records are of different texts.
    """
    first = records[0].sequence
    for record in records[1:]:
        other = record.sequence
        if not (
            np.array_equal(first.input_ids_N, other.input_ids_N) and np.array_equal(first.supervised_N, other.supervised_N)
        ):
            raise InputError(f"mix: {first.source} and {other.source} have equal keys but other tokens or masks")
    mixed = mix_distributions([record.distributions for record in records], weights, first.target_ids_P)
    if has_estimates(selection):
        u_P = position_uniforms(selection.params["seed"], first.key, first.positions_P)
        return SequenceRecord(first, mixed.as_draws(selection.params["num_draws"], u_P))
    return SequenceRecord(first, mixed.as_exact())


class Mixture:
    """The weighted sum of several records' entries before rounding; made by `mix_distributions`.

    Attributes:
        entries: one for each (position, token) of any record, with the logarithm of the weighted sum; exact where it is an
            exact entry of all.
        tail_mass_P: (P,) the mixture's mass outside its exact entries.
        targets: (P,) ids and (P,) logprobs of all targets under the mixture.
    """

    def __init__(
        self, entries: Entries, tail_mass_P: NDArray[np.float64], targets: tuple[NDArray[np.int32], NDArray[np.float32]]
    ) -> None:
        self.entries, self.tail_mass_P, self.targets = entries, tail_mass_P, targets

    def as_exact(self) -> Distributions:
        """The mixture's exact entries alone, as a record."""
        exact = self.entries.taken(self.entries.is_exact_E)
        return rebuilt(_empty(len(self.tail_mass_P)), exact, self.tail_mass_P, self.targets, has_estimates=False)

    def as_draws(self, num_draws: int, u_P: NDArray[np.float64]) -> Distributions:
        """All entries as counts of draws, whose means are the mixture's probabilities."""
        entries, num_positions = self.entries, len(self.tail_mass_P)
        counts_P = np.bincount(entries.positions_E, minlength=num_positions)
        offsets_P1 = np.concatenate([[0], np.cumsum(counts_P)]).astype(np.int64)
        weights_E = np.exp(entries.logprobs_E) * num_draws
        counts_E = np.minimum(systematic_counts(weights_E, entries.token_ids_E, offsets_P1, u_P), num_draws)
        made = Entries(
            entries.positions_E,
            entries.token_ids_E,
            np.log(np.maximum(counts_E, 1) / num_draws),
            np.zeros(len(counts_E), bool),
        ).taken(counts_E > 0)
        return rebuilt(_empty(num_positions), made, np.ones(num_positions), self.targets, has_estimates=True)


def mix_distributions(parts: Sequence[Distributions], weights: Sequence[float], target_ids_P: NDArray[np.int32]) -> Mixture:
    """The weighted sum of records of the same positions."""
    num_positions = parts[0].num_positions
    each = [Entries.of(part) for part in parts]
    with np.errstate(divide="ignore"):
        target_logprobs_P = np.log(
            sum(
                w * np.exp(part.target_logprobs(target_ids_P).astype(np.float64))
                for w, part in zip(weights, parts, strict=True)
            )
        )
    mass_E = np.concatenate([w * np.exp(entries.logprobs_E) for w, entries in zip(weights, each, strict=True)])
    positions_E, ids_E, is_exact_E = (
        np.concatenate([getattr(entries, name) for entries in each]) for name in ("positions_E", "token_ids_E", "is_exact_E")
    )
    distinct, pair_E = np.unique(positions_E.astype(np.int64) << 32 | ids_E, return_inverse=True)
    distinct_mass = np.bincount(pair_E, mass_E, minlength=len(distinct))
    distinct_is_exact = np.bincount(pair_E, is_exact_E, minlength=len(distinct)) == len(parts)
    with np.errstate(divide="ignore"):
        distinct_logprobs = np.log(distinct_mass)
    entries = Entries(distinct >> 32, (distinct & 0xFFFFFFFF).astype(np.int32), distinct_logprobs, distinct_is_exact)
    tail_P = sum(w * part.tail_mass_P.astype(np.float64) for w, part in zip(weights, parts, strict=True))
    joins_tail_E = is_exact_E & ~distinct_is_exact[pair_E]
    tail_P = tail_P + sum_per_position(mass_E[joins_tail_E], positions_E[joins_tail_E], num_positions)
    return Mixture(entries, np.asarray(tail_P), (target_ids_P, target_logprobs_P.astype(np.float32)))


def _empty(num_positions: int) -> Distributions:
    return Distributions(
        token_ids_E=np.zeros(0, np.int32),
        logprobs_E=np.zeros(0, np.float32),
        offsets_P1=np.zeros(num_positions + 1, np.int64),
        tail_mass_P=np.zeros(num_positions, np.float32),
        outside_target_logprobs=np.zeros(0, np.float32),
    )


def _check_same_tokens(first: str, ours: Identity, name: str, theirs: Identity) -> None:
    pairs = ours.token_pairs(theirs) | {
        "chat template": (ours.tokenizer.chat_template_fingerprint, theirs.tokenizer.chat_template_fingerprint),
        "sampler's filters": (ours.selection.filters, theirs.selection.filters),
    }
    differences = [f"{what} {left!r} and {right!r}" for what, (left, right) in pairs.items() if left != right]
    if differences:
        raise MismatchError(
            f"mix: {first!r} and {name!r} do not have the same tokens: {'; '.join(differences)}; "
            "only caches of one tokenizer and vocabulary can be mixed"
        )


def _mixed_selection(
    selections: Sequence[SelectionInfo], names: Sequence[str], weights: Sequence[float], seed: int
) -> SelectionInfo:
    kinds = [has_estimates(selection) for selection in selections]
    if any(kinds) and not all(kinds):
        exact, drawn = kinds.index(False), kinds.index(True)
        raise ConfigError(
            f"mix: {names[exact]!r} keeps exact entries ({selections[exact].kind}) and {names[drawn]!r} unbiased estimates "
            f"({selections[drawn].kind}): a mixture of both would be neither; mix caches of exact, or of random selections"
        )
    if all(kinds):
        params = {"num_draws": MAX_DRAWS, "seed": operation_seed("mix", seed, list(weights), list(selections))}
        return SelectionInfo(kind="sampled", params=params, filters=selections[0].filters)
    k = min(selection.params["k"] for selection in selections)
    return SelectionInfo(kind="top_k", params={"k": k}, filters=selections[0].filters)


def _mixed_teacher(teachers: Sequence[TeacherIdentity], weights: Sequence[float]) -> TeacherIdentity:
    named = " + ".join(f"{weight:g} {teacher.model}" for weight, teacher in zip(weights, teachers, strict=True))
    return TeacherIdentity(
        model=named,
        architecture="mixture",
        vocab_size=teachers[0].vocab_size,
        dtype="+".join(sorted({teacher.dtype for teacher in teachers})),
        engine="kdcache",
        engine_version=kdcache.__version__,
        engine_options={"mixture": fingerprint([list(teachers), list(weights)])},
        context_length=min(teacher.context_length for teacher in teachers),
    )
