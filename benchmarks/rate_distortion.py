"""How many bytes does a position take, and how far is what is read back from the teacher?

Method: a teacher's distributions at P positions of text that it has not learned from. Our records are made by the code that
captures use, encoded by the codec, decoded, and compared with the whole distribution; others' are computed in the same run
from their published definitions (`rate_schemes.py`). Beside the bytes, of one sequence's columns, stand

- KL, in nats, of the teacher from what is read: entries as decoded, the mass that they leave spread evenly over all other
  tokens (none below 1e-4 / V). Of random samples only the exact entries and the tail are read so; estimates are no
  distribution.
- error: squared distance of p from the target that the loss trains towards. Top-k: entries, and the tail as the student has it
  (kdcache's tail bucket); random samples: exact entries and estimates; others: entries divided by their sum. Without bias it is
  the variance.
- angle, in degrees, between the gradient by the output weight of all positions together and that of full distillation.
- decode, into batches' arrays, 16 sequences by one call (`decode_many_into`), as a loader decodes a batch: million entries per
  CPU second of one thread; and its CPU time over that of copying the ids and logprobs that then stand there.

Random Sampling KD is there with 50 draws, and with as many as take 36 bytes per position (found by bisection), which is what
its paper says of 50: of a teacher that is less sure than theirs they take more.

Bytes: indices are ids; values logprobs and counts; scalars tails, targets beside the support, numbers of exact entries; framing
numbers of entries and the offsets of columns. The text itself is not among them. Of `archive`, where all is one stream, the
first positions' bits are counted one by one and give the shares.

Without --teacher, a stand-in: n-grams of the standard library, with 32,000 ids and Zipf's law (`rate_teachers.py`). With
--vocab 151936 --scattered its ids are as many as large teachers have, and words stand anywhere among them, most of them never
seen: the statistics of ids that large tokenizers show, at their hardest (`rate_teachers.py`).

    python benchmarks/rate_distortion.py [--teacher FOLDER] [--vocab 32000 [--scattered]] [--sequences 2] [--tokens 1024]
                                         [--quick] [--out FOLDER]

Writes rate_distortion[-NAME].md, .json and .png. Takes about two CPU minutes; with --quick, seconds, which prove that it works.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from rate_measures import Truth
from rate_schemes import Result, baselines, ours, random_sampling
from rate_teachers import Teacher, stand_in, trained

from kdcache.format.manifest import SelectionInfo
from kdcache.format.record import TokenSequence, sequence_key

SIZES: dict[str, list[dict[str, float]]] = {
    "top_k": [{"k": k} for k in (8, 16, 24, 32, 40, 44, 48, 50, 56, 64)],
    "top_p_k": [{"p": 0.95, "k": 100}],
    "threshold": [{"tau": tau} for tau in (0.15, 0.1, 0.07, 0.05, 0.03, 0.02, 0.01)],
    "sampled": [{"num_draws": n} for n in (25, 50, 100)],
    "top_k_sampled": [{"k": 4, "num_draws": 16}],
}
QUICK = {"top_k": SIZES["top_k"][:1], "threshold": SIZES["threshold"][:1], "sampled": SIZES["sampled"][:1]}


def selections(sizes: dict[str, list[dict[str, float]]]) -> list[SelectionInfo]:
    seeds = {kind: {"seed": 0} if kind in ("sampled", "threshold", "top_k_sampled") else {} for kind in sizes}
    return [SelectionInfo(kind=kind, params={**params, **seeds[kind]}) for kind, several in sizes.items() for params in several]


def sequences_of(teacher: Teacher) -> list[TokenSequence]:
    return [
        TokenSequence(ids, np.ones(len(ids), bool), np.zeros(len(ids), np.uint8), np.zeros(1, np.int32), f"text#{n}",
                      sequence_key(ids, np.ones(len(ids), bool), ""))
        for n, ids in enumerate(teacher.ids_ST)
    ]  # fmt: skip


def measure(teacher: Teacher, sizes: dict[str, list[dict[str, float]]]) -> tuple[list[Result], str]:
    """All rows, others' first; and what was measured on."""
    truth = Truth(np.concatenate([teacher.logprobs_TV(s) for s in range(len(teacher.ids_ST))]), teacher.ids_ST.reshape(-1))
    sequences = sequences_of(teacher)
    say("teacher, student and full gradient")
    others = baselines(truth, random_sampling(truth, sequences, num_draws=50) | random_sampling(truth, sequences))
    say("others' records")
    about = f"{teacher.name}; {len(sequences)} sequences of {teacher.ids_ST.shape[1]} tokens; entropy "
    about += f"{-truth.negentropy_P.mean():.2f} nats, KL of the teacher from the student {truth.student_kl:.2f}."
    return others + ours(truth, sequences, selections(sizes), say), about


def say(what: str) -> None:
    print(f"{time.process_time():6.1f} CPU s  {what}", file=sys.stderr)


def number(value: float, digits: int = 1) -> str:
    return "" if math.isnan(value) else f"{value:,.{digits}f}"


def power(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.1e}"


