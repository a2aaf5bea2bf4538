"""Every advice that the doctor can give is followed here, and what comes of it is right.

The table below has a line for each line of `advice.ADVICE`, for `--accept` of each finding that is undecided, and for what
messages about files advise; a new one without a line here fails.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from foreign_cases import (
    Item,
    Truth,
    changed,
    defects,
    few_rows,
    items,
    log_softmax,
    notes,
    with_extra_target,
    write_columns,
    write_distillkit,
    write_rows,
)

import kdcache
import kdcache.foreign.judge.live as live
from kdcache.config.capture import TeacherConfig
from kdcache.errors import InputError
from kdcache.foreign.advice import ADVICE
from kdcache.foreign.base import Finding
from kdcache.foreign.convert import ConvertConfig, convert
from kdcache.foreign.judge.doctor import Examination, ExamineConfig, examine
from kdcache.format.manifest import TokenizerIdentity
from kdcache.store.verify import verify_cache
from kdcache.teacher import load_teacher
from kdcache.teacher.base import Teacher

PACKAGE = Path(kdcache.__file__).parent / "foreign"
TOKENIZER = TokenizerIdentity(name="tiny", fingerprint="f" * 64, vocab_size=512)
FLAG = re.compile(r"--[a-z][a-z-]*(?: [A-Za-z0-9_+=-]*[A-Za-z0-9_])?")

FINE = {"d": 520, "k": 32, "exact_k": 16, "polynomial_terms": [0, 1, 2], "delta_encoding": True}


@dataclass
class Asked:
    """What a user has said so far."""

    convert: ConvertConfig
    teacher: Teacher | None = None

    def read(self, **changes: Any) -> Asked:
        options = self.convert.examine
        return self.examine(read=replace(options.read, **changes))

    def examine(self, **changes: Any) -> Asked:
        return replace(self, convert=replace(self.convert, examine=replace(self.convert.examine, **changes)))

    def say(self, **changes: Any) -> Asked:
        return replace(self, convert=replace(self.convert, **changes))


@dataclass(frozen=True)
class Case:
    """A cache for which the doctor gives an advice.

    Attributes:
        write: makes the cache in a folder.
        follow: what the user says after it.
        with_teacher: whether a teacher is asked from the start on.
        before: of what the user says beforehand.
    """

    write: Callable[[Truth, Path], Path]
    follow: Callable[[Asked, Path], Asked]
    with_teacher: bool = False
    before: Callable[[Asked], Asked] = field(default=lambda asked: asked)


def columns(change: Callable[[Item], None], name: str = "a.parquet", **names: str) -> Callable[[Truth, Path], Path]:
    return lambda truth, folder: write_columns(folder / name, changed(items(truth), change), **names)


def nothing(item: Item) -> None:
    pass


def shift(by: int) -> Callable[[Item], None]:
    def move(item: Item) -> None:
        item.ids, item.values = (np.roll(rows, by, axis=0).tolist() for rows in (item.ids, item.values))

    return move


def repeat(item: Item) -> None:
    item.ids[5][-1], item.values[5][-1] = item.ids[5][-2], item.values[5][-2]


def of_values(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Item], None]:
    return lambda item: setattr(item, "values", change(np.array(item.values)).tolist())


def displaced(truth: Truth, folder: Path) -> Path:
    made = with_extra_target(truth)
    for item in made:
        for t, row in enumerate(item.ids):
            if len(row) > 16:
                item.ids[t], item.values[t] = [row[-1], *row[:-2]], [item.values[t][-1], *item.values[t][:-2]]
    return write_columns(folder / "a.parquet", made)


def engine_s(truth: Truth, folder: Path) -> Path:
    """k+1 rows that are one late too, as engines give them: two repairs at once."""
    made = with_extra_target(truth)
    for item in made:
        item.ids, item.values = [[], *item.ids], [[], *item.values]
    return write_columns(folder / "a.jsonl", made)


def distillkit(settings: dict[str, Any], **said: Any) -> Callable[[Truth, Path], Path]:
    return lambda truth, folder: write_distillkit(folder / "c", items(truth, settings["k"]), settings, **said)


def noisy_curves(truth: Truth, folder: Path) -> Path:
    """Coefficients that are noise in a fifth of the rows, as DistillKit's least squares gives them: rows rise, some above 1."""
    made = items(truth, FINE["k"])
    for item in made:
        for row in item.values[::5]:
            row[FINE["exact_k"] :] = [value + 2.5 for value in row[FINE["exact_k"] :]]
    return write_distillkit(folder / "c", made, FINE)


