"""What retention.py says of the students that are done: a table, a verdict, a plot."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from device import processor_features, processor_name
from fidelity_report import interval, spread
from numpy.typing import NDArray
from retention_students import COPIED, MAX_BYTES, MAX_SHARE, SETTINGS, result_path

GOAL_SHARE = 0.95
REFERENCE = "KL, layers copied"
ROUNDS = 2000

Sums = Mapping[str, Any]
"""Name -> sums over all texts, or one for each draw of texts."""


def nats_kept(of: Sums) -> Any:
    return (of["unigram"] - of["student nll"]) / (of["unigram"] - of["teacher nll"])


def accuracy_kept(of: Sums) -> Any:
    return of["student correct"] / of["teacher correct"]


MEASURES: dict[str, Callable[[Sums], Any]] = {
    "loss": lambda of: of["student nll"] / of["tokens"],
    "kl": lambda of: of["student kl"] / of["tokens"],
    "agreement": lambda of: of["student agreement"] / of["tokens"],
    "accuracy": lambda of: of["student correct"] / of["tokens"],
}
KEPT: dict[str, Callable[[Sums], Any]] = {"nats": nats_kept, "accuracy": accuracy_kept}


def collect(plan: dict[str, Any], num_seeds: int) -> list[dict[str, Any]]:
    """A row per setting: what is there of its seeds, its cache's bytes, what it keeps."""
    rows = []
    runs = {
        name: {seed: json.loads(path.read_text()) for seed in range(num_seeds)
               if (path := result_path(plan, name, seed)).exists()}
        for name in SETTINGS
    }  # fmt: skip
    for name, of in runs.items():
        row: dict[str, Any] = {"setting": name, "seeds": sorted(of), "init": SETTINGS[name]["init"]}
        costs = Path(plan["work"]) / f"{SETTINGS[name]['cache']}.json"
        if SETTINGS[name]["loss"].get("alpha") != 0 and costs.exists():
            row |= json.loads(costs.read_text())
        rows.append(row | (summary(of, runs[REFERENCE]) if of else {}))
    return rows


def summary(of: dict[int, Any], reference: dict[int, Any]) -> dict[str, Any]:
    totals = {seed: {name: sum(values) for name, values in run["sums"].items()} for seed, run in of.items()}
    row: dict[str, Any] = {"size": next(iter(of.values()))["size"], "curves": [run["curve"] for run in of.values()]}
    row |= {name: with_deviation([measure(sums) for sums in totals.values()]) for name, measure in MEASURES.items()}
    row["by_seed"] = {str(seed): {name: measure(sums) for name, measure in MEASURES.items()} for seed, sums in totals.items()}
    row["train_cpu_seconds"] = with_deviation([run["train_cpu_seconds"] for run in of.values()])
    row |= {f"kept_{name}": wider(of, totals, measure) for name, measure in KEPT.items()}
    any_run = next(iter(totals.values()))
    row["teacher"] = {name: measure({**any_run, **{f"student {part}": any_run[f"teacher {part}"] for part in
                      ("nll", "kl", "agreement", "correct")}}) for name, measure in MEASURES.items()}  # fmt: skip
    row["unigram"] = any_run["unigram"] / any_run["tokens"]
    paired = [seed for seed in of if seed in reference]
    if paired:
        theirs = {seed: {name: sum(values) for name, values in reference[seed]["sums"].items()} for seed in paired}
        row["against"] = interval([nats_kept(totals[seed]) - nats_kept(theirs[seed]) for seed in paired])
    return row


def with_deviation(values: list[float]) -> dict[str, float]:
    return {"mean": statistics.fmean(values), "sd": statistics.stdev(values) if len(values) > 1 else math.nan}


def wider(of: dict[int, Any], totals: dict[int, Sums], measure: Callable[[Sums], Any]) -> dict[str, Any]:
    """The mean over seeds, and to either side the wider of two 95 % intervals: over seeds and over texts."""
    seeds = interval([float(measure(sums)) for sums in totals.values()])
    texts = over_texts([run["sums"] for run in of.values()], measure)
    low, high = np.percentile(texts, (2.5, 97.5))
    return {
        "value": seeds["value"],
        "low": min(seeds["low"], float(low)),
        "high": max(seeds["high"], float(high)),
        "seeds": [seeds["low"], seeds["high"]],
        "texts": [float(low), float(high)],
    }


def over_texts(runs: list[dict[str, list[float]]], measure: Callable[[Sums], Any], seed: int = 0) -> NDArray[np.float64]:
    """(rounds,) the mean of a measure over runs, for draws of texts with replacement; the same draws for every run."""
    num_texts = len(runs[0]["tokens"])
    generator = np.random.Generator(np.random.Philox(key=seed))
    draws = generator.multinomial(num_texts, np.full(num_texts, 1 / num_texts), size=ROUNDS).astype(np.float64)
    return np.mean([measure({name: draws @ np.asarray(values) for name, values in sums.items()}) for sums in runs], axis=0)


