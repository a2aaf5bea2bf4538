"""What fidelity.py says of the students that are done: a table, a verdict, a plot."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

from device import processor_features, processor_name
from fidelity_students import cost, result_path

GOAL_SHARE, GOAL_BYTES = 0.95, 24
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
    """Whether the target is met: the lower bound decides, so a wide interval is no evidence.

    Of the small records the one with the highest lower bound. "Not shown": its mean reaches the target, its interval does not.
    """
    small = [row for row in rows if row.get("bytes", math.inf) <= GOAL_BYTES and f"share_{metric}" in row]
    goal = f"At least {GOAL_SHARE:.0%} of the live gain in {metric} within {GOAL_BYTES} bytes per position, by the lower bound"
    if not small:
        return f"{goal}: not measured yet."
    known = [row for row in small if not math.isnan(row[f"share_{metric}"]["low"])]
    if not known:
        return f"{goal}: not decided, since one seed has no interval; train more seeds."
    best = max(known, key=lambda row: row[f"share_{metric}"]["low"])
    share = best[f"share_{metric}"]
    said = "NOT met" if share["value"] < GOAL_SHARE else "NOT shown"
    said = "met" if share["low"] >= GOAL_SHARE else said
    return f"{goal}: {said}; {best['setting']}, {best['bytes']:.1f} bytes, {percent(share)}, {len(best['seeds'])} seeds."


FAMILIES = {"threshold": "threshold", "top_k_sampled": "sampled", "sampled": "sampled", "top_k": "top-k", "top_p": "top-k"}
"""What a setting's name begins with -> the family that it is drawn as; all others as top-k."""
COLOURS = {"threshold": "C0", "sampled": "C2", "top-k": "C1"}


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Bytes per position against the share of live distillation's gain, in held-out loss and in KL to the teacher."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    for axis, metric, title in zip(axes, ("loss", "kl"), ("held-out loss", "KL to the teacher"), strict=True):
        for row in (row for row in rows if "bytes" in row and f"share_{metric}" in row):
            _point(axis, row, row[f"share_{metric}"])
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.text(390, 1.01, "a live teacher", ha="right", va="bottom", fontsize=8)
        axis.set(xscale="log", xlim=(6, 420), xlabel="bytes per position", title=title)
        axis.set_xticks([8, 16, 32, 64, 128, 256], ["8", "16", "32", "64", "128", "256"], minor=False)
        axis.tick_params(which="minor", bottom=False, labelbottom=False)
        axis.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        axis.grid(visible=True, alpha=0.3)
    axes[0].set_ylabel("share of the gain of a live teacher over labels")
    marks = [axes[1].plot([], [], "o", color=colour, label=name)[0] for name, colour in COLOURS.items()]
    axes[1].legend(handles=marks, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _point(axis: Any, row: dict[str, Any], share: dict[str, float]) -> None:
    name, _, how = row["setting"].partition(", ")
    family = next((family for start, family in FAMILIES.items() if name.startswith(start)), "top-k")
    axis.errorbar(row["bytes"], share["value"], yerr=share["high"] - share["value"], fmt="o", markersize=5,
                  color=COLOURS[family], capsize=2, linewidth=0.8,
                  markerfacecolor="white" if how == "renormalised" else None)  # fmt: skip
    if family == "threshold" or how == "renormalised":
        return
    label = name.replace("_", "-").removesuffix(" archive").replace("-sampled 4+16", " 4 and 16 draws")
    at, offset, across, up = {
        "sampled": (share["low"], (0, -3), "center", "top"),
        "top-k": (share["value"], (-6, 0), "right", "center"),
    }[family]
    if name.startswith("top_p"):
        at, offset, across, up = share["high"], (0, 3), "center", "bottom"
    at = share["value"] if math.isnan(at) else at
    axis.annotate(label, (row["bytes"], at), xytext=offset, textcoords="offset points", fontsize=7, ha=across, va=up)


def write(plan: dict[str, Any], rows: list[dict[str, Any]], stem: Path, *, num_students: int) -> str:
    """The Markdown, written to stem.md beside JSON and plot."""
    kept = {name: value for name, value in plan.items() if name not in ("work", "teacher")}
    teacher = json.loads((Path(plan["teacher"]) / "training.json").read_text())
    results = {"plan": kept, "teacher": teacher, "processor": processor_name(), "features": processor_features(),
               "num_students": num_students, "rows": rows}  # fmt: skip
    stem.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    return report(stem)


def report(stem: Path) -> str:
    """Markdown and plot, made of stem.json."""
    results = json.loads(stem.with_suffix(".json").read_text())
    plan, teacher, rows = results["plan"], results["teacher"], results["rows"]
    done, positions = sum(len(row["seeds"]) for row in rows), max(row.get("positions", 0) for row in rows)
    processor = ", ".join(results[name] for name in ("processor", "features") if name in results)
    about = (
        f"Teacher: {teacher['num_parameters']:,} parameters, {teacher['recipe']['vocab_size']:,} tokens, held-out loss "
        f"{teacher['heldout_nats_per_token']:.3f}. Students: {plan['num_layers']} layers of {plan['hidden_size']}, "
        f"{plan['steps']} steps of {plan['batch_rows']} x {plan['seq_len']} tokens from {positions:,} positions, "
        f"AdamW at {plan['lr']:g}, beta2 {plan['beta2']:g}; scored on {plan['heldout_tokens']:,} tokens. "
        f"{done} of {results.get('num_students', done)} students. {processor}; one thread each. "
        f"tau: {', '.join(f'{name} {tau:.3f}' for name, tau in plan['taus'].items())}."
    )
    lines = [f"- {verdict(rows, metric)}" for metric in ("loss", "kl")]
    text = "\n".join(["# benchmarks/fidelity.py", "", about, "", *lines, "", table(rows), ""])
    stem.with_suffix(".md").write_text(text)
    plot(rows, stem.with_suffix(".png"))
    return text
