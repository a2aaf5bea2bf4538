"""What does the default selection cost in bytes, and does its codec load as fast as a trainer reads?

Method: a teacher's distributions over text that it has not learned from, selected by the code that captures use, encoded by
each codec that fits.

- Bytes: of the codec's columns and the numbers of entries, per position, as `kdcache info` counts them. The text is not among
  them.
- Loading: a cache of the records, repeated until it holds --positions, read by the loader in packed batches and random order,
  every digest checked, no prefetch threads. Tokens per CPU second of one core; the best of --rounds. "/ copy" divides by the
  rate at which one core copies the same cache's shards, in the same round.
- Encoding: tokens per CPU second in which a capture's records become columns.
- Cores: what loading takes of a CPU where one GPU trains a student. The GPU reads 0.4 * 989e12 / (6 * parameters) tokens per
  second: an H100 at 40 % of its bfloat16 peak, forward and backward of a dense student. Calculated, not measured.

Teachers: n-grams of the standard library with 32,000 and with 151,936 ids (`rate_teachers.py`); the same sharpened until 50
draws give 12 different ids, as Random Sampling KD reports of its teachers of 8 billion parameters; and each --teacher FOLDER.

    python benchmarks/default_selection.py [--teacher FOLDER ...] [--quick] [--out FOLDER]

Writes default_selection.md and .json. About three CPU minutes.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from loader import processor_name
from loader_measure import use_one_core
from loader_scale import make_identity
from numpy.typing import NDArray
from rate_teachers import Teacher, stand_in, trained

from kdcache.codec import get_codec
from kdcache.config.loader import LoaderConfig
from kdcache.config.selection import SELECTION_DEFAULTS
from kdcache.format.manifest import CodecInfo, Manifest, PlanInfo, SelectionInfo
from kdcache.format.record import Distributions, SequenceRecord, TokenSequence, sequence_key
from kdcache.loader.cache import open_cache
from kdcache.loader.loader import Loader
from kdcache.store.writing.writer import CacheWriter
from kdcache.teacher.select.found import Found, record_of
from kdcache.teacher.select.torch_selector import Selector
from kdcache.teacher.select.uniforms import position_states

TAUS = (0.1, 0.07, 0.05, 0.04, 0.03, 0.02, 0.01)
DEFAULT_TAU, TOP_K = SELECTION_DEFAULTS["threshold"]["tau"], SELECTION_DEFAULTS["top_k"]["k"]
CODECS: dict[str, dict[str, Any]] = {"archive": {"bits": 8}, "quantized": {"bits": 8}, "packed": {}}
STUDENTS = {"0.1 B": 0.1e9, "0.6 B": 0.6e9, "1.7 B": 1.7e9, "8 B": 8e9}
GPU_FLOPS = 0.4 * 989e12
DRAWS, DISTINCT = 50, 12
FEATURES = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "sve")
SHARD_SEQUENCES, SEQ_LEN, BATCH_ROWS = 64, 1024, 8


@dataclass(frozen=True)
class Kept:
    """What a selection keeps of a teacher's text."""

    selection: SelectionInfo
    sequences: list[TokenSequence]
    records: list[Distributions]

    @property
    def num_positions(self) -> int:
        return sum(record.num_positions for record in self.records)

    def columns(self, name: str, vocab_size: int) -> Sequence[Any]:
        """All records as one codec's columns."""
        return get_codec(name, {"vocab_size": vocab_size, **CODECS[name]}, self.selection).encode(self.records)


def selections(taus: Sequence[float]) -> list[SelectionInfo]:
    thresholds = [SelectionInfo(kind="threshold", params={"tau": tau, "seed": 0}) for tau in taus]
    return [*thresholds, SelectionInfo(kind="top_k", params={"k": TOP_K})]


def name_of(selection: SelectionInfo) -> str:
    return " ".join([selection.kind, *(f"{value:g}" for name, value in selection.params.items() if name != "seed")])


def sharpened(teacher: Teacher) -> Teacher:
    """At the temperature at which DRAWS draws give DISTINCT different ids, as a mean over the first sequence."""
    logprobs_TV = teacher.logprobs_TV(0)

    def distinct(power: float) -> float:
        p_TV = np.exp(_normalised(power * logprobs_TV))
        return float(-np.expm1(DRAWS * np.log1p(-np.minimum(p_TV, 1 - 1e-7))).sum(-1).mean())

    low, high = 1.0, 4.0
    for _ in range(8):
        power = (low + high) / 2
        low, high = (power, high) if distinct(power) > DISTINCT else (low, power)
    name = f"{teacher.name}, sharpened to {DISTINCT} different ids in {DRAWS} draws"
    return replace(teacher, name=name, logprobs_TV=lambda s: _normalised(low * teacher.logprobs_TV(s)))


def _normalised(logits_TV: NDArray[np.float32]) -> NDArray[np.float32]:
    return torch.log_softmax(torch.from_numpy(logits_TV), -1).numpy()