def share(of: Mapping[str, Any] | None, *, signed: bool = False) -> str:
    if of is None:
        return ""
    sign = "+" if signed else ""
    value, low, high = (f"{100 * of[name]:{sign}.1f}" for name in ("value", "low", "high"))
    return f"{value}%" if math.isnan(of["low"]) else f"{value}% [{low}, {high}]"


def table(rows: list[dict[str, Any]]) -> str:
    heads = ("student", "bytes", "vectors", "loss", "KL", "agreement", "accuracy", "**accuracy kept**",
             "**nats over unigram kept**", "nats, against " + REFERENCE, "CPU s")  # fmt: skip
    done = [row for row in rows if row["seeds"]]
    teacher = done[0]["teacher"]
    lines = [
        f"| {' | '.join(heads)} |",
        "|---|" + "---:|" * (len(heads) - 1),
        f"| teacher | | | {teacher['loss']:.4f} | 0 | 1 | {teacher['accuracy']:.4f} | **100%** | **100%** | | |",
    ]
    for row in done:
        sizes = [f"{row[part]:.1f}" if row.get(part) else "" for part in ("bytes", "vectors")]
        against = "" if row["setting"] == REFERENCE else share(row.get("against"), signed=True)
        cells = (row["setting"], *sizes, *(spread(row[name]) for name in MEASURES), f"**{share(row['kept_accuracy'])}**",
                 f"**{share(row['kept_nats'])}**", against, f"{row['train_cpu_seconds']['mean']:.0f}")  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def verdict(rows: list[dict[str, Any]]) -> str:
    """Whether the claim holds, by the lower bounds of a student from a small cache."""
    goal = (
        f"At least {GOAL_SHARE:.0%} of the teacher's top-1 accuracy and of its nats over unigram, by the lower bounds, with at "
        f"most {MAX_SHARE:.0%} of its non-embedding parameters, from at most {MAX_BYTES} bytes per position"
    )
    small = [row for row in rows if row["seeds"] and row["init"] == COPIED and is_small(row)]
    known = [row for row in small if not math.isnan(lowest(row))]
    if not known:
        why = "one seed has no interval; train more" if small else "no student within these limits is done"
        return f"{goal}: not decided, since {why}."
    best = max(known, key=lowest)
    means = min(best["kept_nats"]["value"], best["kept_accuracy"]["value"])
    said = "NOT met" if means < GOAL_SHARE else "NOT shown"
    said = "met" if lowest(best) >= GOAL_SHARE else said
    return (
        f"{goal}: {said}; {best['setting']}, {share_of_size(best):.0%} of the parameters, {best['bytes']:.1f} bytes, accuracy "
        f"{share(best['kept_accuracy'])}, nats {share(best['kept_nats'])}, {len(best['seeds'])} seeds."
    )


EXACT, LABELS = "exact KL from states", "labels, layers copied"


def fidelity(rows: list[dict[str, Any]]) -> list[str]:
    """What fidelity.py asks, here: the share of the exact loss's gain over labels that the record gives, paired by seed."""
    named = {row["setting"]: row.get("by_seed", {}) for row in rows}
    lines = []
    for name in (REFERENCE, "KL, the tail's weight rising"):
        paired = [seed for seed in named.get(name, {}) if seed in named.get(EXACT, {}) and seed in named.get(LABELS, {})]
        if len(paired) < 2:
            continue
        shares = []
        for metric, shown in (("loss", "loss"), ("kl", "KL")):
            own, exact, labels = ([named[of][seed][metric] for seed in paired] for of in (name, EXACT, LABELS))
            gains = [(none - it) / (none - all_) for it, all_, none in zip(own, exact, labels, strict=True)]
            shares.append(f"{share(interval(gains))} in {shown}")
        lines.append(f"- Of what the teacher's whole distributions gain over labels, {name!r} gains {' and '.join(shares)}.")
    return lines


def is_small(row: dict[str, Any]) -> bool:
    return row.get("bytes", math.inf) + row.get("vectors", 0.0) <= MAX_BYTES and share_of_size(row) <= MAX_SHARE


def share_of_size(row: dict[str, Any]) -> float:
    return row["size"]["student"]["non_embedding"] / row["size"]["teacher"]["non_embedding"]


def lowest(row: dict[str, Any]) -> float:
    return min(row["kept_nats"]["low"], row["kept_accuracy"]["low"])


def write(plan: dict[str, Any], rows: list[dict[str, Any]], stem: Path, *, num_students: int) -> str:
    """The Markdown, written to stem.md next to JSON and plot."""
    teacher = json.loads((Path(plan["teacher"]) / "training.json").read_text())
    kept = {name: value for name, value in plan.items() if name not in ("work", "teacher")}
    results = {"plan": kept, "teacher": teacher, "processor": processor_name(), "features": processor_features(),
               "num_students": num_students, "rows": rows}  # fmt: skip
    stem.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    return report(stem)


