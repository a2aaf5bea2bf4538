"""What every codec promises (see kdcache/codec/base.py): one function per promise; each test file of a codec calls them all."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from kdcache.codec import get_codec
from kdcache.codec.base import Codec
from kdcache.errors import CorruptCacheError
from kdcache.format.manifest import SelectionInfo
from kdcache.format.record import Distributions
from kdcache.store.records.column_view import column_view

MakeCodec = Callable[[int], Codec]
"""vocab_size -> codec"""


def make(
    supports: Sequence[Sequence[tuple[int, float]]], tails: Sequence[float] | None = None, outside: Sequence[float] = ()
) -> Distributions:
    """Distributions from (id, logprob) pairs per position."""
    pairs = [pair for support in supports for pair in support]
    counts = np.array([len(support) for support in supports], np.int64)
    return Distributions(
        token_ids_E=np.array([pair[0] for pair in pairs], np.int32),
        logprobs_E=np.array([pair[1] for pair in pairs], np.float32),
        offsets_P1=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        tail_mass_P=np.array([0.25] * len(supports) if tails is None else tails, np.float32),
        outside_target_logprobs=np.array(outside, np.float32),
    )


CORNERS: dict[str, tuple[int, Distributions]] = {
    "no positions": (97, make([])),
    "an empty support": (97, make([[]], tails=[1.0], outside=[-3.0])),
    "empty supports between full ones": (97, make([[], [(3, -1.0)], [], [], [(5, -0.5), (9, -2.0)], []])),
    "a support of one": (97, make([[(96, -0.0)]], tails=[0.0])),
    "the whole vocabulary": (5, make([[(i, -1.609438) for i in range(5)]] * 3, tails=[0.0] * 3)),
    "a vocabulary of one": (1, make([[(0, 0.0)], [(0, 0.0)]], tails=[0.0, 0.0])),
    "the largest vocabulary": (2**31, make([[(2**31 - 1, -1.0), (0, -2.0)]])),
    "probability zero": (97, make([[(1, -0.5), (2, -np.inf), (3, -np.inf)]], outside=[-np.inf])),
    "tails of zero and one": (97, make([[(1, 0.0)], [(1, -np.inf)]], tails=[0.0, 1.0])),
    "more than one word of bits": (128256, make([[(128255 - i, -float(i)) for i in range(40)]] * 7)),
    "outside targets": (97, make([[(1, -1.0)], [(2, -1.0)]], outside=[-11.5, -0.001])),
}


def round_trip(codec: Codec, sequences: Sequence[Distributions]) -> list[Distributions]:
    """Encode a record batch, carry it through an Arrow file in memory, decode each row."""
    decoded = []
    columns = through_arrow(codec, sequences)
    for row, distributions in enumerate(sequences):
        values = {name: view[row] for name, view in columns.items()}
        decoded.append(codec.decode(values, distributions.offsets_P1))  # pyright: ignore[reportArgumentType]
    return decoded


def through_arrow(codec: Codec, sequences: Sequence[Distributions]) -> dict[str, Any]:
    """Column name -> view of the encoded column, after a validated trip through the IPC format."""
    schema = pa.schema(codec.fields())
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.record_batch(codec.encode(sequences), schema=schema))
    batch = pa.ipc.open_file(sink.getvalue()).get_batch(0)
    batch.validate(full=True)
    return {name: column_view(batch.column(name)) for name in schema.names}


def check_equal_within_bound(codec: Codec, found: Distributions, expected: Distributions) -> None:
    """Ids and offsets exactly; numbers within what the codec says of itself, falling, and their sums within 1."""
    np.testing.assert_array_equal(found.offsets_P1, expected.offsets_P1, strict=True)
    if codec.codec_id in REORDERS_EQUALS:
        expected = equals_by_id(expected, found.logprobs_E)
    np.testing.assert_array_equal(found.token_ids_E, expected.token_ids_E, strict=True)
    for name in ("logprobs_E", "outside_target_logprobs"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert ours.dtype == np.float32
        assert (_distance(ours, theirs) <= codec.max_error_nats(theirs)).all(), name
    assert found.tail_mass_P.dtype == np.float32
    with np.errstate(divide="ignore"):
        ours, theirs = (np.log(d.tail_mass_P.astype(np.float64)) for d in (found, expected))
    # A float32 mass near 1 has steps of 2^-24; below its normal numbers (2^-126) the steps grow against the mass.
    rounding = 2.0**-23 + 2.0**-149 / np.maximum(expected.tail_mass_P.astype(np.float64), 2.0**-149)
    exact = codec.max_error_nats(np.array([-1.0])).max() == 0
    assert (_distance(ours, theirs) <= codec.max_error_nats(theirs) + (0 if exact else rounding)).all()


REORDERS_EQUALS = {"archive"}
"""Codecs that put the entries which they make equal into the order of their ids: the record's own order."""


