"""`kdcache verify CACHE`: re-read a whole cache; exit status 1 when anything is wrong with it."""

from __future__ import annotations

import argparse
import math
import sys
from typing import TYPE_CHECKING

from kdcache.cli.wording import count, rows, size

if TYPE_CHECKING:
    from kdcache.store.verify import VerifyReport


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = (
        "Re-read a whole cache and check every promise it makes: the chain of manifests, each shard's SHA-256, each row's\n"
        "digest, each record, and that the teacher's NLL of the text, recomputed from the cache, is the teacher's own.\n"
        "Exit status 1 when anything is wrong."
    )
    parser.add_argument("cache", metavar="CACHE", help="the cache's directory, or its URI in an object store")


def run(args: argparse.Namespace) -> int:
    """Verify with a progress bar; damage goes to stderr, a sentence each."""
    from tqdm import tqdm

    from kdcache.store.verify import verify_cache

    with tqdm(desc="verifying", unit="B", unit_scale=True, delay=1.0, file=sys.stderr) as bar:

        def progress(num_done: int, num_all: int) -> None:
            bar.total = num_all
            bar.update(num_done - bar.n)

        report = verify_cache(args.cache, progress)
    for problem in report.problems:
        print(f"damaged: {problem}", file=sys.stderr)
    print(_report_text(args.cache, report))
    return 0 if report.is_sound else 1


def _report_text(path: str, report: VerifyReport) -> str:
    manifest = report.manifest
    num_done, num_units = len(manifest.shards), manifest.plan.num_units
    state = "complete" if manifest.is_complete else f"{num_done:,} of {count(num_units, 'unit')}; `kdcache capture` goes on"
    shown = {
        "cache": f"{path}: {'sound' if report.is_sound else count(len(report.problems), 'problem') + ' found'} ({state})",
        "read": f"{count(report.num_sequences, 'sequence')}, {count(report.num_positions, 'position')}, "
        f"{size(report.num_bytes)}",
    }
    if not math.isnan(report.teacher_nll):
        shown["NLL"] = (
            f"teacher {report.teacher_nll:.6f} nats per target, recomputed from the cache {report.cached_nll:.6f} "
            f"(difference {abs(report.teacher_nll - report.cached_nll):.1e}, the codec's bound {report.nll_bound:.1e})"
        )
    return rows(shown)