def tempered(temperature: float) -> Callable[[Truth, Path], Path]:
    def write(truth: Truth, folder: Path) -> Path:
        made = items(truth)
        for item, logits_NV in zip(made, truth.logits_SNV, strict=True):
            item.values = np.take_along_axis(log_softmax(logits_NV[:-1] / temperature), np.array(item.ids), axis=1).tolist()
        return write_columns(folder / "a.parquet", made)

    return write


def one_moved(truth: Truth, folder: Path) -> Path:
    made = items(truth)
    shift(1)(made[3])
    return write_columns(folder / "a.parquet", made)


def a_third_moved(truth: Truth, folder: Path) -> Path:
    """The last rows of each sequence belong to other tokens: too many for chance, too few for certainty."""
    made = items(truth)
    for item in made:
        item.ids[47:], item.values[47:] = item.ids[46:-1], item.values[46:-1]
    return write_columns(folder / "a.parquet", made)


def greedy(truth: Truth, folder: Path) -> Path:
    made = items(truth)
    for item in made:
        item.input_ids = [item.input_ids[0], *(row[0] for row in item.ids)]
    return write_columns(folder / "a.parquet", made)


def padded(truth: Truth, folder: Path) -> Path:
    """Texts of unlike lengths on the right of padding, whose mask has a name of its own."""
    rows = []
    for n, item in enumerate(items(truth)):
        rows.append({
            "input_ids": [7] * (3 + n) + item.input_ids, "mask_of_text": [False] * (3 + n) + [True] * len(item.input_ids),
            "topk_ids": item.ids[:1] * (3 + n) + item.ids, "topk_logprobs": item.values[:1] * (3 + n) + item.values,
        })  # fmt: skip
    return write_rows(folder / "a.parquet", rows)


def damaged_rows(item: Item) -> None:
    item.values[7][3] -= 4.0


def right_config(asked: Asked, path: Path) -> Asked:
    import json

    text = (path / "compression_config.yaml").read_text().split("\n", 1)[1]
    right = path.parent / "right.yaml"
    right.write_text(json.dumps(json.loads(text) | {"normalize_t": False, "delta_encoding": True}))
    return asked.read(config=str(right))


def tell(asked: Asked, _: Path) -> Asked:
    return replace(asked, teacher=TEACHERS[0])


TEACHERS: list[Teacher] = []


def accept(name: str) -> Callable[[Asked, Path], Asked]:
    return lambda asked, _: asked.say(accept=frozenset({name}))


def repair(name: Any) -> Callable[[Asked, Path], Asked]:
    return lambda asked, _: asked.say(repairs=frozenset({name}))


CASES: dict[tuple[str, str], Case] = {
    ("alignment_unclear", "--teacher MODEL"): Case(lambda t, f: write_columns(f / "a.parquet", few_rows(t)), tell),
    ("alignment_unclear", "--accept"): Case(
        lambda t, f: write_columns(f / "a.parquet", few_rows(t)), accept("alignment_unclear")
    ),
    ("broken_tails", "--repair tails"): Case(noisy_curves, repair("tails")),
    ("broken_tails", "--config FILE"): Case(distillkit(FINE, normalize_t=True), right_config),
    ("displaced_entries", "--repair k+1"): Case(displaced, repair("k+1"), with_teacher=True),
    ("duplicate_ids", "--repair duplicates"): Case(columns(repeat), repair("duplicates")),
    ("few_hits", "--teacher MODEL"): Case(a_third_moved, tell),
    ("few_hits", "--accept"): Case(a_third_moved, accept("few_hits")),
    ("foreign_positions", "--teacher MODEL"): Case(
        columns(lambda item: setattr(item, "input_ids", [(7 * i + 3) % 500 for i in item.input_ids])), tell
    ),
    ("foreign_sequences", "--teacher MODEL"): Case(one_moved, tell),
    ("ids_outside_vocabulary", "--vocab-size V"): Case(
        distillkit(FINE | {"d": 513}), lambda asked, _: asked.examine(vocab_size=520)
    ),
    ("k_plus_1_entries", "--repair k+1"): Case(
        lambda t, f: write_columns(f / "a.parquet", with_extra_target(t)), repair("k+1"), with_teacher=True
    ),
    ("many_hits", "--teacher MODEL"): Case(greedy, tell),
    ("named_logits", "--values logprobs"): Case(
        columns(nothing, values="logits"), lambda asked, _: asked.read(values="logprobs")
    ),
    ("negated_logprobs", "--values nll"): Case(columns(of_values(np.negative)), lambda asked, _: asked.read(values="nll")),
    ("no_tokens", "--column tokens=NAME"): Case(
        columns(nothing, tokens="the_text"), lambda asked, _: asked.read(columns={"tokens": "the_text"})
    ),
    ("other_logarithms", "--teacher MODEL"): Case(columns(of_values(lambda values: values / np.log(2))), tell),
    ("other_logarithms", "--accept"): Case(
        columns(of_values(lambda values: values / np.log(2))), accept("other_logarithms")
    ),
    ("outlier_positions", "--accept"): Case(columns(damaged_rows), accept("outlier_positions"), with_teacher=True),
    ("padding", "--column attention_mask=NAME"): Case(
        padded, lambda asked, _: asked.read(columns={"attention_mask": "mask_of_text"})
    ),
    ("padding", "--accept"): Case(padded, accept("padding")),
    ("padded_vocabulary_ids", "--vocab-size V"): Case(
        columns(nothing), lambda asked, _: asked.examine(vocab_size=520),
        before=lambda asked: asked.examine(vocab_size=None),
    ),
    ("probabilities", "--values probs"): Case(columns(of_values(np.exp)), lambda asked, _: asked.read(values="probs")),
    ("shifted_positions", "--shift -1"): Case(columns(shift(1)), lambda asked, _: asked.say(shift=-1)),
    ("shifted_positions", "--shift +1"): Case(columns(shift(-1)), lambda asked, _: asked.say(shift=1)),
    ("teacher_moves", "--accept"): Case(columns(nothing), accept("teacher_moves"), with_teacher=True),
    ("temperature_applied", "--teacher MODEL"): Case(tempered(3.0), tell),
    ("temperature_applied", "--accept"): Case(tempered(3.0), accept("temperature_applied")),
    ("wrong_config", "--config FILE"): Case(distillkit(FINE, delta_encoding=False), right_config),
}  # fmt: skip