def equals_by_id(d: Distributions, logprobs_E: NDArray[np.float32]) -> Distributions:
    """The same entries, those of equal logprobs_E (exact ones apart from estimates) by rising id."""
    rows_E = np.repeat(np.arange(d.num_positions), d.num_entries_P)
    order_E = np.lexsort((d.token_ids_E, -logprobs_E, ~d.is_exact_E, rows_E))
    return dataclasses.replace(d, token_ids_E=d.token_ids_E[order_E], logprobs_E=d.logprobs_E[order_E])


def check_sums_and_order(codec: Codec, found: Distributions, expected: Distributions) -> None:
    """Of what a teacher may say: logprobs fall, exact entries and tail sum to no more than 1, 0 and -inf stay what they are."""
    rows_E = np.repeat(np.arange(found.num_positions), found.num_entries_P)
    same_E = (rows_E[1:] == rows_E[:-1]) & (found.is_exact_E[1:] == found.is_exact_E[:-1])
    assert (np.diff(found.logprobs_E)[same_E] <= 0).all()
    before_P, after_P = (
        np.bincount(rows_E[d.is_exact_E], np.exp(d.logprobs_E[d.is_exact_E].astype(np.float64)), minlength=d.num_positions)
        + d.tail_mass_P
        for d in (expected, found)
    )
    rounding = 2e-3 if codec.params().get("bits", 16) == 16 and codec.codec_id != "raw" else 2e-6
    assert (after_P <= np.maximum(before_P, 1.0) + rounding).all()


def _distance(ours: NDArray[Any], theirs: NDArray[Any]) -> NDArray[np.float64]:
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    with np.errstate(invalid="ignore"):
        return np.where(ours == theirs, 0.0, np.abs(ours - theirs))


def check_corners(make_codec: MakeCodec) -> None:
    """Every corner comes back, alone and as rows of one batch."""
    for name, (vocab_size, distributions) in CORNERS.items():
        codec = make_codec(vocab_size)
        try:
            for found in round_trip(codec, [distributions, distributions]):
                check_equal_within_bound(codec, found, distributions)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def check_a_batch_of_no_sequences(make_codec: MakeCodec) -> None:
    """Zero rows are legal."""
    assert round_trip(make_codec(97), []) == []


def check_round_trip(codec: Codec, sequences: Sequence[Distributions]) -> None:
    """Decode of encode gives the same back (for property tests)."""
    for found, expected in zip(round_trip(codec, sequences), sequences, strict=True):
        check_equal_within_bound(codec, found, expected)


SELECTIONS = [
    (SelectionInfo(kind="top_p_k", params={"p": 0.9, "k": 3}, temperatures=(2.0, 0.5)), None),
    (SelectionInfo(kind="sampled", params={"num_draws": 9, "seed": 0}, entropy=True), [0, 0, 0]),
    (SelectionInfo(kind="threshold", params={"tau": 0.25, "seed": 0}, temperatures=(2.0,), entropy=True), [1, 0, 2]),
    (SelectionInfo(kind="top_k_sampled", params={"k": 1, "num_draws": 5, "seed": 0}), [1, 0, 1]),
]
"""With the numbers of exact entries of the positions of `_of_selection`."""


def _of_selection(selection: SelectionInfo, num_exact: list[int] | None) -> Distributions:
    """Three positions with 2, 0 and 3 entries, whose numbers are what the selection could have made of some teacher."""
    half, quarter, third = float(np.log(0.5)), float(np.log(0.25)), float(np.log(1 / 3))
    values = {"sampled": (third, third), "top_k_sampled": (half, float(np.log(0.5 / 5)))}.get(selection.kind, (half, quarter))
    plain = make([[(7, values[0]), (3, values[1])], [], [(5, values[0]), (1, values[1]), (2, values[1])]], [0.5, 1.0, 0.5])
    log_z_PL = np.linspace(0, 9, 3 * len(selection.temperatures), dtype=np.float32).reshape(3, -1)
    return dataclasses.replace(
        plain,
        tail_mass_P=np.ones(3, np.float32) if selection.kind == "sampled" else plain.tail_mass_P,
        num_exact_P=None if num_exact is None else np.array(num_exact, np.int64),
        log_z_PL=log_z_PL if selection.temperatures else None,
        entropy_P=np.array([0.0, 2.5, 11.0], np.float32) if selection.entropy else None,
    )


def check_selections(codec_id: str) -> None:
    """What a selection keeps beside the entries comes back, and what it does not keep is refused."""
    for selection, num_exact in SELECTIONS:
        codec, expected = get_codec(codec_id, {"vocab_size": 97}, selection), _of_selection(selection, num_exact)
        for found in round_trip(codec, [expected, expected]):
            check_equal_within_bound(codec, found, expected)
            for name in ("num_exact_P", "log_z_PL", "entropy_P"):
                ours, theirs = getattr(found, name), getattr(expected, name)
                assert (ours is None) == (theirs is None), (selection.kind, name)
                if theirs is not None:
                    assert (_distance(ours, theirs) <= codec.max_error_nats(theirs)).all(), (selection.kind, name)


def check_params_through_json(make_codec: MakeCodec) -> None:
    """The id and the parameters, as JSON, rebuild the codec."""
    codec = make_codec(128256)
    params = json.loads(json.dumps(codec.params()))
    again = get_codec(codec.codec_id, params)
    assert type(again) is type(codec)
    assert again.params() == codec.params()
    expected = CORNERS["more than one word of bits"][1]
    assert _bytes(again, expected) == _bytes(codec, expected)


