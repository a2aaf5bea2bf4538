"""What is compared: our codecs under every selection, and what others store, from their published definitions.

Shape letters: P positions, K entries per position, E entries of all positions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rate_measures import Reading, Truth

from kdcache.codec import get_codec
from kdcache.codec.archive.codec import ArchiveCodec
from kdcache.codec.archive.model import EXACTS, LEAST_P, TAILS
from kdcache.codec.archive.reference import Decoder, Layout, Record
from kdcache.codec.base import Codec, DecodeTask, EntryArrays
from kdcache.codec.estimates import stores_logprobs
from kdcache.format.manifest import SelectionInfo
from kdcache.format.record import Distributions, TokenSequence
from kdcache.store.records.column_view import column_view
from kdcache.teacher.select.found import Found, Selected, record_of
from kdcache.teacher.select.torch_selector import Selector
from kdcache.teacher.select.uniforms import position_states

PARTS = ("indices", "values", "scalars", "framing")
PART_OF = {
    "token_ids": "indices", "token_ids_packed": "indices",
    "logprobs": "values", "logprob_codes": "values", "estimate_counts": "values",
}  # fmt: skip
CODECS = (("packed", None), *(("quantized", bits) for bits in (8, 6)), *(("archive", bits) for bits in (16, 8, 6, 5, 4)))
BATCH = 16
"""Sequences that are decoded by one call, as a loader does for a batch."""
OUT_OF_CACHE, MOST_SEQUENCES = 2**26, 256
NUM_SPLIT = 200
"""Positions of a stream of `archive` whose bits are counted one by one, to divide its bytes among the parts."""


@dataclass(frozen=True)
class Result:
    """One row of the table. Bytes are per position; M entries per CPU second; copies: CPU time of decoding over that of copying
    the ids and logprobs that it writes."""

    family: str
    name: str
    entries: float
    indices: float
    values: float
    scalars: float
    framing: float
    kl: float
    error: float
    angle: float
    decode: float = math.nan
    copies: float = math.nan

    @property
    def bytes(self) -> float:
        """Per position, all together."""
        return self.indices + self.values + self.scalars + self.framing


def select(truth: Truth, selection: SelectionInfo, sequences: Sequence[TokenSequence]) -> list[Distributions]:
    """What captures keep of the teacher's distributions, by the code that they use."""
    found, start = [], 0
    selector = Selector(selection, truth.logprobs_PV.shape[1])
    for sequence in sequences:
        logits_PV = torch.from_numpy(truth.logprobs_PV[start : start + sequence.num_tokens])
        states_P = position_states(selection.params.get("seed", 0), sequence.key, sequence.positions_P)
        targets_P = torch.from_numpy(sequence.target_ids_P.astype(np.int64))
        chosen = selector.select(logits_PV, targets_P, torch.from_numpy(states_P.view(np.int64)))
        found.append(record_of(sequence, selection, Found.from_padded(Selected(*(part.numpy() for part in chosen)))))
        start += sequence.num_tokens
    return found


def of_codec(truth: Truth, records: Sequence[Distributions], selection: SelectionInfo, codec: Codec, name: str) -> Result:
    """Encode, decode, measure."""
    columns = {f.name: column_view(a) for f, a in zip(codec.fields(), codec.encode(records), strict=True)}
    rows = [{n: view[i] for n, view in columns.items()} for i in range(len(records))]
    rate, copies = timed_decode(codec, rows, records)
    decoded = [codec.decode(row, d.offsets_P1) for row, d in zip(rows, records, strict=True)]
    num_positions, num_entries = (sum(getattr(d, a) for d in records) for a in ("num_positions", "num_entries"))
    sizes = dict.fromkeys(PARTS, 0.0)
    for row in rows:
        for column, values in row.items():
            sizes[PART_OF.get(column, "scalars")] += values.nbytes / num_positions
            sizes["framing"] += (8 if column in ("token_ids_packed", "archive") else 4) / num_positions
    sizes["framing"] += 0 if selection.kind == "top_k" else 2
    if isinstance(codec, ArchiveCodec):
        total = sizes["scalars"]
        shares = archive_shares(codec, rows[0]["archive"].tobytes(), records[0])
        sizes |= {part: total * share for part, share in zip(PARTS, shares, strict=False)}
    head, target = readings(decoded)
    return Result(
        selection.kind, name, num_entries / num_positions, *sizes.values(), kl=truth.kl(head) if head else math.nan,
        error=truth.error(target), angle=truth.angle(target), decode=rate / 1e6, copies=copies,
    )  # fmt: skip


