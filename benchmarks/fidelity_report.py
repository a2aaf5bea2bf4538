"""What fidelity.py says of the students that are done: a table, a verdict, a plot."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

from device import processor_name
from fidelity_students import cost, result_path

GOAL_SHARE, GOAL_BYTES = 0.99, 24
STUDENT_T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
"""97.5% quantiles of Student's t, of 1 to 9 degrees of freedom."""


def collect(plan: dict[str, Any], settings: dict[str, Any], num_seeds: int) -> list[dict[str, Any]]:
    """A row per setting: what is there of its seeds, its cache's bytes, its share of the live gain."""
    runs = {
        name: {seed: json.loads(path.read_text()) for seed in range(num_seeds)
               if (path := result_path(plan, name, seed)).exists()}
        for name in settings
    }  # fmt: skip
    for seed in range(num_seeds):
        if len({of[seed]["text_digest"] for of in runs.values() if seed in of}) > 1:
            raise SystemExit(f"fidelity: the students of seed {seed} have not read the same batches")
    rows = []
    for name, of in runs.items():
        row: dict[str, Any] = {"setting": name, "seeds": sorted(of)}
        if name not in ("labels", "live"):
            row |= cost(plan, settings[name][0])
        for metric in ("loss", "kl", "agreement", "ece", "train_cpu_seconds") if of else ():
            values = [run[metric] for run in of.values()]
            row[metric] = {"mean": statistics.fmean(values), "sd": statistics.stdev(values) if len(values) > 1 else math.nan}
        paired = [seed for seed in of if seed in runs.get("labels", {}) and seed in runs.get("live", {})]
        for metric in ("loss", "kl") if paired else ():
            shares = [
                (runs["labels"][s][metric] - of[s][metric]) / (runs["labels"][s][metric] - runs["live"][s][metric])
                for s in paired
            ]
            row[f"share_{metric}"] = interval(shares)
        rows.append(row)
    return rows


def interval(values: list[float]) -> dict[str, float]:
    """Mean, and the 95% interval of Student's t; nan where one value says nothing of it."""
    mean = statistics.fmean(values)
    half = (
        math.nan if len(values) < 2 else STUDENT_T[min(len(values) - 1, 9) - 1] * statistics.stdev(values) / len(values) ** 0.5
    )
    return {"value": mean, "low": mean - half, "high": mean + half}


def table(rows: list[dict[str, Any]]) -> str:
    heads = ("student", "entries", "**bytes**", "text", "framing", "loss", "KL", "top-1", "ECE", "share of gain, loss",
             "share of gain, KL", "CPU s")  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1)]
    for row in (row for row in rows if row["seeds"]):
        sizes = [f"{row[part]:.1f}" if part in row else "" for part in ("entries", "bytes", "text", "framing")]
        scores = [spread(row[m]) for m in ("loss", "kl", "agreement", "ece")]
        cells = (row["setting"], sizes[0], f"**{sizes[1]}**" if sizes[1] else "", *sizes[2:], *scores,
                 percent(row.get("share_loss")), percent(row.get("share_kl")),
                 f"{row['train_cpu_seconds']['mean']:.0f}")  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(of: dict[str, float]) -> str:
    return f"{of['mean']:.4f}" + ("" if math.isnan(of["sd"]) else f" +- {of['sd']:.4f}")


def percent(share: dict[str, float] | None) -> str:
    if share is None:
        return ""
    return f"{share['value']:.1%}" + ("" if math.isnan(share["low"]) else f" [{share['low']:.1%}, {share['high']:.1%}]")


def verdict(rows: list[dict[str, Any]], metric: str) -> str:
    """Whether the target is met, by the best of the small records."""
    small = [row for row in rows if row.get("bytes", math.inf) <= GOAL_BYTES and f"share_{metric}" in row]
    goal = f"At least {GOAL_SHARE:.0%} of the live gain in {metric} within {GOAL_BYTES} bytes per position"
    if not small:
        return f"{goal}: not measured yet."
    best = max(small, key=lambda row: row[f"share_{metric}"]["value"])
    share = best[f"share_{metric}"]
    within = "met within seed noise" if share["high"] >= GOAL_SHARE else "NOT met"
    said = "met" if share["value"] >= GOAL_SHARE else within
    return f"{goal}: {said}; {best['setting']}, {best['bytes']:.1f} bytes, {percent(share)}."


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Bytes against the share of the live gain, in loss and in KL."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(13, 5.5), sharey=True)
    for axis, metric in zip(axes, ("loss", "kl"), strict=True):
        shown = [row for row in rows if "bytes" in row and f"share_{metric}" in row]
        for number, row in enumerate(shown):
            share = row[f"share_{metric}"]
            axis.errorbar(row["bytes"], share["value"], yerr=share["high"] - share["value"], fmt="osv^D<>"[number % 7],
                          color=f"C{number % 10}", capsize=3, label=row["setting"])  # fmt: skip
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.axvline(GOAL_BYTES, color="black", linewidth=0.8, linestyle=":")
        axis.set(xscale="log", xlabel="bytes per position", ylabel=f"share of the live gain, {metric}")
        axis.grid(visible=True, alpha=0.3)
    axes[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def write(plan: dict[str, Any], rows: list[dict[str, Any]], stem: Path, *, num_students: int) -> str:
    """The Markdown, written to stem.md beside JSON and plot."""
    done, positions = sum(len(row["seeds"]) for row in rows), max(row.get("positions", 0) for row in rows)
    teacher = json.loads((Path(plan["teacher"]) / "training.json").read_text())
    about = (
        f"Teacher: {teacher['num_parameters']:,} parameters, {teacher['recipe']['vocab_size']:,} tokens, held-out loss "
        f"{teacher['heldout_nats_per_token']:.3f}. Students: {plan['num_layers']} layers of {plan['hidden_size']}, "
        f"{plan['steps']} steps of {plan['batch_rows']} x {plan['seq_len']} tokens from {positions:,} positions, "
        f"AdamW at {plan['lr']:g}, beta2 {plan['beta2']:g}; scored on {plan['heldout_tokens']:,} tokens. "
        f"{done} of {num_students} students. {processor_name()}, one thread each. "
        f"tau: {', '.join(f'{name} {tau:.3f}' for name, tau in plan['taus'].items())}."
    )
    lines = [f"- {verdict(rows, metric)}" for metric in ("loss", "kl")]
    text = "\n".join(["# benchmarks/fidelity.py", "", about, "", *lines, "", table(rows), ""])
    stem.with_suffix(".md").write_text(text)
    kept = {name: value for name, value in plan.items() if name not in ("work", "teacher")}
    stem.with_suffix(".json").write_text(json.dumps({"plan": kept, "teacher": teacher, "rows": rows}, indent=1) + "\n")
    plot(rows, stem.with_suffix(".png"))
    return text
