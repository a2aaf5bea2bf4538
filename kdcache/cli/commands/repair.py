"""`kdcache repair CACHE`: set damaged and missing units aside, so that the rest can be read and these can be made again."""

from __future__ import annotations

import argparse
import sys

from kdcache.cli.wording import count
from kdcache.shown import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = (
        "Set damaged and missing units of a cache aside, so that they can be captured again.\n\n"
        "  kdcache repair cache\n"
        "  kdcache capture config.yaml        as it was run: captures exactly the missing units\n\n"
        "Reads every byte, moves damaged units to the cache's folder `damaged/` (nothing is deleted), and publishes a\n"
        "snapshot of the others, which stay readable without the teacher. Exit status 1 if something was damaged, 0 if not."
    )
    parser.add_argument("cache", metavar="CACHE", help="the cache's directory, or its URI in an object store")


def run(args: argparse.Namespace) -> int:
    """Repair, and say what was found and what to do next."""
    from tqdm import tqdm

    from kdcache.store.repair import repair_cache

    with tqdm(desc="reading", unit="B", unit_scale=True, delay=1.0, file=sys.stderr) as bar:

        def progress(num_done: int, num_all: int) -> None:
            bar.total = num_all
            bar.update(num_done - bar.n)

        repair = repair_cache(args.cache, progress)
    if not repair.damage and not repair.made_index:
        say(f"{args.cache}: nothing to repair; every shard and the index are as they were written")
        return 0
    for damage in repair.damage:
        unit = "" if damage.unit is None else f"unit {damage.unit}: "
        say(f"set aside: {unit}{damage.name}: {damage.reason}", sys.stderr)
    if repair.made_index:
        say("the index was damaged and has been rebuilt", sys.stderr)
    manifest = repair.manifest
    again = "derive" if manifest.lineage else "capture"  # UNSET is false
    missing = manifest.plan.num_units - len(manifest.shards)
    hint = f"; run the same `kdcache {again}` again to redo {count(missing, 'unit')}" if missing else ""
    say(
        f"{args.cache}: {count(repair.num_units, 'unit')} set aside; snapshot {manifest.number} holds "
        f"{len(manifest.shards):,} of {count(manifest.plan.num_units, 'unit')}{hint}"
    )
    return 1