def table(results: Sequence[Result]) -> str:
    heads = (
        "record",
        "entries",
        "ids",
        "values",
        "scalars",
        "framing",
        "**bytes**",
        "KL",
        "error",
        "angle",
        "M entries/s",
        "copies",
    )
    lines = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1)]
    for r in results:
        cells = (
            r.name, number(r.entries), *(number(getattr(r, part)) for part in ("indices", "values", "scalars", "framing")),
            f"**{number(r.bytes)}**", power(r.kl), power(r.error), number(r.angle), number(r.decode), number(r.copies),
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def targets(results: Sequence[Result]) -> list[str]:
    """What was hoped for, and what came."""
    mine = [r for r in results if r.family != "others"]
    budget = [r for r in results if "budget" in r.name]
    rival = min(budget, key=lambda r: r.kl)
    better = min((r for r in mine if r.kl <= rival.kl), key=lambda r: r.bytes, default=None)
    drawn = [r for r in results if r.name.startswith("Random Sampling")]
    packed = {is_top: [r.copies for r in mine if r.name.endswith("packed") and (r.family == "top_k") == is_top]
              for is_top in (True, False)}  # fmt: skip
    slowest, *_, fastest = sorted((r for r in mine if "archive" in r.name), key=lambda r: r.decode)
    return [
        f"At most half the bytes of DistillKit's budget setting ({rival.bytes:.0f}, KL {rival.kl:.1e}) at less KL: "
        + (
            f"{better.name}, {better.bytes:.1f} bytes, {rival.bytes / better.bytes:.1f} times fewer."
            if better
            else "no record."
        ),
        *(_steady(r, [m for m in mine if m.family == "threshold"]) for r in drawn),
        f"`packed` decoded within 1.3 copies of what it writes: {min(packed[True]):.1f} to {max(packed[True]):.1f} with top_k, "
        f"{min(packed[False]):.1f} to {max(packed[False]):.1f} with entries that vary in number.",
        f"`archive` decoded at 5 M entries per second and core: {slowest.decode:.1f} ({slowest.name}) to {fastest.decode:.1f}.",
    ]


def _steady(drawn: Result, thresholds: Sequence[Result]) -> str:
    """The smallest record of `threshold` with no more error than one of Random Sampling KD."""
    found = min((r for r in thresholds if r.error <= drawn.error), key=lambda r: r.bytes, default=None)
    said = f"{found.name}, {found.bytes:.1f} bytes, {found.error:.1e}." if found else "no record."
    rival = f"{drawn.name.rpartition(',')[0]} ({drawn.bytes:.1f} bytes, {drawn.error:.1e})"
    return f"`threshold` within 24 bytes, no more error than {rival}: {said}"


LINES = {"packed": "-", "quantized 8": "--", "archive 8": ":"}
"""Codecs that are drawn; the others lie between them."""


def plot(results: Sequence[Result], path: Path) -> None:
    """Bytes against KL and against error: a colour per selection, a line style per codec, a mark for each of the others."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(13, 6))
    colours = {family: f"C{n}" for n, family in enumerate(dict.fromkeys(r.family for r in results if r.family != "others"))}
    for axis, name, label in zip(axes, ("kl", "error"), ("KL, nats", "squared error of the target"), strict=True):
        shown = [r for r in results if getattr(r, name) > 0 and r.bytes < 1000]
        for family, colour in colours.items():
            for codec, line in LINES.items():
                points = sorted(
                    (r.bytes, getattr(r, name)) for r in shown if r.family == family and r.name.endswith(f", {codec}")
                )
                if points:
                    axis.plot(*zip(*points, strict=True), line, marker=".", color=colour, label=f"{family}, {codec}")
        for number, r in enumerate([r for r in shown if r.family == "others"]):
            axis.plot(r.bytes, getattr(r, name), "xsd*vP^<"[number % 8], color="black", fillstyle="none", label=r.name)
        axis.set(xscale="log", yscale="log", xlabel="bytes per position", ylabel=label)
        axis.grid(visible=True, which="major", alpha=0.3)
    axes[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--teacher", type=Path, metavar="FOLDER", help="a model in the Hugging Face layout")
    parser.add_argument("--vocab", type=int, default=32_000, help="ids of the stand-in (default: %(default)s)")
    parser.add_argument("--scattered", action="store_true", help="its ids in no order, as in a large vocabulary")
    parser.add_argument("--sequences", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=1024, help="of each sequence (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="few positions and records: does it work?")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", metavar="FOLDER")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sizes = {"num_sequences": 1, "num_tokens": 128} if options.quick else {
        "num_sequences": options.sequences, "num_tokens": options.tokens}  # fmt: skip
    if options.teacher is not None:
        teacher = trained(options.teacher, **sizes)
    else:
        teacher = stand_in(
            vocab_size=4096 if options.quick else options.vocab,
            **sizes,
            scattered=options.scattered,
            max_words=200_000 if options.quick else None,
        )
    say(teacher.name)
    results, about = measure(teacher, QUICK if options.quick else SIZES)
    options.out.mkdir(parents=True, exist_ok=True)
    suffix = f"-{options.teacher.name}" if options.teacher else f"-{teacher.vocab_size}"
    stem = options.out / f"rate_distortion{suffix}{'-quick' if options.quick else ''}"
    lines = [f"- {line}" for line in targets(results)]
    text = "\n".join(["# benchmarks/rate_distortion.py", "", about, "", *lines, "", table(results), ""])
    stem.with_suffix(".md").write_text(text)
    stem.with_suffix(".json").write_text(json.dumps([asdict(r) | {"bytes": r.bytes} for r in results], indent=1) + "\n")
    plot(results, stem.with_suffix(".png"))
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
