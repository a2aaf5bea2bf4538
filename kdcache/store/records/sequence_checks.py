"""When a sequence of a record batch is sound: the definition, one at a time, and a fast check of all at once.

`decode_sequence` and `entry_offsets` are the definition, and raise an error that names what is wrong. `all_sound` only says
whether every sequence passes; where one does not, each is checked by the definition when it is read, so that the others can
still be read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.codec.archive.model import MOST_ENTRIES_PER_BYTE
from kdcache.errors import CorruptCacheError
from kdcache.format.record import FINISHES, KEY_BYTES, PREFERENCES, ROLES, TokenSequence
from kdcache.format.record_checks import ids_fit
from kdcache.format.schema import DOMAIN_FIELD, FINISH_FIELD, GROUP_FIELDS
from kdcache.store.records.column_view import ColumnView


def decode_sequence(values: Mapping[str, Any], vocab_size: int) -> TokenSequence:
    """Make a sequence from its columns' values; raises CorruptCacheError where they do not fit together."""
    input_ids_N, supervised_N, turn_starts = values["input_ids"], values["supervised"], values["turn_starts"]
    num_tokens, roles = len(input_ids_N), values["roles"]
    roles_N = roles if roles is not None else np.zeros(num_tokens, np.uint8)
    if num_tokens == 0 or len(supervised_N) != num_tokens or len(roles_N) != num_tokens:
        raise CorruptCacheError("input_ids, supervised and roles have lengths that do not fit together")
    if not ids_fit(input_ids_N, vocab_size):
        raise CorruptCacheError(f"a token id of the text is outside the vocabulary of {vocab_size}")
    if roles is not None and roles_N.max() >= len(ROLES):
        raise CorruptCacheError(f"a role has the code {roles_N.max()}, known are 0 to {len(ROLES) - 1}")
    finish = int(values[FINISH_FIELD.name][0]) if FINISH_FIELD.name in values else 0
    if finish >= len(FINISHES):
        raise CorruptCacheError(f"finish has the code {finish}, known are 0 to {len(FINISHES) - 1}")
    group, preference = _group(values)
    if not ids_fit(turn_starts, num_tokens) or (len(turn_starts) > 1 and (np.diff(turn_starts) < 0).any()):
        raise CorruptCacheError("turn_starts fall, or leave the sequence")
    return TokenSequence(
        input_ids_N=input_ids_N,
        supervised_N=supervised_N,
        roles_N=roles_N,
        turn_starts=turn_starts,
        source=values["source"].tobytes().decode(),
        key=values["key"].tobytes(),
        finish=FINISHES[finish],
        domain=values[DOMAIN_FIELD.name].tobytes().decode() if DOMAIN_FIELD.name in values else "",
        group=group,
        preference=preference,
    )


def _group(values: Mapping[str, Any]) -> tuple[bytes, str]:
    """The group of a sequence and its preference there."""
    if GROUP_FIELDS[0].name not in values:
        return b"", ""
    group, preference = values[GROUP_FIELDS[0].name].tobytes(), int(values[GROUP_FIELDS[1].name][0])
    if preference >= len(PREFERENCES):
        raise CorruptCacheError(f"preference has the code {preference}, known are 0 to {len(PREFERENCES) - 1}")
    return b"" if group == bytes(KEY_BYTES) else group, PREFERENCES[preference]


def entry_offsets(num_entries_P: NDArray[np.uint16] | None, num_positions: int, fixed: int | None) -> NDArray[np.int64]:
    """Where each position's entries start, (P+1,); raises CorruptCacheError where the counts cannot be right."""
    if num_entries_P is None:
        if fixed is None:
            raise CorruptCacheError("num_entries is null, but the selection does not fix the number of entries")
        return np.arange(num_positions + 1, dtype=np.int64) * fixed
    if len(num_entries_P) != num_positions:
        raise CorruptCacheError(f"num_entries has {len(num_entries_P)} values for {num_positions} supervised positions")
    if fixed is not None and num_entries_P.max(initial=0) > fixed:
        raise CorruptCacheError(f"a position has {num_entries_P.max()} entries, but the selection keeps {fixed}")
    offsets_P1 = np.zeros(num_positions + 1, np.int64)
    np.cumsum(num_entries_P, out=offsets_P1[1:])
    return offsets_P1


