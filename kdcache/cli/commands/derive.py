"""`kdcache derive CACHE ... --out OUT`: a cache made from caches, without a teacher."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from kdcache.cli.teacher_arguments import at_least
from kdcache.cli.wording import aligned, count, size
from kdcache.errors import ConfigError, InputError
from kdcache.shown import say

if TYPE_CHECKING:
    from kdcache.derive.choose import Select
    from kdcache.derive.config import DeriveConfig
    from kdcache.derive.reduction.reduce import Reduction
    from kdcache.derive.run import Derived
    from kdcache.format.manifest import Manifest

DESCRIPTION = """\
Make a cache from caches, without asking a teacher.

  kdcache derive big --out small --where "mean(target_logprob) > -4 and source ~ 'wiki/*'"
  kdcache derive big --out small --where-position "entropy_ceiling > 0.1" --reduce top_k=16
  kdcache derive big --out tenth --fraction 0.1 --seed 1 --codec archive
  kdcache derive a b --out both
  kdcache derive teacher-a teacher-b --out mixed --mix 0.7,0.3

Everything is done in one pass, in this order: caches are concatenated (or mixed), sequences chosen, positions left out, entries
reduced, and the result is written. The sources are not changed. Nothing is visible until the new cache is complete; run the
same command again to resume. The manifest records the sources and what was done: see `kdcache info`."""

CONDITIONS = """\
conditions compare scalars, and are joined by and, or, not and parentheses:
  of a sequence   num_tokens, num_positions, num_targets; source, domain and finish with == != ~ !~ (~ matches * and ?);
                  mean(x), max(x), min(x), any(x < 1), all(x < 1) and share(x < 1) > 0.5 over its positions
  of a position   target_logprob, entropy, entropy_floor, entropy_ceiling, top1_probability, tail_mass, position"""

_REDUCTIONS = {"top_k": int, "top_p": float, "tau": float, "draws": int}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description, parser.epilog = DESCRIPTION, CONDITIONS
    parser.add_argument("caches", nargs="+", metavar="CACHE", help="the sources: directories, or URIs in an object store")
    parser.add_argument(
        "--out", required=True, metavar="OUT", help="directory of the new cache, or its URI; created if missing"
    )
    parser.add_argument(
        "--mix", metavar="W,W,...", help="mix the sources' teachers into one distribution, with these weights, whose sum is 1"
    )
    parser.add_argument(
        "--missing", choices=("error", "skip"), default="error",
        help="--mix: what happens to sequences that are not in all sources (default: error)",
    )  # fmt: skip
    parser.add_argument(
        "--select", action="append", default=[], metavar="N|N:M|@FILE",
        help="sequences to keep: by index, counted from 0 through all sources, up to but not including M; or by the keys in a "
        "file, in hex, one per line; may be repeated",
    )  # fmt: skip
    parser.add_argument("--fraction", type=float, metavar="F", help="fraction of the sequences to keep, chosen at random")
    parser.add_argument("--where", metavar="CONDITION", help="keep the sequences for which CONDITION is true")
    parser.add_argument(
        "--where-position",
        metavar="CONDITION",
        help="keep the positions for which CONDITION is true; the others are not trained on",
    )
    parser.add_argument(
        "--reduce", action="append", default=[], metavar="NAME=VALUE",
        help="keep fewer entries per position, without bias: top_k=16 or top_p=0.9 of exact ones, tau=0.05 (threshold), "
        "draws=50 (sampled); may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--accept", action="append", default=[], choices=("incomplete",), help="incomplete: use incomplete sources as they are"
    )
    parser.add_argument("--seed", type=at_least(0), default=0, metavar="N", help="of all random choices (default: 0)")
    parser.add_argument(
        "--codec", metavar="ID", help="of the new cache: raw, packed, quantized, archive (default: the source's)"
    )
    parser.add_argument("--bits", type=at_least(1), metavar="N", help="of the codecs quantized and archive")
    parser.add_argument(
        "--unit-sequences", type=at_least(1), metavar="N", help="sequences of the sources per shard (default: about 256 MiB)"
    )
    parser.add_argument(
        "--record-batch-bytes", type=at_least(1), metavar="N", help="bytes of sequences per Arrow record batch (default: 4 MiB)"
    )


def run(args: argparse.Namespace) -> int:
    """Derive with a progress bar, and print what was written."""
    config = _config(args)
    from tqdm import tqdm

    from kdcache.bars import bar_options
    from kdcache.derive.run import derive

    with tqdm(**bar_options(desc="deriving", unit="seq", unit_scale=True, delay=1.0)) as bar:

        def progress(num_done: int, num_all: int) -> None:
            bar.total = num_all
            bar.update(num_done - bar.n)

        derived = derive(args.caches, args.out, config, progress=progress)
    say(_as_text(args.out, derived))
    return 0


def _config(args: argparse.Namespace) -> DeriveConfig:
    from kdcache.derive.config import DeriveConfig

    given = {"record_batch_bytes": args.record_batch_bytes} if args.record_batch_bytes is not None else {}
    return DeriveConfig(
        mix=None if args.mix is None else _weights(args.mix),
        missing=args.missing,
        select=_select(args.select) if args.select else None,
        fraction=args.fraction,
        where=args.where,
        where_position=args.where_position,
        reduce=_reduction(args.reduce) if args.reduce else None,
        seed=args.seed,
        codec=args.codec,
        bits=args.bits,
        accept=frozenset(args.accept),
        unit_sequences=args.unit_sequences,
        **given,
    )


def _weights(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(weight) for weight in text.split(","))
    except ValueError as error:
        raise ConfigError(f"--mix {text!r}: expected numbers separated by commas, as in 0.7,0.3") from error


def _reduction(arguments: list[str]) -> Reduction:
    from kdcache.derive.reduction.reduce import Reduction

    asked = {}
    for argument in arguments:
        name, _, text = argument.partition("=")
        try:
            asked[name] = _REDUCTIONS[name](text)
        except (KeyError, ValueError) as error:
            raise ConfigError(
                f"--reduce {argument!r}: expected NAME=VALUE, as in top_k=16, top_p=0.9, tau=0.05 or draws=50"
            ) from error
    return Reduction(**asked)


def _select(arguments: list[str]) -> Select:
    from kdcache.derive.choose import Select

    indexes, keys = [], []
    for argument in arguments:
        if argument.startswith("@"):
            keys += _keys(argument[1:])
            continue
        first, colon, end = argument.partition(":")
        try:
            indexes.append((int(first), int(end) if colon else int(first) + 1))
        except ValueError as error:
            raise ConfigError(f"--select {argument!r}: expected an index, a range as in 0:1000, or @FILE with keys") from error
    return Select(ranges=tuple(indexes), keys=tuple(keys))


def _keys(path: str) -> list[bytes]:
    try:
        lines = Path(path).read_text(encoding="ascii").split()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--select @{path}: cannot be read: {error}; expected keys in hex, one per line") from error
    try:
        return [bytes.fromhex(line) for line in lines]
    except ValueError as error:
        raise InputError(f"--select @{path}: {error}; expected keys in hex, one per line") from error


def _as_text(path: str, derived: Derived) -> str:
    from kdcache.derive.lineage import lineage_words
    from kdcache.format.manifest import LineageInfo

    manifest = derived.manifest
    num_kept = manifest.total("num_sequences")
    assert isinstance(manifest.lineage, LineageInfo)
    shown = {
        "cache": f"{path}: {count(num_kept, 'sequence')}, {count(manifest.total('num_positions'), 'position')}, "
        f"{size(manifest.total('num_bytes'))}, {count(len(manifest.shards), 'shard')}",
        "derived": lineage_words(manifest.lineage),
        "left out": _left_out(derived, num_kept),
        "note": "; ".join(_notes(manifest)),
    }
    return aligned({name: text for name, text in shown.items() if text})


def _left_out(derived: Derived, num_kept: int) -> str:
    out = {"by a condition": derived.num_read - num_kept, "not in all sources": derived.num_missing}
    return ", ".join(f"{num:,} {why}" for why, num in out.items() if num)


def _notes(manifest: Manifest) -> list[str]:
    """What a user may not expect of the new cache."""
    from kdcache.format.manifest import LineageInfo

    assert isinstance(manifest.lineage, LineageInfo)
    codecs = sorted({parent.codec.codec_id for parent in manifest.lineage.parents} - {"raw", manifest.identity.codec.codec_id})
    notes = [f"logprobs are as codec {codec!r} rounded them in the source" for codec in codecs]
    if not manifest.total("num_sequences"):
        notes.append("no sequence meets the condition: the cache is empty")
    if any(operation.name == "mix" for operation in manifest.lineage.operations):
        notes.append(
            "entropy, further temperatures and features of a mixture cannot be computed from its parts and are left out"
        )
    return notes
