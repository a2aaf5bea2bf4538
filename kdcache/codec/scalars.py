"""The columns that a selection asks for next to the entries: counts of exact entries, normalisers at further temperatures,
entropy. Every codec has them under the same names, in its own float type.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kdcache.codec.base import ColumnValues, checked_column, list_array
from kdcache.errors import CorruptCacheError, FormatError
from kdcache.format.manifest import SelectionInfo
from kdcache.format.record import Distributions
from kdcache.format.selection import fixed_exact, most_entries, stores_num_exact

EXACT_TOP_K = SelectionInfo(kind="top_k", params={"k": 0})
"""Stands for every selection of exact entries without further columns."""

_KEPT: dict[str, Callable[[SelectionInfo], bool]] = {
    "num_exact": stores_num_exact,
    "log_z": lambda selection: bool(selection.temperatures),
    "entropy": lambda selection: selection.entropy,
}
"""Column -> whether a selection asks for it, in the columns' order."""

Narrow = Callable[[NDArray[np.float32]], NDArray[Any]]
"""float32 to the codec's float type."""


def num_exact_type(selection: SelectionInfo) -> pa.DataType:
    """The smallest integers that hold a count of exact entries, where it is stored."""
    return pa.uint8() if most_entries(selection, 2**31) <= 255 else pa.uint16()


def _names(selection: SelectionInfo, *, num_exact: bool) -> list[str]:
    return [name for name, kept in _KEPT.items() if kept(selection) and (num_exact or name != "num_exact")]


def scalar_fields(selection: SelectionInfo, float_type: pa.DataType, *, num_exact: bool = True) -> list[pa.Field]:
    """The columns, in order; none for exact entries alone.

    Args:
        num_exact: False for a codec that stores the counts of exact entries itself.
    """
    names = _names(selection, num_exact=num_exact)
    types = {name: num_exact_type(selection) if name == "num_exact" else float_type for name in names}
    return [pa.field(name, pa.list_(value_type), nullable=False) for name, value_type in types.items()]


def encode_scalars(
    sequences: Sequence[Distributions],
    selection: SelectionInfo,
    float_type: pa.DataType,
    narrow: Narrow,
    *,
    num_exact: bool = True,
) -> list[pa.Array]:
    """One array per field, one value per sequence; log_z position by position."""
    names = _names(selection, num_exact=num_exact)
    columns: dict[str, list[NDArray[Any]]] = {name: [] for name in names}
    for d in sequences:
        kept = {"num_exact": d.num_exact_P, "log_z": d.log_z_PL, "entropy": d.entropy_P}
        for name in names:
            columns[name].append(np.asarray(kept[name]))
    return [
        list_array([_narrow_counts(v, selection) for v in columns[name]], num_exact_type(selection))
        if name == "num_exact"
        else list_array([narrow(v.reshape(-1)) for v in columns[name]], float_type)
        for name in names
    ]


def _narrow_counts(num_exact_P: NDArray[np.int64], selection: SelectionInfo) -> NDArray[Any]:
    dtype = num_exact_type(selection).to_pandas_dtype()
    if num_exact_P.max(initial=0) > np.iinfo(dtype).max:
        raise FormatError(f"a position has {num_exact_P.max()} exact entries, more than selection {selection.kind!r} can give")
    return num_exact_P.astype(dtype)


def decode_scalars(
    columns: ColumnValues, selection: SelectionInfo, offsets_P1: NDArray[np.int64], float_type: Any
) -> dict[str, Any]:
    """The optional fields of one sequence's `Distributions`, by name.

    Raises:
        CorruptCacheError: lengths that do not fit, or more exact entries than there are.
    """
    found: dict[str, Any] = {"num_exact_P": _num_exact(columns, selection, offsets_P1)}
    return found | decode_floats(columns, selection, len(offsets_P1) - 1, float_type)


def decode_floats(
    columns: ColumnValues, selection: SelectionInfo, num_positions: int, float_type: Any
) -> dict[str, NDArray[np.float32]]:
    """The teacher's own among them: log_z_PL and entropy_P, where they are kept.

    Raises:
        CorruptCacheError: lengths that do not fit.
    """
    found: dict[str, NDArray[np.float32]] = {}
    num_temperatures = len(selection.temperatures)
    if num_temperatures:
        log_z = checked_column(columns, "log_z", float_type, num_positions * num_temperatures)
        found["log_z_PL"] = log_z.astype(np.float32, copy=False).reshape(num_positions, num_temperatures)
    if selection.entropy:
        found["entropy_P"] = checked_column(columns, "entropy", float_type, num_positions).astype(np.float32, copy=False)
    return found


def _num_exact(columns: ColumnValues, selection: SelectionInfo, offsets_P1: NDArray[np.int64]) -> NDArray[np.int64] | None:
    counts_P = np.diff(offsets_P1)
    if stores_num_exact(selection):
        dtype = num_exact_type(selection).to_pandas_dtype()
        num_exact_P = checked_column(columns, "num_exact", dtype, len(counts_P)).astype(np.int64)
        if (num_exact_P > counts_P).any():
            raise CorruptCacheError("a position has more exact entries than entries")
        return num_exact_P
    fixed = fixed_exact(selection)
    return None if fixed is None else np.minimum(fixed, counts_P)