def num_positions(supervised: ColumnView) -> NDArray[np.int64]:
    """How many positions of each sequence are supervised, (S,)."""
    sums = np.append(0, np.cumsum(supervised.values, dtype=np.int64))
    return sums[supervised.offsets_S1[1:]] - sums[supervised.offsets_S1[:-1]]


def all_sound(views: Mapping[str, ColumnView], num_positions_S: NDArray[np.int64], vocab_size: int, fixed: int | None) -> bool:
    """Whether `decode_sequence` and `entry_offsets` accept every sequence. May refuse what they accept, never the reverse.

    Args:
        views: of the columns.
        num_positions_S: see `num_positions`.
        vocab_size: of the shard.
        fixed: entries of every position by the selection, or None.
    """
    num_tokens_S = views["input_ids"].lengths_S
    none, preference = np.zeros(0, np.uint8), GROUP_FIELDS[1].name
    finish = views[FINISH_FIELD.name].values if FINISH_FIELD.name in views else none
    preferences = views[preference].values if preference in views else none
    return bool(
        (num_tokens_S > 0).all()
        and (views["supervised"].lengths_S == num_tokens_S).all()
        and _null_or(views["roles"], num_tokens_S)
        and ids_fit(views["input_ids"].values, vocab_size)
        and views["roles"].values.max(initial=0) < len(ROLES)
        and finish.max(initial=0) < len(FINISHES)
        and preferences.max(initial=0) < len(PREFERENCES)
        and _turns_rise(views["turn_starts"], num_tokens_S)
        and _null_or(views["num_entries"], num_positions_S)
        and (fixed is not None or views["num_entries"].valid_S is None)
        and (fixed is None or views["num_entries"].values.max(initial=0) <= fixed)
    )


def entries_fit(
    views: Mapping[str, ColumnView],
    codec_names: Sequence[str],
    num_positions_S: NDArray[np.int64],
    most: tuple[int | None, int],
) -> NDArray[np.bool_]:
    """Whether each sequence's bytes can hold the entries that it claims, (S,): no array is made for more.

    Args:
        views: of the columns.
        codec_names: the columns that hold entries.
        num_positions_S: see `num_positions`.
        most: entries of every position by the selection, or None; and the size of the vocabulary.
    """
    fixed, vocab_size = most
    view = views["num_entries"]
    sums = np.append(0, np.cumsum(view.values, dtype=np.int64))
    num_entries_S = sums[view.offsets_S1[1:]] - sums[view.offsets_S1[:-1]]
    fits_S = np.ones(len(num_positions_S), np.bool_)
    if fixed is not None and view.valid_S is not None:
        # As float64: k x positions may leave int64.
        num_entries_S = np.where(view.valid_S, num_entries_S, num_positions_S * float(fixed))
        fits_S = view.valid_S | (fixed <= vocab_size) | (num_positions_S == 0)
    num_bytes_S = np.zeros(len(num_positions_S), np.int64)
    for name in codec_names:
        num_bytes_S += np.asarray(views[name].lengths_S, np.int64) * views[name].values.itemsize
    return fits_S & (num_entries_S <= MOST_ENTRIES_PER_BYTE * num_bytes_S)


def _null_or(view: ColumnView, lengths_S: NDArray[Any]) -> bool:
    fits_S = view.lengths_S == lengths_S
    return bool((fits_S if view.valid_S is None else fits_S | ~view.valid_S).all())


def _turns_rise(view: ColumnView, num_tokens_S: NDArray[Any]) -> bool:
    starts, sequence_of = (
        view.values[view.offsets_S1[0] : view.offsets_S1[-1]],
        np.repeat(np.arange(len(num_tokens_S)), view.lengths_S),
    )
    falls = (np.diff(starts) < 0) & (np.diff(sequence_of) == 0)
    return bool((starts >= 0).all() and (starts < num_tokens_S[sequence_of]).all() and not falls.any())