DECIDED_OTHERWISE = {
    ("few_hits", "--teacher MODEL"): {"teacher_disagrees", "foreign_sequences"},
    ("foreign_positions", "--teacher MODEL"): {"teacher_disagrees"},
    ("foreign_sequences", "--teacher MODEL"): {"foreign_sequences"},
    ("many_hits", "--teacher MODEL"): {"teacher_disagrees"},
    ("other_logarithms", "--teacher MODEL"): {"temperature_applied"},
    ("temperature_applied", "--teacher MODEL"): {"temperature_applied"},
}
"""What the teacher then says, where the cache is not a sound one; elsewhere it is converted."""

ELSEWHERE = {
    ("no_tokens", "--tokenizer NAME"): "test_layouts.py: chats, whose ids the tokenizer's template makes",
    "--column ids=NAME": "test_doctor.py::test_columns_of_other_names_are_named",
    "--column values=NAME": "the same",
    "--column tokens=NAME": "the same, and above",
    "--column entries=NAME": "test_layouts.py",
    "--config": "test_formats.py::test_a_distillkit_cache_without_its_config_is_refused_in_words_and_read_with_it",
    "--tokenizer NAME": "test_layouts.py",
    "--repair duplicates": "above",
    "--vocab-size": "above",
}


@pytest.fixture(scope="module", autouse=True)
def teacher(truth: Truth) -> Iterator[Teacher]:
    loaded = load_teacher(TeacherConfig(model=str(truth.model), backend="transformers", dtype="float32"))
    TEACHERS.append(loaded)
    yield loaded
    TEACHERS.clear()
    loaded.close()


def test_the_table_has_every_advice():
    advised = {(name, line) for name, lines in ADVICE.items() for line in lines}
    undecided = {(name, "--accept") for name in _undecided_names()}
    assert advised | undecided == set(CASES) | {key for key in ELSEWHERE if isinstance(key, tuple)}


def _undecided_names() -> set[str]:
    """Names of findings that some line of the package makes undecided."""
    found: set[str] = set()
    for node in (node for tree in _trees() for node in ast.walk(tree)):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Finding":
            constants = [arg.value if isinstance(arg, ast.Constant) else None for arg in node.args[:2]]
            assert constants[0] is not None or node.args[1:2], "a finding's name is written where it is made"
            if constants[1] == "undecided":
                assert isinstance(constants[0], str)
                found.add(constants[0])
    return found


def _trees() -> list[ast.Module]:
    return [ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))]


