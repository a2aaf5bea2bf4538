"""`kdcache info CACHE`: show what a cache contains, from its manifest alone."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING, Any

from kdcache.cli.feature_wording import feature_words, sidecar_words
from kdcache.cli.nll_wording import alignment, left_out
from kdcache.cli.wording import aligned, count, duration, say_json, size
from kdcache.config.capture import GenerateConfig
from kdcache.shown import say, shown, write

if TYPE_CHECKING:
    from kdcache.format.manifest import Identity, Manifest
    from kdcache.store.summary import CacheSummary

_MOST = 1000
"""Characters of a name or a reason in a list."""

_FOR_ALL = "every divergence, over the entries that are kept; the tail is one number"
_PER_BYTE = "forward KL and cross-entropy over the whole vocabulary, without bias, from few bytes"
_GOOD_FOR = {
    "top_k": (_FOR_ALL, f"threshold: {_PER_BYTE}"),
    "top_p_k": (_FOR_ALL, f"threshold: {_PER_BYTE}"),
    "threshold": (
        f"{_PER_BYTE}; other divergences and temperatures learn from the exact entries alone",
        "top_k: every divergence, and temperatures, at about ten times the bytes",
    ),
    "top_k_sampled": (
        f"{_PER_BYTE}; other divergences and temperatures learn from the exact entries alone",
        "threshold: less noise at the same bytes; top_k: every divergence, at about ten times the bytes",
    ),
    "sampled": (
        f"{_PER_BYTE}; no other divergence",
        "threshold: less noise at the same bytes; top_k: every divergence, at several times the bytes",
    ),
}
"""Kind of selection -> what it is good for, and what another choice would be good for."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = (
        "Show what a cache contains: teacher, amount of text, size, and which losses it is good for.\n\n"
        "  kdcache info cache\n"
        "  kdcache info s3://bucket/cache --json\n\n"
        "Reads the manifest only. A tail policy in the list of losses is a value of the config's loss.tail."
    )
    parser.add_argument("cache", metavar="CACHE", help="the cache's directory, or its URI in an object store")
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object")
    parser.add_argument("--skipped", action="store_true", help="list the sequences that were left out, with the reason")


def run(args: argparse.Namespace) -> int:
    """Print the summary."""
    from kdcache.store.summary import summarize_cache

    summary = summarize_cache(args.cache)
    if args.skipped:
        for sequence in summary.skipped:
            write(f"{shown(sequence.source, _MOST)}\t{shown(sequence.reason, _MOST)}")
        return 0
    if args.json:
        say_json(_fields(summary))
    else:
        say(_as_text(args.cache, summary))
    return 0


def _fields(summary: CacheSummary) -> dict[str, Any]:
    import msgspec

    fields: dict[str, Any] = msgspec.to_builtins(summary)
    # Shards are many and are in the manifest's own file.
    manifest = fields.pop("manifest") | {"digest": summary.manifest.digest, "num_shards": len(summary.manifest.shards)}
    manifest.pop("shards")
    return fields | {"manifest": manifest, "terms": _terms(summary.manifest)}


def _as_text(path: str, summary: CacheSummary) -> str:
    manifest = summary.manifest
    shown = _identity_lines(path, manifest) | {
        "text": f"{count(summary.num_sequences, 'sequence')}, {count(summary.num_tokens, 'token')}, "
        f"{count(summary.num_positions, 'position')} recorded",
        "size": f"{size(summary.num_bytes)}, {_decimals(summary.bytes_per_position)} bytes per position",
        **_selection_lines(summary),
        "entropy": f"{_decimals(summary.entropy_floor, 4)} to {_decimals(summary.entropy_ceiling, 4)} nats per position",
        "NLL": _nll(summary),
        **alignment(manifest),
    }
    if summary.num_finished and summary.num_sequences:
        ways = [f"{num:,} ended by {way}" for way, num in summary.num_finished.items()]
        shown["answers"] = f"{', '.join(ways)}; {_decimals(summary.num_positions / summary.num_sequences)} tokens each"
    shown |= _account_lines(path, summary)
    columns = {f"  {name}": _decimals(value) for name, value in summary.column_bytes_per_position.items()}
    return f"{aligned(shown)}\nbytes per position by column\n{aligned(columns)}"


def _nll(summary: CacheSummary) -> str:
    nll, missing = _decimals(summary.teacher_nll, 4), left_out(summary.manifest)
    if not missing:
        return f"{nll} nats per target, the text under the teacher"
    num_used = summary.manifest.total("num_targets") - summary.num_impossible_targets
    return f"{nll} nats for each of {count(num_used, 'target')}; {missing}"


def _selection_lines(summary: CacheSummary) -> dict[str, str]:
    """Which entries there are, and at which temperatures and with which losses students can be trained on them."""
    from kdcache.format.selection import fixed_exact, has_estimates

    selection = summary.manifest.identity.selection
    entries = f"{_decimals(summary.entries_per_position)} per position"
    if has_estimates(selection):
        exact = summary.num_exact_entries / summary.num_positions if summary.num_positions else math.nan
        entries += f": {_decimals(exact)} exact, {_decimals(summary.entries_per_position - exact)} unbiased estimates"
    further = ", ".join(f"{t:g}" for t in selection.temperatures if fixed_exact(selection) != 0)
    also = f" and, from the exact entries, {further}" if has_estimates(selection) else f", {further}"
    return {
        "entries": entries,
        "kept mass": f"{_decimals(summary.kept_mass, 5)} of the probability is in exact entries",
        "training": f"at temperature 1{also if further else ''}; others need what selection.temperatures keeps",
        "good for": _GOOD_FOR[selection.kind][0],
        "or choose": _GOOD_FOR[selection.kind][1],
        **_term_lines(summary.manifest),
        "losses": "; ".join(_losses(selection.kind, has_both=has_estimates(selection) and fixed_exact(selection) != 0)),
    }


