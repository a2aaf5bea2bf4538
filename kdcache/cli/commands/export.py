"""`kdcache export FORMAT CACHE --out OUT`: hand a cache's hidden states to a trainer of drafters."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from kdcache.cli.wording import aligned, count
from kdcache.extras import require
from kdcache.shown import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = (
        "Hand a cache's hidden states to a trainer of drafters (EAGLE-3, DFlash, ...).\n\n"
        "  kdcache export speculators cache --out data --tokens-only   # states are read from the cache's own shards\n"
        "  python -m kdcache.export.speculators_training --data-path data --hidden-states-backend kdcache ...\n"
        "  kdcache export speculators cache --out data                 # states in files of speculators' own layout\n"
        "  kdcache export specforge cache --out data --algorithm eagle3\n\n"
        "The cache needs hidden states of all tokens: features with `positions: all`, see configs/capture-drafter.yaml.\n"
        "A stopped export continues where it stopped."
    )
    parser.add_argument("format", metavar="FORMAT", choices=("speculators", "specforge"), help="speculators or specforge")
    parser.add_argument("cache", metavar="CACHE", help="directory of the cache, or its address in an object store")
    parser.add_argument("--out", required=True, metavar="OUT", help="the folder; created if missing")
    parser.add_argument(
        "--features", nargs="+", default=[], metavar="NAME",
        help="the inner layers, in the order wanted (default: all that the cache keeps whole, by layer)",
    )  # fmt: skip
    parser.add_argument(
        "--algorithm",
        choices=("eagle3", "dflash", "dspark"),
        default="eagle3",
        help="specforge: of the drafter (default: eagle3)",
    )
    parser.add_argument(
        "--tokens-only", action="store_true", help="speculators: leave the states in the cache, for the backend `kdcache`"
    )


def run(args: argparse.Namespace) -> int:
    """Export, and print what was written."""
    require("torch", "datasets", "safetensors", purpose="kdcache export")
    from kdcache.errors import ConfigError
    from kdcache.export.torch_files import export_specforge, export_speculators
    from kdcache.loader.cache import open_cache

    if args.format == "specforge" and args.tokens_only:
        raise ConfigError("--tokens-only is for speculators; SpecForge reads files of states")
    out, shows = Path(args.out), sys.stderr.isatty()
    with open_cache(args.cache) as cache:
        if args.format == "speculators":
            found = export_speculators(
                cache, args.cache, out, features=args.features, with_states=not args.tokens_only, show_progress=shows
            )
        else:
            found = export_specforge(
                cache, args.cache, out, algorithm=args.algorithm, features=args.features, show_progress=shows
            )
        num_tokens, num_sequences = int(cache.num_tokens_S.sum()), len(cache)
    layers = ", ".join(f"{feature.name} (layer {feature.layer})" for feature in found.auxiliary)
    say(aligned({
        "exported": f"{count(num_sequences, 'sequence')}, {count(num_tokens, 'token')} to {out}",
        "inner layers": layers,
        "last state": "none" if found.last is None else found.last.name,
    }))  # fmt: skip
    return 0