def test_no_other_flag_stands_in_any_message():
    said = {flag for tree in _trees() for text in _messages(tree) for flag in FLAG.findall(text)}
    lines = {line for lines in ADVICE.values() for line in lines} | {key for key in ELSEWHERE if isinstance(key, str)}
    flags = {line.split()[0] for line in lines} | {"--accept", "--shift", "--codec", "--deep"}
    assert {flag for flag in said if flag.split()[0] not in flags} == set()
    exact = {flag for flag in said if flag.split()[0] in ("--repair", "--values", "--column")}
    assert {flag for flag in exact if not any(line.startswith(flag) for line in lines)} == set()


def _messages(tree: ast.Module) -> Iterator[str]:
    documents = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documents:
            yield node.value


def test_a_finding_with_another_repair_cannot_be_made():
    with pytest.raises(ValueError, match="'shifted_positions' advises '--repair rows', which is not in ADVICE"):
        Finding("shifted_positions", "repairable", "so", "--repair rows")


@pytest.mark.parametrize(("name", "advice"), CASES, ids=lambda value: value.replace(" ", "_"))
def test_the_advice_works(truth: Truth, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, advice: str):
    case = CASES[name, advice]
    if name == "teacher_moves":
        monkeypatch.setattr(live, "what_moved", lambda *_: "the answer moves")
    asked = case.before(Asked(ConvertConfig(tokenizer=TOKENIZER, codec="raw", examine=_options(truth, case, advice))))
    asked = replace(asked, teacher=TEACHERS[0] if case.with_teacher else None)
    path = case.write(truth, tmp_path)
    (finding,) = [found for found in look(path, asked).findings if found.name == name]
    flag = advice.split()[0]
    assert flag in f"{finding.sentence} {finding.repair}" or (flag == "--accept" and finding.severity == "undecided")
    followed = case.follow(asked, path)
    if (name, advice) in DECIDED_OTHERWISE:
        found = look(path, followed)
        assert set(defects(found)) <= DECIDED_OTHERWISE[name, advice]
        assert found.comparison is not None
        return
    with pytest.raises(InputError, match=name):
        convert(path, tmp_path / "no", asked.convert, teacher=asked.teacher)
    made = convert(path, tmp_path / "cache", followed.convert, teacher=followed.teacher)
    assert verify_cache(tmp_path / "cache").is_sound
    assert made.account.num_positions > 0
    if (name, advice) == ("padding", "--accept"):  # padding and all: another text
        return
    assert_near_truth(tmp_path / "cache", truth, exact=name not in UNLIKE_THE_TRUTH)


UNLIKE_THE_TRUTH = ("few_hits", "other_logarithms", "outlier_positions", "temperature_applied")


def _options(truth: Truth, case: Case, advice: str) -> ExamineConfig:
    width = None if "distillkit" in repr(case.write) or advice.startswith("--vocab") else 520
    return ExamineConfig(vocab_size=width, tokenizer_size=512, num_sequences=8)


def look(path: Path, asked: Asked) -> Examination:
    return examine(path, asked.convert.examine, teacher=asked.teacher)


def assert_near_truth(cache: Path, truth: Truth, *, exact: bool) -> None:
    """Every entry has the teacher's logprob of its id at its position; near the ends np.roll brought rows round."""
    with kdcache.open(cache) as reader:
        for s, record in enumerate(reader[i] for i in range(len(reader))):
            ids_PK, logprobs_PK = record.distributions.padded()
            t_P = record.sequence.positions_P
            true_PK = np.take_along_axis(truth.logprobs_SNV[s][t_P], np.maximum(ids_PK, 0), axis=1)
            inner_PK = (ids_PK >= 0) & ((t_P >= 1) & (t_P <= 61))[:, None]
            if exact:
                np.testing.assert_allclose(logprobs_PK[inner_PK], true_PK[inner_PK], atol=0.3)
                assert float(np.abs(logprobs_PK - true_PK)[inner_PK].mean()) < 0.03


def test_two_advices_at_once_are_followed_at_once(truth: Truth, tmp_path: Path, teacher: Teacher):
    from kdcache.cli.commands.doctor import mending_command

    path = engine_s(truth, tmp_path)
    asked = Asked(ConvertConfig(tokenizer=TOKENIZER, codec="raw", examine=ExamineConfig(vocab_size=520, num_sequences=8)))
    for asking in (None, teacher):
        found = examine(path, asked.convert.examine, teacher=asking)
        assert mending_command(found) == f"kdcache convert {path} --out OUT --tokenizer NAME --repair k+1 --shift -1"
        assert "missing_positions" in notes(found)
    convert(path, tmp_path / "cache", replace(asked.convert, shift=-1, repairs=frozenset({"k+1"})), teacher=teacher)
    assert_near_truth(tmp_path / "cache", truth, exact=True)
