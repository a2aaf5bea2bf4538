"""Codecs' columns with changed bytes, decoded between guard pages; what comes out must be in range, and the same by every way.

Shape letters: P positions, E entries, K entries per position (padded).
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from codec.selected import draw
from fuzzing.generated import make_selection
from fuzzing.guarded import GuardedNumpy, Pages
from numpy.typing import NDArray

import kdcache.codec._numba as bits_module
import kdcache.codec.archive.codec as archive_module
from kdcache.codec import get_codec
from kdcache.codec.archive.reference import Decoder, Layout
from kdcache.codec.base import Codec, EntryArrays
from kdcache.codec.bit_stream import packed_size
from kdcache.codec.numba_unpack import TOO_WIDE, Unpacking, unpack_many
from kdcache.errors import CorruptCacheError
from kdcache.format.record import Distributions
from kdcache.format.selection import fixed_exact
from kdcache.store.records.column_view import column_view

_CODECS = [("packed", None)] + [("quantized", b) for b in range(4, 9)] + [("archive", b) for b in (4, 5, 6, 7, 8, 16)] * 2
MOST_BY_REFERENCE = 300
"""Entries of a stream that plain Python decodes as well."""


def trial(seed: int, folder: Path) -> list[str]:
    """Decode spoilt columns, or unpack a random stream, at both ends of guarded memory; gives what must not be."""
    rng = random.Random(seed)
    found: list[str] = []
    for at_front in (False, True):
        pages = Pages(at_front=at_front)
        try:
            found += _unpack(seed, pages) if rng.random() < 0.4 else _decode(seed, pages)
        finally:
            pages.free()
    return found


def _decode(seed: int, pages: Pages) -> list[str]:
    rng, values = random.Random(seed), np.random.default_rng(seed)
    name, bits = rng.choice(_CODECS)
    selection, vocab_size = make_selection(rng), rng.choice((64, 97, 128256, 2**20, 2**31 - 1, 2**31))
    codec = get_codec(name, {"vocab_size": vocab_size, **({} if bits is None else {"bits": bits})}, selection)
    sound = draw(selection, vocab_size=vocab_size, num_positions=rng.choice((1, 2, 3, 10)), seed=seed)
    columns = {
        field.name: np.array(column_view(array)[0]) for field, array in zip(codec.fields(), codec.encode([sound]), strict=True)
    }
    offsets_P1 = np.array(sound.offsets_P1)
    if rng.random() < 0.9:
        _spoil(columns, rng, values)
    if rng.random() < 0.2:
        offsets_P1 = np.append(0, np.cumsum(values.integers(0, 9, len(offsets_P1) - 1))).astype(np.int64)
    columns = {name: pages.copy(column) for name, column in columns.items()}
    offsets_P1 = pages.copy(offsets_P1)
    with pytest.MonkeyPatch.context() as patch:
        for module in (archive_module, bits_module):
            patch.setattr(module, "np", GuardedNumpy(pages))
        outcome = _decoded(codec, columns, offsets_P1)
        placed = _placed(codec, columns, offsets_P1, pages)
    if outcome is None:
        return []  # decode_into reads less, no outside targets, and may see nothing wrong
    if placed is None:
        return [f"{name}: decode_into refuses what decode reads"]
    found = _in_range(outcome, vocab_size)
    if not np.array_equal(outcome.padded(placed[0].shape[1])[0], placed[0]):
        found.append(f"{name}: decode_into gives other ids than decode")
    if name == "archive" and outcome.num_entries <= MOST_BY_REFERENCE:
        found += _by_reference(codec, columns["archive"], outcome)
    return found


def _spoil(columns: dict[str, NDArray[Any]], rng: random.Random, values: np.random.Generator) -> None:
    """Some bytes, or all, of one column; or its length."""
    name = rng.choice(sorted(columns))
    column = columns[name]
    data = column.view(np.uint8).copy()
    kind = rng.random()
    if kind < 0.5:
        for _ in range(rng.choice((1, 1, 2, 8)) if len(data) else 0):
            data[rng.randrange(len(data))] = rng.choice((0, 255, rng.randrange(256)))
    elif kind < 0.8:
        data[:] = rng.choice((0, 255)) if rng.random() < 0.4 else values.integers(0, 256, len(data))
    else:
        data = np.resize(data, max(0, len(data) + column.itemsize * rng.choice((-8, -1, 1, 8, len(column))))).astype(np.uint8)
    columns[name] = data.view(column.dtype)


def _decoded(codec: Codec, columns: dict[str, NDArray[Any]], offsets_P1: NDArray[np.int64]) -> Distributions | None:
    try:
        return codec.decode(columns, offsets_P1)
    except CorruptCacheError:
        return None


def _placed(
    codec: Codec, columns: dict[str, NDArray[Any]], offsets_P1: NDArray[np.int64], pages: Pages
) -> tuple[NDArray[np.int32], NDArray[np.float32]] | None:
    num_positions, widest = len(offsets_P1) - 1, max(1, int(np.diff(offsets_P1).max(initial=0)))
    ids_PK, logprobs_PK = (pages.empty((num_positions, widest), kind) for kind in (np.int32, np.float32))
    try:
        codec.decode_into(columns, offsets_P1, EntryArrays(ids_PK, logprobs_PK, pages.empty(num_positions, np.float32)))
    except CorruptCacheError:
        return None
    return np.array(ids_PK), np.array(logprobs_PK)


def _in_range(d: Distributions, vocab_size: int) -> list[str]:
    ids_E = d.token_ids_E
    return [] if not len(ids_E) or (ids_E.min() >= 0 and ids_E.max() < vocab_size) else ["an id is outside the vocabulary"]


def _by_reference(codec: Any, stream: NDArray[np.uint8], found: Distributions) -> list[str]:
    """The definition of the stream gives the same ids."""
    about = codec._about(0, 0, 0)
    counts = [int(count) for count in found.num_entries_P]
    fixed = fixed_exact(codec.selection)
    exact = counts if fixed is None else [min(fixed, count) for count in counts]
    layout = Layout(about[0], about[2], bool(about[3]), about[1], about[4] > 0)
    record = Decoder(stream.tobytes(), layout).decode(counts, exact)
    return [] if record.token_ids == found.token_ids_E.tolist() else ["archive: its definition gives other ids"]


def _unpack(seed: int, pages: Pages) -> list[str]:
    """`unpack_many` at any width, over any bits, with some positions left out and rows too wide for their place."""
    rng, values = random.Random(seed), np.random.default_rng(seed)
    id_bits, widest = rng.randrange(1, 32), rng.choice((1, 2, 3, 7, 8, 9, 16, 17, 64, 100))
    num_positions = rng.choice((0, 1, 2, 5, 30))
    counts_P = values.integers(0, widest + 1, num_positions) if rng.random() < 0.6 else np.full(num_positions, widest)
    is_wide = num_positions > 0 and rng.random() < 0.1
    if is_wide:
        counts_P[rng.randrange(num_positions)] = widest + rng.choice((1, 5, 1000))
    offsets_P1 = np.append(0, np.cumsum(counts_P)).astype(np.int64)
    num_entries = int(offsets_P1[-1])
    kept_Q = np.flatnonzero(values.random(num_positions) < 0.5).astype(np.int64) if rng.random() < 0.5 else None
    num_kept = num_positions if kept_Q is None else len(kept_Q)
    stream = np.frombuffer(values.bytes(packed_size(num_entries, id_bits)), np.uint32)
    job = Unpacking(
        pages.copy(stream),
        pages.copy(np.frombuffer(values.bytes(2 * num_entries), np.float16)),
        pages.copy(offsets_P1),
        None if kept_Q is None else pages.copy(kept_Q),
        pages.empty((num_kept, widest), np.int32),
        pages.empty((num_kept, widest), rng.choice((np.float16, np.float32))),
    )
    largest = int(unpack_many([job], id_bits)[0])
    if largest == TOO_WIDE:
        return [] if is_wide else ["a row that fits is called too wide"]
    return [] if -1 <= largest < 2**id_bits else [f"an id of {id_bits} bits is {largest}"]
