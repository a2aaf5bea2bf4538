"""The scalars that conditions ask for, of each position of a record and of the sequence: pure functions."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from kdcache.errors import ConfigError
from kdcache.format.manifest import SelectionInfo
from kdcache.format.record import NO_TARGET, Distributions, SequenceRecord
from kdcache.format.selection import fixed_exact
from kdcache.store.writing.statistics import entropy_bounds

POSITION_NAMES = {
    "target_logprob": "nats, the teacher's logprob of the token that came; unknown where the text ends",
    "entropy": "nats, of the whole distribution, where it is stored (`selection.entropy`)",
    "entropy_floor": "nats, the least that the entropy can be; the entropy where it is stored",
    "entropy_ceiling": "nats, the most that the entropy can be; the entropy where it is stored",
    "top1_probability": "of the most probable exact entry; of `threshold` tau where no token reaches it",
    "tail_mass": "probability of all tokens that are not exact entries",
    "position": "index in the sequence, counted from 0",
}
"""name -> what it is, for each position."""

SEQUENCE_NAMES = {
    "num_tokens": "tokens of the sequence",
    "num_positions": "its recorded positions",
    "num_targets": "its recorded positions that have a target",
}
"""name -> what it is, for the sequence."""

TEXT_NAMES = {
    "source": "where the sequence came from, as in 'corpus/wiki.txt#3'",
    "domain": "what kind of text it is, as the input said: 'wiki', 'code'; '' where it did not",
    "finish": "how an answer that the teacher wrote ended: 'stop', 'length', or '' where the text was given",
}
"""name -> what it is, for the sequence; text."""

Values = dict[str, NDArray[np.float64] | float | str]
"""name -> (P,) float64, NaN where it is not known, or the sequence's number or text."""


def check_available(names: Iterable[str], selection: SelectionInfo) -> None:
    """Raise ConfigError, saying what to ask for instead, where a selection does not keep what a name means."""
    asked = set(names)
    if "entropy" in asked and not selection.entropy:
        raise ConfigError(
            "where: the entropy is not stored in this cache; ask for entropy_floor or entropy_ceiling, between which it lies"
        )
    if fixed_exact(selection) == 0:
        unknown = asked & {"top1_probability", *(() if selection.entropy else ("entropy_floor", "entropy_ceiling"))}
        if unknown:
            raise ConfigError(
                f"where: {sorted(unknown)[0]} cannot be told from selection {selection.kind!r}, which has no exact entries; "
                "ask for target_logprob, or for the entropy where it was captured"
            )


def record_values(record: SequenceRecord, names: Iterable[str], selection: SelectionInfo, vocab_size: int) -> Values:
    """Compute the named scalars of a record, and only those that cost something when named."""
    d, sequence, asked, values = record.distributions, record.sequence, set(names), Values()
    if "target_logprob" in asked:
        values["target_logprob"] = d.target_logprobs(sequence.target_ids_P).astype(np.float64)
    if asked & {"entropy", "entropy_floor", "entropy_ceiling"}:
        floor_P, ceiling_P = entropy_bounds(d, vocab_size)
        values |= {"entropy": floor_P, "entropy_floor": floor_P, "entropy_ceiling": ceiling_P}
    if "top1_probability" in asked:
        values["top1_probability"] = _top1(d, selection)
    values["tail_mass"] = d.tail_mass_P.astype(np.float64)
    values["position"] = sequence.positions_P.astype(np.float64)
    values |= {"num_tokens": float(sequence.num_tokens), "num_positions": float(d.num_positions)}
    values["num_targets"] = float((sequence.target_ids_P != NO_TARGET).sum())
    return values | {"source": sequence.source, "domain": sequence.domain, "finish": sequence.finish}


def _top1(d: Distributions, selection: SelectionInfo) -> NDArray[np.float64]:
    num_exact_P = d.num_entries_P if d.num_exact_P is None else d.num_exact_P
    top_P = np.full(d.num_positions, selection.params["tau"] if selection.kind == "threshold" else np.nan)
    has_P = num_exact_P > 0
    top_P[has_P] = np.exp(d.logprobs_E[d.offsets_P1[:-1][has_P]].astype(np.float64))
    return top_P
