"""Hits beside masses: sound rows stay within chance, every damage is far beyond it, and the sequence is named."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from foreign_cases import Item, Truth, changed, defects, items, log_softmax, notes, with_extra_target, write_columns

from kdcache.foreign.base import ForeignSequence
from kdcache.foreign.blocks import blocks, may_hold_extra
from kdcache.foreign.judge.doctor import Examination, ExamineConfig, examine
from kdcache.foreign.proof import BEYOND, WITHIN, Evidence, Proof

K, V = 16, 400


def teacher_text(seed: int, num_tokens: int, *, sure: float = 1.0, flat: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """(N,) tokens and (N, V) logprobs of a teacher as unsure as it says; where `sure` is above 1 it is less sure than that.

    Below 1 `flat` makes rows of less mass.
    """
    rng = np.random.default_rng(seed)
    # Supports differ in how flat they are, as a language model's do.
    logits_NV = np.sort(rng.gumbel(size=(num_tokens, V)), axis=1)[:, ::-1] * rng.uniform(0.5, 3.0, (num_tokens, 1)) * 1.5 * flat
    order_NV = np.argsort(rng.random((num_tokens, V)), axis=1)
    true_NV, said_NV = log_softmax(logits_NV), log_softmax(sure * logits_NV)
    drawn_N = (np.exp(true_NV).cumsum(axis=1) < rng.random((num_tokens, 1))).sum(axis=1).clip(max=V - 1)
    logprobs_NV = np.empty_like(said_NV)
    np.put_along_axis(logprobs_NV, order_NV, said_NV, axis=1)
    return np.append(rng.integers(V), order_NV[np.arange(num_tokens), drawn_N][:-1]), logprobs_NV


def top_k(ids_N: np.ndarray, logprobs_NV: np.ndarray, k: int = K, source: str = "s") -> ForeignSequence:
    top_NK = np.argsort(-logprobs_NV, axis=1)[:, :k]
    return ForeignSequence(
        source, ids_N, np.arange(len(ids_N)), np.full(len(ids_N), k), top_NK.reshape(-1),
        np.take_along_axis(logprobs_NV, top_NK, axis=1).reshape(-1),
    )  # fmt: skip


def made(num_sequences: int, num_tokens: int = 80, k: int = K, sure: float = 1.0) -> list[ForeignSequence]:
    return [top_k(*teacher_text(n, num_tokens, sure=sure), k, f"s{n}") for n in range(num_sequences)]


def evidence(sequences: list[ForeignSequence], shift: int = 0) -> Evidence:
    proof = Proof()
    for sequence in sequences:
        for block in blocks(sequence, "logprobs"):
            proof.add_block(block, sequence, may_hold_extra(sequence, "logprobs"))
        proof.close(sequence)
    return proof.at(shift)


@pytest.mark.parametrize(("num_sequences", "num_tokens", "k"), [(12, 80, 16), (60, 40, 1), (300, 12, 4), (6, 300, 64)])
def test_sound_rows_stay_within_chance_and_other_shifts_do_not(num_sequences: int, num_tokens: int, k: int):
    found = evidence(made(num_sequences, num_tokens, k))
    assert abs(found.deviations) <= WITHIN
    assert abs(found.worst) <= WITHIN
    assert found.rival <= -BEYOND
    assert (found.verdict, found.suspects) == ("proven", ())
    assert found.found == pytest.approx(found.claimed, abs=0.05)


def rows_of(sequence: ForeignSequence, number: int) -> tuple[np.ndarray, np.ndarray]:
    return sequence.token_ids_E.reshape(-1, K)[number:], sequence.values_E.reshape(-1, K)[number:]


def with_rows(sequence: ForeignSequence, ids_PK: np.ndarray, values_PK: np.ndarray) -> ForeignSequence:
    n = len(ids_PK)
    return dataclasses.replace(
        sequence,
        positions_P=np.arange(n),
        counts_P=np.full(n, K),
        token_ids_E=ids_PK.reshape(-1),
        values_E=values_PK.reshape(-1),
    )


def shifted(sequence: ForeignSequence, first: int = 0) -> ForeignSequence:
    """Supports from the first on stand one later than they belong."""
    ids_PK, values_PK = sequence.token_ids_E.reshape(-1, K), sequence.values_E.reshape(-1, K)
    moved = np.r_[: first + 1, first : len(ids_PK) - 1]
    return with_rows(sequence, ids_PK[moved], values_PK[moved])


def swapped(sequences: list[ForeignSequence]) -> list[ForeignSequence]:
    a, b = sequences[2], sequences[5]
    return [*sequences[:2], with_rows(a, *rows_of(b, 0)), *sequences[3:5], with_rows(b, *rows_of(a, 0)), *sequences[6:]]


def padded(sequence: ForeignSequence) -> ForeignSequence:
    """A quarter more tokens, all one, beside copies of the last row."""
    ids_PK, values_PK = sequence.token_ids_E.reshape(-1, K), sequence.values_E.reshape(-1, K)
    number = len(ids_PK) // 2
    longer = dataclasses.replace(sequence, input_ids_N=np.append(sequence.input_ids_N, np.zeros(number, int)))
    return with_rows(longer, *(np.concatenate([a, np.repeat(a[-1:], number, axis=0)]) for a in (ids_PK, values_PK)))


DAMAGES: dict[str, Callable[[list[ForeignSequence]], list[ForeignSequence]]] = {
    "ids plus one": lambda made: [dataclasses.replace(s, token_ids_E=s.token_ids_E + 1) for s in made],
    "another tokenizer": lambda made: [dataclasses.replace(s, input_ids_N=(7 * s.input_ids_N + 3) % V) for s in made],
    "one sequence shifted": lambda made: [*made[:4], shifted(made[4]), *made[5:]],
    "two swapped": swapped,
    "half of each shifted": lambda made: [shifted(s, 40) for s in made],
    "half of them shifted": lambda made: [shifted(s) if n % 2 else s for n, s in enumerate(made)],
    "padding": lambda made: [padded(s) for s in made],
}


@pytest.mark.parametrize("name", DAMAGES)
def test_every_damage_is_far_beyond_chance(name: str):
    found = evidence(DAMAGES[name](made(12)))
    assert min(found.deviations, found.worst) <= -BEYOND
    assert found.verdict == "foreign"
    assert [s.source for s in found.suspects] == {
        "one sequence shifted": ["s4"], "two swapped": [s.source for s in found.suspects if s.source in ("s2", "s5")],
    }.get(name, [s.source for s in found.suspects])  # fmt: skip
    if name == "one sequence shifted":
        assert found.suspects[0].other_shift == -1
    if name == "two swapped":
        assert len(found.suspects) == 2


@pytest.mark.parametrize(("sure", "sign"), [(0.6, 1), (1.7, -1)])
def test_a_wrong_temperature_is_beyond_chance_and_no_misplacement(sure: float, sign: int):
    found = evidence(made(12, sure=sure))
    assert sign * found.deviations >= BEYOND
    assert found.suspects == ()
    assert found.verdict != "foreign"


def test_a_teacher_that_is_surer_than_it_should_be_is_not_accused():
    found = evidence(made(60, 300, sure=1.15))
    assert found.deviations < -BEYOND
    assert (found.verdict, found.suspects) == ("proven", ())


def test_a_few_rows_of_another_text_are_no_proof_either_way():
    sequences = made(12)
    mixed = [
        with_rows(
            s, *(np.concatenate([mine[:-12], others[:12]]) for mine, others in zip(rows_of(s, 0), rows_of(o, 0), strict=True))
        )
        for s, o in zip(sequences, [*sequences[1:], sequences[0]], strict=True)
    ]
    found = evidence(mixed)
    assert (found.verdict, found.suspects) == ("doubtful", ())
    assert found.deviations < -WITHIN


def test_a_surprise_in_rows_that_hold_nearly_everything_is_no_proof():
    """Where (hits - masses) / sqrt(sum m (1 - m)) says 9 standard deviations, Chernoff's bound says what two misses are."""
    ids, logprobs = teacher_text(1, 60)
    sharp = top_k(ids, log_softmax(8 * logprobs))
    sharp.token_ids_E.reshape(-1, K)[:-1, 0] = ids[1:]
    sharp.token_ids_E.reshape(-1, K)[[20, 40]] = np.arange(K) + V
    assert -5 < evidence([sharp]).deviations < -2