def timed_decode(
    codec: Codec, rows: Sequence[dict[str, Any]], records: Sequence[Distributions], rounds: int = 5
) -> tuple[float, float]:
    """Entries per CPU second of decoding into batches' arrays, BATCH sequences by each call; and the CPU time of that over that
    of copying the ids and logprobs that then stand there. Sums over all batches, the best of the rounds. The rows come again
    and again, but many arrays are filled in turn (for archive, one batch's), so that a copy goes through memory.
    """
    width = max(int(d.num_entries_P.max(initial=1)) for d in records)
    size = sum(8 * d.num_positions * width for d in records) / len(records)
    num_sequences = BATCH if isinstance(codec, ArchiveCodec) else min(math.ceil(OUT_OF_CACHE / size), MOST_SEQUENCES)
    chosen = [n % len(rows) for n in range(-(-num_sequences // BATCH) * BATCH)]
    tasks = [DecodeTask(rows[n], records[n].offsets_P1, _arrays(records[n], width), None, f"row {n}") for n in chosen]
    seconds = [_arrays(records[n], width) for n in chosen]
    best, best_copy = math.inf, math.inf
    for _ in range(rounds):
        start = time.process_time_ns()
        for first in range(0, len(tasks), BATCH):
            codec.decode_many_into(tasks[first : first + BATCH])
        middle = time.process_time_ns()
        for task, second in zip(tasks, seconds, strict=True):
            np.copyto(second.token_ids_PK, task.out.token_ids_PK)
            np.copyto(second.logprobs_PK, task.out.logprobs_PK)
        best, best_copy = min(best, middle - start), min(best_copy, time.process_time_ns() - middle)
    return 1e9 * sum(records[n].num_entries for n in chosen) / best, best / best_copy


def _arrays(d: Distributions, width: int) -> EntryArrays:
    shape = (d.num_positions, width)
    return EntryArrays(np.zeros(shape, np.int32), np.zeros(shape, np.float32), np.zeros(d.num_positions, np.float32))


def readings(records: Sequence[Distributions]) -> tuple[Reading | None, Reading]:
    """Exact entries and tail, where there are exact ones; and the target that the right loss trains towards."""
    offsets_P1 = np.concatenate([[0], np.cumsum(np.concatenate([d.num_entries_P for d in records]))])
    ids_E, logprobs_E, is_exact_E = (
        np.concatenate([getattr(d, a) for d in records]) for a in ("token_ids_E", "logprobs_E", "is_exact_E")
    )
    tails_P = np.concatenate([d.tail_mass_P for d in records]).astype(np.float64)
    masses_E = np.exp(logprobs_E.astype(np.float64))
    everything = Reading(ids_E, masses_E, offsets_P1, np.zeros(len(tails_P)), has_kl=False)
    if not is_exact_E.any():
        return None, everything
    counts_P = np.bincount(everything.rows_E[is_exact_E], minlength=len(tails_P))
    head = Reading(ids_E[is_exact_E], masses_E[is_exact_E], np.concatenate([[0], np.cumsum(counts_P)]), tails_P)
    return head, head if is_exact_E.all() else everything


class _Counting(Decoder):
    """Counts what each part of the stream costs, in bits."""

    part = "scalars"
    bits: dict[str, float]

    def split(self, num_entries: list[int], num_exact: list[int]) -> dict[str, float]:
        self.bits, record = dict.fromkeys(PARTS[:3], 0.0), Record()
        for p, (count, given) in enumerate(zip(num_entries, num_exact, strict=True)):
            exact = self._number(EXACTS + min(count, 31)) if self._layout.stores_exact else given
            self._position(record, count, exact)
            if self._layout.has_tail:
                self._number(TAILS + self._tail_context(record, p, count))
        return self.bits

    def _bit(self, p: int) -> int:
        bit = super()._bit(p)
        held = min(max(p, LEAST_P), 65536 - LEAST_P) / 65536
        self.bits[self.part] -= math.log2(held if bit else 1 - held)
        return bit

    def _codes(self, kind: int, count: int) -> list[int]:
        self.part = "values"
        codes = super()._codes(kind, count)
        self.part = "scalars"
        return codes

    def _ids(self, count: int, kind: int, depth: int, node: int) -> list[int]:
        self.part = "indices"
        ids = super()._ids(count, kind, depth, node)
        self.part = "scalars"
        return ids


def archive_shares(codec: ArchiveCodec, stream: bytes, record: Distributions) -> list[float]:
    """Of the stream's bytes, what ids, values and scalars take: of the targets beside the support, a byte each."""
    width, most_code, num_draws, stores_exact, most_tail, *_ = codec._about(0, 0, 0)
    counting = _Counting(stream, Layout(width, num_draws, bool(stores_exact), most_code, bool(most_tail)))
    counts_P = record.num_entries_P[:NUM_SPLIT]
    exact_P = counts_P if record.num_exact_P is None else record.num_exact_P[:NUM_SPLIT]
    bits = counting.split(counts_P.tolist(), exact_P.tolist())
    bits["scalars"] += 7 * len(record.outside_target_logprobs) * len(counts_P) / record.num_positions
    return [bits[part] / sum(bits.values()) for part in PARTS[:3]]


def renormalised(ids_PK: NDArray[np.integer], logprobs_PK: NDArray[np.floating]) -> tuple[Reading, Reading]:
    """Entries without a tail: for KL with what they leave of 1, for the gradient divided by their sum, as the losses do."""
    masses_PK = np.exp(logprobs_PK.astype(np.float64))
    sums_P = masses_PK.sum(-1, keepdims=True)
    offsets_P1 = np.arange(len(ids_PK) + 1) * ids_PK.shape[1]
    ids_E, zeros_P = ids_PK.reshape(-1).astype(np.int32), np.zeros(len(ids_PK))
    left = Reading(ids_E, masses_PK.reshape(-1), offsets_P1, np.maximum(1 - sums_P[:, 0], 0.0))
    return left, Reading(ids_E, (masses_PK / sums_P).reshape(-1), offsets_P1, zeros_P)


def bfloat16(values: NDArray[np.floating]) -> NDArray[np.float32]:
    """Rounded to the nearest bfloat16, as float32."""
    return torch.from_numpy(np.ascontiguousarray(values, np.float32)).bfloat16().float().numpy()


def distillkit(
    logprobs_PK: NDArray[np.float32], exact_k: int, terms: Sequence[Any], *, normalize_t: bool
) -> NDArray[np.float32]:
    """What comes back of the top K: bfloat16 for the first exact_k, a curve fitted by least squares for the others.

    arcee-ai/DistillKit a61c2e7d, README "Logit Compression" and distillkit/compression/monotonic_logprobs.py: the curve is over
    t = 0, 1, .. (evenly from 0 to 1 with normalize_t), solved by torch's singular values in float32, those up to 1e-5 dropped;
    coefficients in float32, the result in bfloat16. In float32 the six terms of the recommended setting are too
    ill-conditioned.
    """
    values_PK = torch.from_numpy(np.ascontiguousarray(logprobs_PK[:, exact_k:]))
    num = values_PK.shape[1]
    t = torch.linspace(0, 1, num) if normalize_t else torch.arange(num, dtype=torch.float32)
    curves = torch.stack([torch.sqrt(t) if term == "sqrt" else t**term for term in terms], -1)
    u, s, vh = torch.linalg.svd(curves, full_matrices=False)
    inverse = torch.where(s > 1e-5, 1 / s, 0.0)
    coefficients = (vh.T @ (inverse[:, None] * (u.T @ values_PK.T))).T
    fitted_PK = (curves * coefficients[:, None, :]).sum(-1)
    return np.concatenate([bfloat16(logprobs_PK[:, :exact_k]), bfloat16(fitted_PK.numpy())], axis=1)


BITS_PER_DRAWN = 17 + 7
"""Of Random Sampling KD, for each token that was drawn: id and count."""


def random_sampling(
    truth: Truth, sequences: Sequence[TokenSequence], num_draws: int | None = None, most_bytes: float = 36.0
) -> dict[int, list[Distributions]]:
    """Records of Random Sampling KD: of so many draws, or of the most that take no more bytes per position; by their number."""
    made: dict[int, list[Distributions]] = {}

    def bytes_of(number: int) -> float:
        selection = SelectionInfo(kind="sampled", params={"num_draws": number, "seed": 0})
        made[number] = select(truth, selection, sequences)
        return BITS_PER_DRAWN / 8 * sum(d.num_entries for d in made[number]) / sum(d.num_positions for d in made[number])

    if num_draws is not None:
        bytes_of(num_draws)
        return made
    chosen = most_draws(bytes_of, most_bytes)
    return {chosen: made[chosen]}


def most_draws(bytes_of: Callable[[int], float], most_bytes: float, most: int = 4096) -> int:
    """The largest number of draws from 1 to `most` that takes no more bytes, by bisection; 1 where none does."""
    enough, too_many = 1, most + 1
    bytes_of(enough)
    while too_many - enough > 1:
        # Doubled first: few draws are made faster than many.
        middle = min(2 * enough, (enough + too_many) // 2)
        if bytes_of(middle) <= most_bytes:
            enough = middle
        else:
            too_many = middle
    return enough


def baselines(truth: Truth, sampled: Mapping[int, Sequence[Distributions]]) -> list[Result]:
    """Everything that is not ours. sampled: of Random Sampling KD, by the number of draws."""
    vocab_size = truth.logprobs_PV.shape[1]
    width = math.ceil(math.log2(vocab_size))
    order_PK = np.argpartition(-truth.logprobs_PV, 127, axis=-1)[:, :128]
    order_PK = np.take_along_axis(order_PK, np.argsort(-np.take_along_axis(truth.logprobs_PV, order_PK, -1), -1), -1)
    top_PK = np.take_along_axis(truth.logprobs_PV, order_PK, -1)

    def result(name: str, k: float, sizes: tuple[float, float, float, float], pair: tuple[Reading, Reading]) -> Result:
        left, target = pair
        kl = truth.kl(left) if left.has_kl else math.nan
        return Result("others", name, k, *sizes, kl=kl, error=truth.error(target), angle=truth.angle(target))

    found = [
        result(f"plain lists, int32 + fp16, k={k}", k, (4.0 * k, 2.0 * k, 0, 8),
               renormalised(order_PK[:, :k], top_PK[:, :k].astype(np.float16)))
        for k in (16, 64)
    ]  # fmt: skip
    for name, k, exact_k, terms in (
        ("DistillKit recommended", 128, 16, (0, 1, 2, 3, 4, "sqrt")),
        ("DistillKit budget", 50, 1, (0, 1, "sqrt")),
    ):
        for normalize_t in (False, True):
            back_PK = distillkit(top_PK[:, :k], exact_k, terms, normalize_t=normalize_t)
            sizes = (math.ceil(k * width / 8), 2.0 * exact_k + 4.0 * len(terms), 0, 0)
            found.append(result(name + " (normalize_t)" * normalize_t, k, sizes, renormalised(order_PK[:, :k], back_PK)))
    found.append(result("top-p 0.95, k=100, int32 + fp16", *_top_p(order_PK, top_PK)))
    for num_draws, records in sampled.items():
        _, drawn = readings(records)
        entries = len(drawn.token_ids_E) / len(drawn.rest_P)
        sizes = (17 * entries / 8, 7 * entries / 8, 0, 0)
        found.append(result(f"Random Sampling KD, N={num_draws}, 17 + 7 bits", entries, sizes, (drawn, drawn)))
    rounded_PV = np.exp(truth.logprobs_PV.astype(np.float16).astype(np.float32))
    kl = (truth.teacher_PV * (truth.logprobs_PV - truth.logprobs_PV.astype(np.float16).astype(np.float32))).sum(-1).mean()
    error = float(((rounded_PV - truth.teacher_PV) ** 2).sum(-1).mean())
    found.append(Result("others", "all logprobs, fp16", vocab_size, 0, 2.0 * vocab_size, 0, 0, abs(float(kl)), error, 0.0))
    return found


def _top_p(
    order_PK: NDArray[np.integer], top_PK: NDArray[np.float32]
) -> tuple[float, tuple[float, float, float, float], tuple[Reading, Reading]]:
    masses_PK = np.exp(top_PK[:, :100].astype(np.float64))
    kept_PK = np.cumsum(masses_PK, -1) - masses_PK < 0.95
    counts_P = kept_PK.sum(-1)
    offsets_P1, zeros_P = np.concatenate([[0], np.cumsum(counts_P)]), np.zeros(len(counts_P))
    ids_E, masses_E = order_PK[:, :100][kept_PK].astype(np.int32), masses_PK[kept_PK]
    left = Reading(ids_E, masses_E, offsets_P1, zeros_P)
    sums_P = left.sums(masses_E)
    k = float(counts_P.mean())
    pair = (
        Reading(ids_E, masses_E, offsets_P1, np.maximum(1 - sums_P, 0)),
        Reading(ids_E, masses_E / sums_P[left.rows_E], offsets_P1, zeros_P),
    )
    return k, (4 * k, 2 * k, 0, 10), pair


def ours(
    truth: Truth, sequences: Sequence[TokenSequence], selections: Sequence[SelectionInfo], say: Callable[[str], None]
) -> list[Result]:
    """Every codec under every selection."""
    results = []
    for selection in selections:
        params = ", ".join(f"{k}={v}" for k, v in selection.params.items() if k != "seed")
        records = select(truth, selection, sequences)
        for codec_id, bits in CODECS if stores_logprobs(selection) else (c for c in CODECS if c[1] in (None, 8)):
            given = {"vocab_size": truth.logprobs_PV.shape[1]} | ({} if bits is None else {"bits": bits})
            codec = get_codec(codec_id, given, selection)
            name = f"{selection.kind} {params}, {codec_id}" + (f" {bits}" if bits else "")
            results.append(of_codec(truth, records, selection, codec, name))
        say(f"{selection.kind} {params}")
    return results