def report(stem: Path) -> str:
    """Markdown and plot, made of stem.json."""
    results = json.loads(stem.with_suffix(".json").read_text())
    plan, teacher, rows = results["plan"], results["teacher"], results["rows"]
    done = [row for row in rows if row["seeds"]]
    if not done:
        raise SystemExit("retention: no student is done yet; run without --budget-seconds, or with more")
    size, text = done[0]["size"], max(row.get("positions", 0) for row in rows)
    read = plan["steps"] * plan["batch_rows"] * plan["seq_len"]
    about = (
        f"Teacher: {teacher['recipe']['num_layers']} layers of {teacher['recipe']['hidden_size']}, "
        f"{size['teacher']['non_embedding']:,} non-embedding parameters of {size['teacher']['parameters']:,}, trained on "
        f"{teacher['trained_num_tokens']:,} tokens ({teacher['trained_num_tokens'] / teacher['tokens_in_text']:.1f} passes); "
        f"held-out loss {done[0]['teacher']['loss']:.3f}, the unigram's {done[0]['unigram']:.3f}. Students: layers "
        f"{', '.join(map(str, plan['layers']))}, {size['student']['non_embedding']:,} non-embedding parameters "
        f"({share_of_size(done[0]):.1%}) of {size['student']['parameters']:,}; {plan['steps']} steps of {plan['batch_rows']} x "
        f"{plan['seq_len']} tokens from {text:,} positions ({read / max(1, text):.1f} passes), AdamW at "
        f"{plan['lr']:g} (random weights {plan['random_lr']:g}), beta2 {plan['beta2']:g}, {plan['dtype']}. "
        f"`threshold` at tau {plan['tau']:.3f}. Scored on {plan['heldout_tokens']:,} tokens. "
        f"{sum(len(row['seeds']) for row in rows)} of {results['num_students']} students. {results['processor']}, "
        f"{results['features']}, one thread each."
    )
    text_lines = ["# benchmarks/retention.py", "", about, "", f"- {verdict(rows)}", *fidelity(rows), "", table(rows), ""]
    stem.with_suffix(".md").write_text("\n".join(text_lines))
    plot(results, stem.with_suffix(".png"))
    return "\n".join(text_lines)


LEFT = 85.0
"""The plot's left end, in %: what is below is written at it."""


def plot(results: dict[str, Any], path: Path) -> None:
    """What each student keeps, and how its held-out loss falls with the tokens read."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in results["rows"] if row["seeds"]]
    figure, (points, curves) = pyplot.subplots(1, 2, figsize=(11, 0.38 * len(rows) + 1.8), width_ratios=(1.3, 1))
    for name, label, shift, colour in (("accuracy", "top-1 accuracy", -0.12, "C0"), ("nats", "nats over unigram", 0.12, "C1")):
        for at, of in enumerate(row[f"kept_{name}"] for row in rows):
            value, errors = 100 * of["value"], [[100 * (of["value"] - of["low"])], [100 * (of["high"] - of["value"])]]
            if value < LEFT:
                points.annotate(f"{value:.0f}%", (LEFT + 0.3, at + shift), color=colour, fontsize=8, va="center")
                continue
            shown = {"label": label} if at == 0 else {}
            points.errorbar(
                value, at + shift, xerr=np.nan_to_num(errors), fmt="o", markersize=4, color=colour, capsize=2, **shown
            )
    points.axvline(100 * GOAL_SHARE, color="black", linewidth=0.8, linestyle="--")
    points.set_yticks(np.arange(len(rows)), [row["setting"] for row in rows], fontsize=9)
    points.invert_yaxis()
    points.set(xlabel="kept of the teacher's, held-out text", xlim=(LEFT, 100.5))
    points.xaxis.set_major_formatter(lambda percent, _: f"{percent:.0f}%")
    points.grid(visible=True, axis="x", alpha=0.3)
    points.legend(loc="upper left", fontsize=8)
    for at, row in enumerate(rows):
        tokens, losses = np.mean(row["curves"], axis=0).T
        curves.plot(tokens / 1e3, losses, color=f"C{at}", marker=".", linewidth=1.2, label=row["setting"])
    copied = [np.mean(row["curves"], axis=0)[:, 1] for row in rows if row["init"] == COPIED]
    if copied:
        lowest, highest = min(map(np.min, copied)), max(map(np.max, copied))
        curves.set_ylim(lowest - 0.1 * (highest - lowest), highest + 0.1 * (highest - lowest))
    curves.set(xlabel="thousand tokens read", ylabel="held-out loss while training, nats")
    curves.grid(visible=True, alpha=0.3)
    curves.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