def test_rows_that_hold_the_whole_vocabulary_prove_nothing():
    assert evidence(made(4, 40, V)).verdict == "untested"
    assert evidence(made(1, 20)).verdict == "untested"


def test_the_number_of_sequences_is_taken_into_account():
    found = evidence([*made(1, 60), *(top_k(*teacher_text(n, 12)) for n in range(500))])
    assert abs(found.worst) <= WITHIN
    proof = Proof(num_sequences=1000)
    assert proof._among_all(-3.0) == 0
    assert proof._among_all(-8.0) == pytest.approx(-math.sqrt(64 - 2 * math.log(1000)))


def test_the_text_s_own_token_in_the_row_proves_nothing(truth: Truth, tmp_path: Path):
    """Every target is in a row of k+1 entries; without those the rows of another text are found out."""
    path = write_columns(tmp_path / "a.parquet", with_extra_target(truth))
    assert set(defects(examine(path, ExamineConfig()))) == {"k_plus_1_entries"}
    rows = with_extra_target(truth)
    others = [*rows[1:], rows[0]]
    for item, other in zip(rows, [list(map(list, o.ids)) for o in others], strict=True):
        # Another text's top k, and this text's own token beside it.
        for t, target in enumerate(item.input_ids[1:]):
            item.ids[t] = [i for i in other[t][:K] if i != target] + [target]
            item.values[t] = [*item.values[t][: len(item.ids[t]) - 1], -12.0]
    assert "foreign_positions" in defects(examine(write_columns(tmp_path / "b.parquet", rows), ExamineConfig()))


