"""A whole evaluation: models loaded, held-out text read, scored, compared, written as `results.json`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from kdcache.errors import ConfigError, KdcacheError, StateError
from kdcache.store.files.regular import write_new
from kdcache.teacher import load_tokenizer
from kdcache.teacher.tokenizer import Tokenizer
from kdcache.train.body import model_size, vocab_size
from kdcache.train.evaluation.compare import compare_models
from kdcache.train.evaluation.heldout import HeldoutSequence, read_heldout
from kdcache.train.evaluation.scores import TEACHER, common_vocabulary, score_models
from kdcache.train.evaluation.unigram import Unigram, read_unigram
from kdcache.train.runs.run_folder import MODEL, RUN, cache_of_run, read_metrics
from kdcache.train.student import load_model, with_attention

RESULTS = "results.json"


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What is measured.

    Attributes:
        teacher: folder or hub id; its tokenizer makes the ids.
        students: name -> directory of a training run, or of a model in the Hugging Face layout.
        data: file of texts or ids, see `read_heldout`.
        out: directory for `results.json`; made if it is not there.
        baseline: the student that others are compared with; None for the first.
        unigram: cache or file of training text whose token frequencies are what retained nats are counted from; None for the
            cache that a student was trained from, the baseline's first, where a run names one that can be read.
        window: most tokens in a sequence.
        max_tokens: keep no more than these, in windows evenly spread over the file; None for all.
        seed: of the bootstrap.
    """

    teacher: str
    students: Mapping[str, str]
    data: str
    out: str
    baseline: str | None = None
    unigram: str | None = None
    window: int = 256
    max_tokens: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Evaluation:
    """Attributes:
    results: as `compare_models` gives them, with what was evaluated under `inputs`; also in `results.json`.
    curves: student -> (tokens read, held-out nats per token), from the runs that measured it.
    """

    results: dict[str, Any]
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)


def evaluate(
    options: EvaluateConfig, *, on_start: Callable[[int], Callable[[int], object]] = lambda _: lambda _: None
) -> Evaluation:
    """Score the teacher and the students on the same held-out tokens.

    Args:
        options: what is measured.
        on_start: called with the number of tokens before scoring; gives a function that is called with the tokens of each
            sequence done. For progress.

    Raises:
        ConfigError: a model does not load, `out` cannot be written, or a name is taken or unknown.
        InputError: held-out data that cannot be read.
        MismatchError: a student's vocabulary is smaller than the tokenizer's.
        NotFiniteError: a model whose loss or KL on some text is not a finite number.
    """
    baseline = options.baseline or next(iter(options.students), "")
    if TEACHER in options.students or baseline not in options.students:
        raise ConfigError(
            f"students are {', '.join(map(repr, options.students)) or 'missing'} and the baseline is {baseline!r}: expected at "
            f"least one student, none named {TEACHER!r}, and the baseline among them"
        )
    out = _made(Path(options.out))
    tokenizer = load_tokenizer(options.teacher)
    sequences = read_heldout(options.data, tokenizer, window=options.window, max_tokens=options.max_tokens)
    num_tokens = tokenizer.identity.vocab_size
    unigram, why_not = _unigram(options, baseline, tokenizer)
    teacher = _loaded(options.teacher, "--teacher")
    students = {name: _loaded(str(_model_folder(Path(path))), f"--student {name}") for name, path in options.students.items()}
    advance = on_start(sum(s.num_targets for s in sequences))

    def on_sequence(sequence: HeldoutSequence) -> None:
        advance(sequence.num_targets)

    scores = score_models(teacher, students, sequences, on_sequence=on_sequence, num_tokens=num_tokens)
    inputs = {"teacher": options.teacher, "students": dict(options.students), "data": options.data, "window": options.window}
    inputs |= {"vocabulary": common_vocabulary(teacher, students, num_tokens), "teacher's vocabulary": vocab_size(teacher)}
    inputs["unigram"] = {"missing": why_not} if unigram is None else {"source": unigram.source, "tokens": unigram.num_tokens}
    compared = compare_models(
        scores,
        sequences,
        baseline=baseline,
        seed=options.seed,
        unigram_nll_S=None if unigram is None else unigram.nll_S(sequences),
    )
    sizes = {name: model_size(model) for name, model in {TEACHER: teacher, **students}.items()}
    results = {"inputs": inputs, "sizes": sizes, **compared}
    _write(out / RESULTS, results)
    return Evaluation(results, {name: heldout_curve(path) for name, path in options.students.items()})


def heldout_curve(run: str | Path) -> list[tuple[int, float]]:
    """(tokens read, held-out nats per token) as the run measured them; empty for a folder that is not a run."""
    curve: list[tuple[int, float]] = []
    for line in read_metrics(run):
        num_tokens, nats = line.get("tokens"), line.get("heldout_nats_per_token")
        if nats is None:
            continue
        # Whole numbers in JSON have no end, floats have.
        if not isinstance(num_tokens, int) or not isinstance(nats, (int, float)) or max(num_tokens, abs(nats)) >= 2**63:
            raise StateError(f"{run}: a held-out loss in its metrics is not a number; the file is damaged or was edited")
        curve.append((num_tokens, nats))
    return curve


def _unigram(options: EvaluateConfig, baseline: str, tokenizer: Tokenizer) -> tuple[Unigram | None, str]:
    """The unigram, or None and why there is none: a run's cache may be gone, and the rest of the evaluation needs none."""
    num_tokens = tokenizer.identity.vocab_size
    if options.unigram is not None:
        return read_unigram(options.unigram, tokenizer, vocab_size=num_tokens), ""
    why_not = "no student is a training run that names its cache"
    for name in dict.fromkeys([baseline, *options.students]):
        cache = cache_of_run(options.students[name])
        if cache is None:
            continue
        try:
            return read_unigram(cache, tokenizer, vocab_size=num_tokens), ""
        except KdcacheError as error:
            why_not = str(error)
    return None, why_not


def _model_folder(path: Path) -> Path:
    if (path / MODEL).is_dir():
        return path / MODEL
    if (path / RUN).exists():
        raise ConfigError(
            f"--student {str(path)!r} is a training run that is not finished; run `kdcache train` again to finish it"
        )
    return path


def _loaded(name: str, field_name: str) -> PreTrainedModel:
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def load(attention: str) -> PreTrainedModel:
        return load_model(name, field=field_name, dtype=torch.float32, attn_implementation=attention)

    model = with_attention(load, "auto", field=None)
    return model.to(device).eval()  # pyright: ignore[reportArgumentType]


def _made(out: Path) -> Path:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {str(out)!r} cannot be made a directory: {error.strerror}") from error
    return out


def _write(path: Path, results: Mapping[str, Any]) -> None:
    temp = path.with_name(f"{path.name}-unfinished")
    try:
        write_new(temp, f"{json.dumps(results, indent=1)}\n".encode())
        os.replace(temp, path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from error
