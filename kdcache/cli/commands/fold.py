"""`kdcache fold CACHE`: make what is published so far visible to readers."""

from __future__ import annotations

import argparse

from kdcache.cli.wording import count
from kdcache.shown import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = (
        "Make every unit that is published so far part of the cache's newest snapshot. A capture does so itself, now and then\n"
        "and at its end; this is for the ranks of a job array that were ended before they came to that, or to look at a cache\n"
        "in the middle of a capture. Safe at any time, beside any number of captures."
    )
    parser.add_argument("cache", metavar="CACHE", help="the cache's directory, or its URI in an object store")


def run(args: argparse.Namespace) -> int:
    """Fold, and say what there is now."""
    from kdcache.store import chain
    from kdcache.store.files.location import locate
    from kdcache.store.writing.writer import CacheWriter

    root = locate(args.cache)
    before = chain.newest_manifest(root)
    manifest = CacheWriter.open(root, chain.read_manifest(root, 0)).fold()
    num_new = len(manifest.shards) - len(before.shards)
    state = "complete" if manifest.is_complete else "not complete"
    say(
        f"{root}: {count(num_new, 'unit')} added, {len(manifest.shards):,} of {count(manifest.plan.num_units, 'unit')} in "
        f"snapshot {manifest.number} ({state})"
    )
    return 0
