"""The loader benchmark's results as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

from loader_measure import FLOORS, KEPT_FLOOR, MODES

WANTED = 0.75
"""Of verified random access with codec `packed`, over the floor."""

Result = dict[str, Any]


def rate(passes: list[dict[str, float]], clock: str = "cpu_seconds") -> float:
    """Million tokens per second of the best pass."""
    return max(p["tokens"] / p[clock] for p in passes) / 1e6


def ratio(result: Result, mode: str, floor: str) -> float:
    """Of a mode's rate over the floor's in the same round; the median over rounds."""
    pairs = zip(result["passes"][mode], result["passes"][f"floor {floor}"], strict=True)
    return statistics.median(p["tokens"] / p["cpu_seconds"] / (f["tokens"] / f["cpu_seconds"]) for p, f in pairs)


def report(results: Result) -> str:
    """Tables, and what became of the targets."""
    shape = f"{results['sequences']} sequences, {results['tokens']:,} tokens, K = {results['k']}"
    method = f"best of {results['rounds']} passes of {results['seconds']} CPU seconds"
    lines = ["<!-- made by benchmarks/loader.py, which says how; the numbers behind it are in loader.json -->", ""]
    lines += [f"{results['cpu']}, load before {results['load_before']:.1f}; {shape}; {method}.", ""]
    lines += [*rates(results), "", *notes(results), "", *threads(results), "", *comparison(results), "", *wanted(results), ""]
    return "\n".join(lines)


def measured(results: Result, side: str) -> dict[str, Result]:
    return {name: r for name, r in results[side].items() if "passes" in r and name != "threads"}


def rates(results: Result) -> Iterator[str]:
    yield "| M tokens per CPU second | bytes per token | checked | sequential | random | packed batches | random / floor |"
    yield "|---|---:|---|---:|---:|---:|---:|"
    every = [r for side in ("ours", "others") for r in measured(results, side).values()]
    for name in (*FLOORS, KEPT_FLOOR):
        best = max(rate(r["passes"][f"floor {name}"]) for r in every)
        num_bytes, packed = results["floor_bytes"][name.split(",")[0]], [ratio(r, f"floor {name}", "packed") for r in every]
        size = num_bytes / results["tokens"]
        yield f"| floor: {name} copied | {size:.0f} | | | {best:.1f} | | {statistics.median(packed):.2f} |"
    for side in ("ours", "others"):
        for name, result in results[side].items():
            if name != "threads":
                yield rate_line(f"**kdcache** {name}" if side == "ours" else name, result)


def rate_line(name: str, result: Result) -> str:
    if "passes" not in result:
        return f"| {name} | | | not installed | | | |" if "not_installed" in result else f"| {name} | | | failed | | | |"
    checked = "no" if result["checked"].startswith(("no", "off")) else "at fetch" if "fetch" in result["checked"] else "yes"
    cells = [f"{result['bytes'] / result['tokens']:.0f}", checked, *(f"{rate(result['passes'][mode]):.3g}" for mode in MODES)]
    return f"| {name} | {' | '.join(cells)} | {ratio(result, 'random', 'packed'):.3g} |"


def notes(results: Result) -> Iterator[str]:
    """What each row is, or why there is none."""
    for name, result in results["others"].items():
        if "passes" in result:
            yield f"- {name}: {result['package']}; {result['note']}; gives {result['dtype']}; checked: {result['checked']}."
    for name, result in {**results["ours"], **results["others"]}.items():
        if "failed" in result:
            yield f"- {name}: failed: {result['failed']}"
        if "not_installed" in result:
            yield f"- {name}: not installed: {result['not_installed']}."
    yield "- kdcache's `quantized` and `archive` keep 8 bits of a logprob, `quantized7` 7, the others all of a float16's."
    yield "- Seconds to the first batch, and memory, of a million sequences: benchmarks/loader_scale.py."


def threads(results: Result) -> Iterator[str]:
    yield "| prefetch threads (packed) | M tokens per wall second | M tokens per CPU second |"
    yield "|---:|---:|---:|"
    passes = results["ours"]["threads"].get("passes", {})
    for name in (name for name in passes if not name.startswith("floor")):
        yield f"| {name} | {rate(passes[name], 'wall_seconds'):.1f} | {rate(passes[name]):.1f} |"


def comparison(results: Result) -> Iterator[str]:
    """Each other library beside our fastest at its bytes or fewer."""
    yield "Ours over theirs at their bytes or fewer, checked: sequential, random, packed batches.\n"
    yield "| theirs | ours, float16 exact | times as fast | ours, any codec | times as fast |"
    yield "|---|---|---|---|---|"
    for name, other in measured(results, "others").items():
        cells = []
        for only_lossless in (True, False):
            best = fastest_within(results, other, only_lossless)
            cells += ["none", ""] if best is None else [best, times(results["ours"][best], other)]
        yield f"| {name} | {' | '.join(cells)} |"


def fastest_within(results: Result, other: Result, only_lossless: bool) -> str | None:
    """Our checked reader with at most so many bytes, and logprobs in no smaller a dtype, that is fastest at random."""
    fitting = {
        name: rate(r["passes"]["random"])
        for name, r in measured(results, "ours").items()
        if r["bytes"] <= other["bytes"]
        and r["checked"] != "off"
        and (r["is_lossless"] or not only_lossless)
        and (r["dtype"] == "float32" or other["dtype"] == "float16")
    }
    return max(fitting, key=fitting.__getitem__) if fitting else None


def times(our: Result, other: Result) -> str:
    return ", ".join(f"{rate(our['passes'][mode]) / rate(other['passes'][mode]):.3g}" for mode in MODES)


def wanted(results: Result) -> Iterator[str]:
    for name, given in (("packed, loader", "float32"), ("packed, loader, float16", "float16, as the floor")):
        packed = measured(results, "ours").get(name)
        if packed is None:
            continue
        found = {floor: ratio(packed, "random", floor) for floor in (*FLOORS, KEPT_FLOOR)}
        said = "met" if found["packed"] >= WANTED else "NOT met"
        yield f"Verified random access with `packed` at {WANTED} of the floor: {found['packed']:.2f}: {said}"
        yield f"(given as {given}; {found['raw']:.2f} of the raw floor, which copies the bytes that are there before packing;"
        yield f"{found[KEPT_FLOOR]:.2f} of the packed floor whose map is kept).\n"
    if measured(results, "others"):
        yield ""
        for only_lossless, which in ((True, "float16 exact"), (False, "any codec")):
            behind = list(behind_of(results, only_lossless))
            said = "met" if not behind else "NOT met: " + "; ".join(behind)
            yield f"Ahead of all of them at equal or fewer bytes, {which}: {said}."


def behind_of(results: Result, only_lossless: bool) -> Iterator[str]:
    """The libraries that our fastest at their bytes or fewer is not ahead of, and in what."""
    for name, other in measured(results, "others").items():
        best = fastest_within(results, other, only_lossless)
        slower = [m for m in MODES if best and rate(results["ours"][best]["passes"][m]) <= rate(other["passes"][m])]
        if best is None or slower:
            yield f"{name} ({', '.join(slower) if best else 'nothing of ours is as small'})"