def look(path: Path, made: list[Item]) -> Examination:
    return examine(write_columns(path / "a.parquet", made), ExamineConfig())


def test_the_doctor_names_what_is_out_of_place(truth: Truth, tmp_path: Path):
    rows = items(truth)
    rows[3].ids, rows[3].values = (np.roll(part, 1, axis=0).tolist() for part in (rows[3].ids, rows[3].values))
    found = look(tmp_path, rows)
    assert set(defects(found)) == {"foreign_sequences"}
    (sentence,) = [f.sentence for f in found.findings if f.name == "foreign_sequences"]
    assert "1 of 8 sequences" in sentence
    assert "a.parquet#3 (" in sentence
    assert "and -1 would fit" in sentence
    plus_one = look(tmp_path, changed(items(truth), lambda item: setattr(item, "ids", (np.array(item.ids) + 1).tolist())))
    assert set(defects(plus_one)) == {"foreign_positions"}
    other = look(tmp_path, changed(items(truth), lambda i: setattr(i, "input_ids", [(7 * t + 3) % 500 for t in i.input_ids])))
    assert set(defects(other)) == {"foreign_positions"}


def test_a_text_that_was_written_greedily_is_a_note(truth: Truth, tmp_path: Path):
    rows = items(truth)
    for item in rows:
        item.input_ids = [item.input_ids[0], *(row[0] for row in item.ids)]
    assert "many_hits" in notes(look(tmp_path, rows))


@pytest.mark.parametrize("k", [4, 16])
def test_a_short_shifted_sequence_is_seen_where_the_teacher_is_unsure(k: int):
    """Its hits alone are between chance and proof, and its text is likelier under another shift."""
    sequences = [top_k(*teacher_text(100 + n, 14, flat=0.6), k, f"s{n}") for n in range(12)]
    assert evidence(sequences).suspects == ()
    ids_N = sequences[4].input_ids_N
    assert ids_N is not None
    sequences[4] = dataclasses.replace(sequences[4], input_ids_N=np.append(ids_N[0], ids_N[:-1]))
    found = evidence(sequences)
    assert -BEYOND < found.worst <= -WITHIN
    assert [(s.source, s.other_shift, s.gain > 6) for s in found.suspects] == [("s4", 1, True)]
    assert found.verdict == "foreign"