def check_determinism(make_codec: MakeCodec) -> None:
    """Equal input, equal bytes, whatever memory the arrays stand in."""
    for vocab_size, distributions in CORNERS.values():
        codec = make_codec(vocab_size)
        strided = Distributions(
            token_ids_E=np.repeat(distributions.token_ids_E, 2)[::2],
            logprobs_E=np.repeat(distributions.logprobs_E, 2)[::2],
            offsets_P1=np.repeat(distributions.offsets_P1, 2)[::2],
            tail_mass_P=np.repeat(distributions.tail_mass_P, 2)[::2],
            outside_target_logprobs=np.repeat(distributions.outside_target_logprobs, 2)[::2],
        )
        assert _bytes(codec, distributions) == _bytes(codec, strided)


def _bytes(codec: Codec, distributions: Distributions) -> bytes:
    schema = pa.schema(codec.fields())
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.record_batch(codec.encode([distributions]), schema=schema))
    return sink.getvalue().to_pybytes()


def check_hostile_columns(make_codec: MakeCodec) -> None:
    """Columns of wrong length or type, and counts beyond all bounds, raise CorruptCacheError and nothing else."""
    codec = make_codec(97)
    good = make([[(1, -1.0), (2, -2.0)], [(96, -0.5)]], outside=[-3.0])
    columns = {name: view[0] for name, view in through_arrow(codec, [good]).items()}
    codec.decode(columns, good.offsets_P1)
    counted = [name for name in columns if not name.startswith("outside_target")]
    for name in columns:
        values = columns[name]
        wrong = [values.astype(np.float64), values.astype(np.int16), values.astype(object)]
        if name in counted:
            wrong += [values[:-1], values[:0], np.concatenate([values, values])]
        for value in wrong:
            with pytest.raises(CorruptCacheError, match=name):
                codec.decode({**columns, name: value}, good.offsets_P1)
    for offsets in ([0], [0, 3], [0, 2, 3, 3], [0, 2, 40], [0, 2, 2**40], [0, 2**62, 2**63 - 1]):
        with pytest.raises(CorruptCacheError):
            codec.decode(columns, np.array(offsets, np.int64))


def check_ids_outside_the_vocabulary(make_codec: MakeCodec) -> None:
    """They are refused when a file holds them; what is encoded has been checked."""
    larger = make([[(1, -1.0), (127, -2.0)]])  # 127 and 97 have the same number of bits
    columns = {name: view[0] for name, view in through_arrow(make_codec(128), [larger]).items()}
    with pytest.raises(CorruptCacheError, match="vocabulary of 97"):
        make_codec(97).decode(columns, larger.offsets_P1)


def check_unfit_parameters(codec_id: str) -> None:
    """A vocabulary size that is none, and unknown parameters, are refused in words."""
    from kdcache.errors import UnsupportedVersionError

    for params in ({"vocab_size": v} for v in (0, -1, 2**31 + 1, 2**70, 5.0, "97", None, True, [97])):
        with pytest.raises(UnsupportedVersionError, match="vocab_size"):
            get_codec(codec_id, params)
    for params in ({}, {"vocab_size": 97, "width": 3}):
        with pytest.raises(UnsupportedVersionError, match=codec_id):
            get_codec(codec_id, params)


def check_columns_are_not_written(make_codec: MakeCodec) -> None:
    """Decode works on read-only memory and changes none of it."""
    for vocab_size, distributions in CORNERS.values():
        codec = make_codec(vocab_size)
        columns = {name: np.array(view[0]) for name, view in through_arrow(codec, [distributions]).items()}
        before = {name: values.tobytes() for name, values in columns.items()}
        for values in columns.values():
            values.flags.writeable = False
        codec.decode(columns, distributions.offsets_P1)
        assert {name: values.tobytes() for name, values in columns.items()} == before


def check_hostile_numbers_do_not_warn(make_codec: MakeCodec) -> None:
    """Numbers that no teacher gives (a file may hold any bits) decode without a warning; `kdcache verify` names them."""
    codec = make_codec(97)
    good = make([[(1, -1.0), (2, -2.0)]], outside=[-3.0])
    columns = {name: view[0] for name, view in through_arrow(codec, [good]).items()}
    for name, values in columns.items():
        if values.dtype.kind == "f":
            for number in (np.nan, np.inf, -np.inf, np.finfo(values.dtype).max):
                codec.decode({**columns, name: np.full_like(values, number)}, good.offsets_P1)


CHECKS: tuple[Callable[[MakeCodec], None], ...] = (
    check_corners,
    check_a_batch_of_no_sequences,
    check_params_through_json,
    check_determinism,
    check_hostile_columns,
    check_ids_outside_the_vocabulary,
    check_columns_are_not_written,
    check_hostile_numbers_do_not_warn,
)
"""What takes nothing but a codec; `check_round_trip` takes drawn sequences, `check_unfit_parameters` the codec's id."""