def keep(teacher: Teacher, kinds: Sequence[SelectionInfo]) -> tuple[list[Kept], float]:
    """What each selection keeps of all sequences, and the teacher's mean entropy in nats."""
    kept, entropy = [Kept(kind, [], []) for kind in kinds], 0.0
    for number, ids_T in enumerate(teacher.ids_ST):
        logprobs_TV = teacher.logprobs_TV(number)
        entropy -= float((np.exp(logprobs_TV) * logprobs_TV).sum(-1).mean()) / len(teacher.ids_ST)
        sequence = make_sequence(ids_T, number)
        for part in kept:
            part.sequences.append(sequence)
            part.records.append(select(logprobs_TV, sequence, part.selection))
    return kept, entropy


def make_sequence(ids_T: NDArray[np.int32], number: int) -> TokenSequence:
    """Supervised everywhere; the number makes the key another where a text is repeated."""
    supervised_T = np.ones(len(ids_T), bool)
    key = sequence_key(ids_T, supervised_T, str(number))
    return TokenSequence(ids_T, supervised_T, np.zeros(len(ids_T), np.uint8), np.zeros(1, np.int32), f"text#{number}", key)


def select(logprobs_TV: NDArray[np.float32], sequence: TokenSequence, selection: SelectionInfo) -> Distributions:
    states_P = position_states(0, sequence.key, sequence.positions_P)
    targets_P = torch.from_numpy(sequence.target_ids_P.astype(np.int64))
    selector = Selector(selection, logprobs_TV.shape[1])
    chosen = selector.select(torch.from_numpy(logprobs_TV), targets_P, torch.from_numpy(states_P.view(np.int64)))
    return record_of(sequence, selection, Found.from_padded([part.numpy() for part in chosen]))


def bytes_of(kept: Kept, codec: str, vocab_size: int) -> float:
    """Per position: the codec's columns, and the number of entries where it varies."""
    num_bytes = sum(column.nbytes for column in kept.columns(codec, vocab_size))
    return num_bytes / kept.num_positions + 2 * (kept.selection.kind != "top_k")


def write_cache(folder: Path, kept: Kept, codec: str, vocab_size: int, num_positions: int) -> None:
    """The records again and again, each time as another sequence."""
    info = CodecInfo(codec_id=codec, params={"vocab_size": vocab_size, **CODECS[codec]})
    identity = make_identity(int(TOP_K))
    identity = msgspec.structs.replace(
        identity,
        teacher=msgspec.structs.replace(identity.teacher, vocab_size=vocab_size),
        tokenizer=msgspec.structs.replace(identity.tokenizer, vocab_size=vocab_size),
        selection=kept.selection,
        codec=info,
    )
    repeats = math.ceil(num_positions / kept.num_positions)
    originals = [*zip(kept.sequences, kept.records, strict=True)] * repeats
    units = [range(at, min(at + SHARD_SEQUENCES, len(originals))) for at in range(0, len(originals), SHARD_SEQUENCES)]
    plan = PlanInfo(fingerprint="0", num_units=len(units))
    writer = CacheWriter.open(str(folder), Manifest(number=0, parent=None, identity=identity, plan=plan))
    for unit, numbers in enumerate(units):
        parts = ((number, *originals[number]) for number in numbers)
        writer.write_unit(unit, [SequenceRecord(make_sequence(s.input_ids_N, n), record) for n, s, record in parts])
    writer.fold()


def best_rate(once: Callable[[], Iterator[int]], seconds: float) -> float:
    """Tokens per CPU second of a pass that takes so many seconds, from the start again where it ends before."""
    tokens, start = 0, time.process_time()
    while (took := time.process_time() - start) < seconds:
        for num_tokens in once():
            tokens += num_tokens
            if (took := time.process_time() - start) >= seconds:
                break
    return tokens / took


def loading(folder: Path, seconds: float, rounds: int) -> dict[str, float]:
    """Tokens per CPU second through the loader; and of copying the shards from a memory map that is kept."""
    shards = [np.memmap(path, np.uint8, "r").view(np.ndarray) for path in sorted((folder / "data").rglob("*.arrow"))]
    with open_cache(folder) as cache:
        tokens = sum(shard.num_tokens for shard in cache.manifest.shards)
        loader = Loader(cache, LoaderConfig(seq_len=SEQ_LEN, batch_rows=BATCH_ROWS, num_threads=0))
        room = np.empty(max(map(len, shards)), np.uint8)

        def copied() -> Iterator[int]:
            for shard in shards:
                np.copyto(room[: len(shard)], shard)
            yield tokens

        found = {"load": 0.0, "copy": 0.0}
        next(iter(loader))  # compiled, and the shards read
        for _ in range(rounds):
            found["load"] = max(found["load"], best_rate(lambda: (batch.num_tokens for batch in loader), seconds))
            found["copy"] = max(found["copy"], best_rate(copied, seconds / 4))
    return found


