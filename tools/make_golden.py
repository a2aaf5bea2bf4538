#!/usr/bin/env python3
"""Make a golden cache of a codec: tests/golden/v<major>/<codec>/, read for ever after by tests/store/test_golden.py.

    python tools/make_golden.py <codec> [<kind>]
    python tools/make_golden.py features

With a kind of random selection the folder is <codec>-<kind>. `features` makes tests/golden/features/<version>/, with
features of every kind and their sidecars. Run once for each and major version of the format. What is there
is never made again: if the tests no longer read it, the code is wrong, not the file.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from kdcache.codec import CODECS
from kdcache.format.manifest import FORMAT_VERSION, SelectionInfo
from kdcache.format.record import SequenceRecord, TokenSequence
from kdcache.store.reader import open_reader

ROOT = Path(__file__).resolve().parent.parent
FIELDS = {
    "sequence": ("input_ids_N", "supervised_N", "roles_N", "turn_starts"),
    "distributions": ("token_ids_E", "logprobs_E", "offsets_P1", "tail_mass_P", "outside_target_logprobs"),
}
OPTIONAL = ("num_exact_P", "log_z_PL", "entropy_P")
SELECTIONS = {
    "sampled": SelectionInfo(kind="sampled", params={"num_draws": 20, "seed": 0}),
    "threshold": SelectionInfo(kind="threshold", params={"tau": 0.05, "seed": 0}, temperatures=(2.0,), entropy=True),
    "top_k_sampled": SelectionInfo(kind="top_k_sampled", params={"k": 3, "num_draws": 300, "seed": 0}),
}


def with_corners(record: SequenceRecord) -> SequenceRecord:
    """Probability 0 inside a support, tails of 0 and 1."""
    logprobs_E, tail_mass_P = record.distributions.logprobs_E.copy(), record.distributions.tail_mass_P.copy()
    logprobs_E[record.distributions.offsets_P1[1] - 1] = -np.inf
    tail_mass_P[:2] = 0.0, 1.0
    return SequenceRecord(record.sequence, replace(record.distributions, logprobs_E=logprobs_E, tail_mass_P=tail_mass_P))


def golden_units(cache_making: ModuleType) -> list[list[SequenceRecord]]:
    """Three units: plain text, chats with holes in the mask, ragged supports, a single token, no supervised positions."""
    units = [cache_making.make_unit(unit) for unit in range(3)]
    units[0][0] = with_corners(units[0][0])
    return units


def sampled_units(units: list[list[SequenceRecord]], selection: SelectionInfo, vocab_size: int) -> list[list[SequenceRecord]]:
    """The same sequences, with what a random selection keeps of random distributions."""
    return [[_sampled(record.sequence, selection, vocab_size) for record in unit] for unit in units]


def _sampled(sequence: TokenSequence, selection: SelectionInfo, vocab_size: int) -> SequenceRecord:
    from kdcache.teacher.select.reference import select_reference
    from kdcache.teacher.select.uniforms import position_states

    seed = int.from_bytes(sequence.key[:4], "little")
    logits_PV = np.random.default_rng(seed).normal(0.0, 6.0, (len(sequence.positions_P), vocab_size))
    states_P = position_states(0, sequence.key, sequence.positions_P)
    return SequenceRecord(sequence, select_reference(logits_PV, sequence.target_ids_P, selection, states_P))


def decoded_values(record: SequenceRecord) -> dict[str, Any]:
    """Every value of a record; a float32 as the shortest decimal of its float64, which gives it back."""
    values = {name: getattr(getattr(record, part), name).tolist() for part, names in FIELDS.items() for name in names}
    optional = {name: getattr(record.distributions, name) for name in OPTIONAL}
    values |= {name: value.tolist() for name, value in optional.items() if value is not None}
    return {"source": record.sequence.source, "key": record.sequence.key.hex(), **values}


def write_expected(cache: Path, path: Path) -> None:
    with open_reader(cache) as reader:
        lines = [json.dumps(decoded_values(record)) for record in reader]
    path.write_text("\n".join(lines) + "\n")


def make_features(folder: Path) -> None:
    """A cache with features of every kind: what its records hold of them, and the arrays of its sidecars."""
    making = import_module("feature_making")
    fits = making.fitted(making.ALL_KINDS)
    records = [
        making.record_with(seed, fits, supervised=how, num_tokens=9) for seed, how in enumerate(("holes", "every", "none"))
    ]
    making.make_feature_cache(folder / "cache", records, fits)
    with open_reader(folder / "cache") as reader:
        found = [{name: values.tolist() for name, values in record.distributions.features.items()} for record in reader]
        sidecars = {
            sidecar.name: {name: array.tolist() for name, array in reader.sidecar(sidecar.name).items()}
            for sidecar in reader.manifest.sidecars
        }
    (folder / "expected.json").write_text(json.dumps({"records": found, "sidecars": sidecars}) + "\n")


def main(arguments: list[str]) -> int:
    if arguments == ["features"]:
        return _made_once(ROOT / "tests" / "golden" / "features" / ".".join(map(str, FORMAT_VERSION)), make_features)
    if not 1 <= len(arguments) <= 2 or arguments[0] not in CODECS or not set(arguments[1:]) <= set(SELECTIONS):
        print(f"usage: make_golden.py features | {{{','.join(CODECS)}}} [{{{','.join(SELECTIONS)}}}]", file=sys.stderr)
        return 2
    folder = ROOT / "tests" / "golden" / f"v{FORMAT_VERSION[0]}" / "-".join(arguments)
    return _made_once(folder, lambda folder: make_codec(folder, arguments))


def _made_once(folder: Path, make: Callable[[Path], None]) -> int:
    if folder.exists():
        print(f"{folder} is there already; golden files are never made again", file=sys.stderr)
        return 2
    sys.path.insert(0, str(ROOT / "tests"))
    make(folder)
    print(folder)
    return 0


def make_codec(folder: Path, arguments: list[str]) -> None:
    """A cache of a codec, and what its records hold."""
    cache_making = import_module("cache_making")
    units, selection = golden_units(cache_making), SELECTIONS.get(arguments[-1])
    if selection is not None:
        units = sampled_units([unit[:1] for unit in units], selection, cache_making.VOCAB_SIZE)
    cache_making.make_cache(folder / "cache", arguments[0], units=units, record_batch_bytes=1500, selection=selection)
    write_expected(folder / "cache", folder / "expected.jsonl")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
