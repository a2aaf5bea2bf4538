"""`kdcache fold CACHE`: make everything published so far visible to readers."""

from __future__ import annotations

import argparse

from kdcache.cli.wording import count
from kdcache.shown import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = (
        "Make every unit published so far part of the cache's newest snapshot.\n\n"
        "  kdcache fold cache\n\n"
        "A capture folds from time to time and at its end. Fold yourself if the ranks of a job array were killed before\n"
        "that, or to look at a cache during a capture. Safe at any time, while any number of captures run."
    )
    parser.add_argument("cache", metavar="CACHE", help="the cache's directory, or its URI in an object store")


def run(args: argparse.Namespace) -> int:
    """Fold, and print what the cache has now."""
    from kdcache.store import chain
    from kdcache.store.files.location import locate
    from kdcache.store.writing.writer import CacheWriter

    root = locate(args.cache)
    before = chain.newest_manifest(root)
    manifest = CacheWriter.open(root, chain.newest_manifest(root)).fold()
    num_new = len(manifest.shards) - len(before.shards)
    state = "complete" if manifest.is_complete else "not complete"
    say(
        f"{root}: {count(num_new, 'unit')} added, {len(manifest.shards):,} of {count(manifest.plan.num_units, 'unit')} in "
        f"snapshot {manifest.number} ({state})"
    )
    return 0