def _term_lines(manifest: Manifest) -> dict[str, str]:
    """The terms of a loss that the cache can serve, with the features that each may read."""
    terms = {name: [str(o["feature"]) for o in options if "feature" in o] for name, options in _terms(manifest).items()}
    return {"terms": ", ".join(f"{name} ({', '.join(of)})" if of else name for name, of in terms.items())} if terms else {}


def _terms(manifest: Manifest) -> dict[str, list[dict[str, Any]]]:
    """Name -> options; empty where torch is missing, without which nothing is trained."""
    from kdcache.extras import is_installed

    if not is_installed("torch"):
        return {}
    from kdcache.train.terms.servable import servable_terms

    return servable_terms(manifest)


def _losses(kind: str, *, has_both: bool) -> list[str]:
    """The losses that can be computed, with their tail policies; those that read unbiased entries come first."""
    from kdcache.loss.selection_rules import allowed

    meanings = {"unbiased": "from all entries: " if has_both else "", "exact": "from exact entries: " if has_both else ""}
    shown: list[str] = []
    for use, meaning in meanings.items():
        by_tails: dict[str, list[str]] = {}
        for name, tails in allowed(kind).items():
            fitting = " or ".join(tail for tail in tails if tails[tail] == use)
            by_tails.setdefault(fitting, []).append(name)
        shown += [f"{meaning}{', '.join(names)} with tail {tails}" for tails, names in by_tails.items() if tails]
    return shown


def _account_lines(path: str, summary: CacheSummary) -> dict[str, str]:
    cost, num_skipped = summary.cost, len(summary.skipped)
    shown = {"set aside": "; ".join(f"unit {failed.unit}: {failed.reason}" for failed in summary.set_aside)}
    if num_skipped:
        shown["left out"] = f"{count(num_skipped, 'sequence')} that made units fail: kdcache info {path} --skipped"
    if cost.wall_seconds is not None:
        took = [f"{duration(cost.wall_seconds)} of work", f"{duration(cost.cpu_seconds or 0)} of CPU time"]
        took += [f"{cost.gpu_seconds / 3600:,.2f} GPU-hours"] if cost.gpu_seconds is not None else []
        took += [f"{cost.energy_joules / 3.6e6:,.3f} kWh of the GPUs"] if cost.energy_joules is not None else []
        shown["took"] = ", ".join(took)
    return {name: text for name, text in shown.items() if text}


def _identity_lines(path: str, manifest: Manifest) -> dict[str, str]:
    identity = manifest.identity
    num_done, num_units = len(manifest.shards), manifest.plan.num_units
    state = "complete" if manifest.is_complete else f"not complete: {num_done:,} published"
    return {
        "cache": f"{path} (snapshot {manifest.number}, {manifest.digest[:12]})",
        "teacher": _teacher(identity),
        "tokenizer": f"{identity.tokenizer.name}, {identity.tokenizer.vocab_size:,} ids, {identity.tokenizer.fingerprint[:12]}",
        **_generation(identity),
        "selection": f"{identity.selection.kind} {_params(identity.selection.params)}",
        "codec": f"{identity.codec.codec_id} {_params(identity.codec.params)}".rstrip(),
        **{f"feature {feature.name}": feature_words(feature) for feature in identity.features},
        **{f"sidecar {sidecar.name}": sidecar_words(sidecar) for sidecar in manifest.sidecars},
        "plan": f"{count(num_units, 'unit')}, {state}",
        **_lineage(manifest),
    }


def _lineage(manifest: Manifest) -> dict[str, str]:
    """The caches that a derived cache was made from."""
    from kdcache.derive.lineage import lineage_words
    from kdcache.format.manifest import LineageInfo

    return {"derived": lineage_words(manifest.lineage)} if isinstance(manifest.lineage, LineageInfo) else {}


def _generation(identity: Identity) -> dict[str, str]:
    """How answers were made: the most important settings, and the others if they differ from the defaults."""
    if identity.generation is None:
        return {}
    given = {name: getattr(identity.generation, name) for name in identity.generation.__struct_fields__}
    given = {"seed": identity.seeds.get("generate", 0), **given}
    always, usual = ("temperature", "n", "max_tokens", "seed"), GenerateConfig()
    shown = {name: value for name, value in given.items() if name in always or value != getattr(usual, name)}
    filters = identity.selection.filters
    how = f"; what is recorded was drawn from, after {_params(filters)}" if filters else ""
    return {"generation": _params(shown) + how}


def _teacher(identity: Identity) -> str:
    teacher = identity.teacher
    revision = f" at {teacher.revision}" if teacher.revision else ""
    return (
        f"{teacher.model}{revision}, {teacher.architecture}, {teacher.dtype}, {teacher.vocab_size:,} ids, by {teacher.engine} "
        f"{teacher.engine_version}"
    )


def _params(params: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in params.items())


def _decimals(value: float, digits: int = 2) -> str:
    return "-" if math.isnan(value) else f"{value:,.{digits}f}"
