"""Cells of entry objects, as engines write them: `[[{"token_id": 5, "logprob": -0.1}, ...], ...]`, a list for each position."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from kdcache.errors import InputError
from kdcache.foreign.base import ValueKind
from kdcache.foreign.formats.tables import ITEMS_TO_LOOK_AT, Table, check_num_positions, list_lengths

ID_FIELDS = ("token_id", "tokenId", "id", "token", "index", "idx")
VALUE_FIELDS: dict[str, ValueKind] = {
    "logprob": "logprobs", "log_prob": "logprobs", "logprobs": "logprobs", "logit": "logits", "prob": "probs",
    "probability": "probs",
}  # fmt: skip

_NUMBERED = re.compile(r"(?:token_id:)?(\d{1,18})")


@dataclass(frozen=True)
class PairColumn:
    """A column of entry objects.

    Attributes:
        column: its name.
        id_field, value_field: the objects' fields for the id and the value.
        has_text_ids: whether ids are written as text, as in `token_id:5`.
    """

    column: str
    id_field: str
    value_field: str
    has_text_ids: bool

    @property
    def values(self) -> ValueKind:
        """What the values are, by their field's name."""
        return VALUE_FIELDS[self.value_field]


def find_pairs(table: Table, candidates: Sequence[str]) -> PairColumn | None:
    """The first of these columns whose cells hold lists of objects with an id and a value; None for none."""
    for position in table.first_items(candidates):
        for name in candidates:
            cell = position.get(name)
            if (entry := _first_entry(cell)) is not None:
                ids = next((field for field in ID_FIELDS if field in entry), None)
                values = next((field for field in VALUE_FIELDS if field in entry), None)
                if ids is not None and values is not None:
                    return PairColumn(name, ids, values, isinstance(entry[ids], str))
    return None


def read_pairs(
    cell: Any, pairs: PairColumn, where: str
) -> tuple[tuple[NDArray[Any], NDArray[np.int64]], tuple[NDArray[Any], NDArray[np.int64]]] | None:
    """Read one cell: (ids, entries of each position), (values, the same). A null position is empty; None for a null cell.

    Raises:
        InputError: the cell is something else, or an id is not a whole number.
    """
    if isinstance(cell, pa.Scalar):
        if not cell.is_valid:
            return None
        positions: Any = getattr(cell, "values", None)
        if not isinstance(positions, pa.Array) or not pa.types.is_struct(getattr(positions.type, "value_type", pa.null())):
            raise InputError(
                f"{where}: expected a list of lists of {{{pairs.id_field}, {pairs.value_field}}}, found {cell.type}"
            )
        check_num_positions(positions, where)
        entries, counts_P = positions.flatten(), list_lengths(positions)
        ids = pc.call_function("struct_field", [entries], pc.StructFieldOptions([pairs.id_field])).to_pylist()
        values = pc.call_function("struct_field", [entries], pc.StructFieldOptions([pairs.value_field])).to_pylist()
    elif cell is None:
        return None
    else:
        ids, values, counts_P = _from_lists(cell, pairs, where)
    ids_E = np.array([to_id(token, where) for token in ids], np.int64)
    return (ids_E, counts_P), (_values(values, pairs, where), counts_P)


def to_id(token: Any, where: str) -> int:
    """An id that is written as a number, as `5` or as `token_id:5`.

    Raises:
        InputError: it is text, which does not tell which id it was.
    """
    if type(token) is int and abs(token) < 2**62:
        return token
    if isinstance(token, str) and (match := _NUMBERED.fullmatch(token)):
        return int(match[1])
    raise InputError(
        f"{where}: the entry's token is {token!r:.60}, but an id was expected; engines write ids where they are asked to "
        "(vLLM: return_tokens_as_token_ids)"
    )


def _first_entry(cell: Any) -> dict[str, Any] | None:
    if isinstance(cell, pa.Scalar):
        positions: Any = getattr(cell, "values", None)
        is_nested = isinstance(positions, pa.Array) and pa.types.is_struct(getattr(positions.type, "value_type", pa.null()))
        cell = positions[:ITEMS_TO_LOOK_AT].to_pylist() if is_nested else None
    for position in cell if isinstance(cell, list) else ():
        for entry in position if isinstance(position, list) else ():
            return entry if isinstance(entry, dict) else None
    return None


def _from_lists(cell: Any, pairs: PairColumn, where: str) -> tuple[list[Any], list[Any], NDArray[np.int64]]:
    positions = [position or [] for position in cell] if isinstance(cell, list) else None
    entries = (
        [entry for position in positions for entry in position]
        if positions is not None and all(isinstance(r, list) for r in positions)
        else None
    )
    if positions is None or entries is None or not all(isinstance(entry, dict) for entry in entries):
        raise InputError(f"{where}: expected a list of lists of {{{pairs.id_field}, {pairs.value_field}}}")
    ids, values = [entry.get(pairs.id_field) for entry in entries], [entry.get(pairs.value_field) for entry in entries]
    return ids, values, np.array([len(position) for position in positions], np.int64)


def _values(values: list[Any], pairs: PairColumn, where: str) -> NDArray[np.float64]:
    odd = next((value for value in values if type(value) not in (int, float)), 0.0)
    if odd != 0.0:
        raise InputError(f"{where}: the entry's {pairs.value_field} is {odd!r:.60}, but a number was expected")
    return np.array(values, np.float64)