def measure(teacher: Teacher, options: argparse.Namespace) -> dict[str, Any]:
    """Bytes at every tau and, of the default tau and of top_k, rates."""
    kept, entropy = keep(teacher, selections(options.taus))
    V = teacher.vocab_size
    found = {"teacher": teacher.name, "vocab_size": V, "entropy": entropy, "selections": []}
    for part in kept:
        entries = sum(record.num_entries for record in part.records) / part.num_positions
        exact = [record.num_exact_P for record in part.records]
        num_exact = entries if exact[0] is None else float(sum(n.sum() for n in exact)) / part.num_positions
        sizes = {codec: bytes_of(part, codec, V) for codec in CODECS}
        row = {"selection": name_of(part.selection), "entries": entries, "exact": num_exact, "bytes": sizes}
        if part.selection.params.get("tau", DEFAULT_TAU) == DEFAULT_TAU:
            row["rates"] = {codec: rates(part, codec, V, options) for codec in CODECS}
        found["selections"].append(row)
    return found


def rates(kept: Kept, codec: str, vocab_size: int, options: argparse.Namespace) -> dict[str, float]:
    def encoded() -> Iterator[int]:
        kept.columns(codec, vocab_size)
        yield kept.num_positions

    kept.columns(codec, vocab_size)  # compiled
    encode = max(best_rate(encoded, options.seconds) for _ in range(options.rounds))
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        write_cache(Path(folder) / "cache", kept, codec, vocab_size, options.positions)
        return {"encode": encode, **loading(Path(folder) / "cache", options.seconds, options.rounds)}


def features() -> str:
    """Of the processor, those that matter to compiled loops."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    flags = next((line.split() for line in lines if line.startswith(("flags", "Features"))), [])
    return ", ".join(name for name in FEATURES if name in flags) or "unknown features"


def report(results: dict[str, Any]) -> str:
    lines = ["<!-- made by benchmarks/default_selection.py, which says how, of default_selection.json -->", ""]
    lines += [f"{results['cpu']} ({results['features']}), one core.", ""]
    for found in results["teachers"]:
        lines += [f"## {found['teacher']}", "", f"{found['vocab_size']:,} ids, entropy {found['entropy']:.2f} nats.", ""]
        lines += ["| selection | entries | of them exact | " + " | ".join(f"bytes, {codec}" for codec in CODECS) + " |"]
        lines += ["|---|" + "---:|" * (2 + len(CODECS))]
        for row in found["selections"]:
            sizes = " | ".join(f"{row['bytes'][codec]:.1f}" for codec in CODECS)
            lines += [f"| {row['selection']} | {row['entries']:.1f} | {row['exact']:.1f} | {sizes} |"]
        lines += ["", *_rates_table(found), ""]
    return "\n".join(lines)


def _rates_table(found: dict[str, Any]) -> list[str]:
    heads = ["selection, codec", "bytes", "encoded, M tokens/s", "loaded, M tokens/s", "/ copy"]
    heads += [f"cores for a student of {name}" for name in STUDENTS]
    lines = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1)]
    for row in found["selections"]:
        for codec, rate in row.get("rates", {}).items():
            cores = [f"{GPU_FLOPS / (6 * size) / rate['load']:.3f}" for size in STUDENTS.values()]
            cells = [f"{row['selection']}, {codec}", f"{row['bytes'][codec]:.1f}", f"{rate['encode'] / 1e6:.2f}"]
            cells += [f"{rate['load'] / 1e6:.2f}", f"{rate['load'] / rate['copy']:.4f}", *cores]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", action="append", type=Path, default=[], metavar="FOLDER")
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512, help="of a sequence")
    parser.add_argument("--positions", type=int, default=131_072, help="of a cache that is loaded")
    parser.add_argument("--seconds", type=float, default=0.5, help="CPU seconds of a pass")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="for the caches; a temporary folder by default")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--quick", action="store_true", help="small sizes: does it work?")
    options = parser.parse_args(argv)
    options.taus, sizes = TAUS, {"num_sequences": options.sequences, "num_tokens": options.tokens}
    if options.quick:
        options.taus, options.positions, options.seconds, options.rounds = (DEFAULT_TAU,), 200, 0.01, 1
        teachers: Iterator[Teacher] = iter([stand_in(vocab_size=300, num_sequences=2, num_tokens=64, max_words=5000)])
    else:
        large = {"vocab_size": 151_936, "scattered": True}
        made = (lambda: stand_in(vocab_size=32_000, **sizes), lambda: stand_in(**large, **sizes),
                lambda: sharpened(stand_in(**large, **sizes)),
                *(lambda folder=folder: trained(folder, **sizes) for folder in options.teacher))  # fmt: skip
        teachers = (make() for make in made)
    if not options.quick:
        use_one_core()
        torch.set_num_threads(1)
    results = {"cpu": processor_name(), "features": features(), "teachers": [measure(t, options) for t in teachers]}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "default_selection.json").write_text(json.dumps(results, indent=1) + "\n")
    (options.out / "default_selection.md").write_text(report(results))
    print(report(results))


if __name__ == "__main__":
    main()
