from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from contracts.teacher import PROMISES, TeacherCase, closing, make_sequence, top_k

from kdcache.config.teacher import FakeConfig, TeacherConfig
from kdcache.teacher import load_teacher
from kdcache.teacher.fake import FakeTeacher, prefix_hashes


def config(**changes: int) -> TeacherConfig:
    settings = FakeConfig(**{"vocab_size": 300, "context_length": 100} | changes)
    return TeacherConfig(model="fake", backend="fake", fake=settings)


@pytest.fixture
def case() -> TeacherCase:
    teacher = FakeTeacher(config())
    return TeacherCase(teacher, teacher.dense_logprobs, 1e-6, lambda: load_teacher(config()).identity)


@pytest.mark.parametrize("promise", [*PROMISES, closing], ids=lambda promise: promise.__name__)
def test_the_fake_teacher_keeps_every_promise(promise: Callable[[TeacherCase], None], case: TeacherCase):
    promise(case)


@pytest.mark.parametrize("vocab_size", [1, 2, 6, 64, 97, 300])
def test_the_dense_distribution_sums_to_one_at_any_vocabulary(vocab_size: int):
    teacher = FakeTeacher(config(vocab_size=vocab_size))
    dense_NV = teacher.dense_logprobs(make_sequence(np.arange(20) % vocab_size))
    np.testing.assert_allclose(np.exp(dense_NV).sum(axis=-1), 1.0, rtol=1e-12)


def test_a_distribution_depends_on_the_whole_prefix_its_order_and_the_seed():
    hashes = prefix_hashes(np.array([5, 6, 7, 8], np.int32), 0)
    assert len(set(hashes.tolist())) == 4
    swapped = prefix_hashes(np.array([6, 5, 7, 8], np.int32), 0)
    assert not np.isin(swapped, hashes).any()
    assert not np.isin(prefix_hashes(np.array([5, 6, 7, 8], np.int32), 1), hashes).any()
    later = prefix_hashes(np.array([5, 6, 7, 9], np.int32), 0)
    assert (later[:3] == hashes[:3]).all()
    assert later[3] != hashes[3]


def test_its_answers_never_change_between_versions_of_the_same_number():
    # A change here is a change of FAKE_VERSION: caches made with the fake teacher would resume into other content.
    (answer,) = FakeTeacher(config(seed=3)).score([make_sequence([1, 2, 3])], top_k(3))
    assert answer.token_ids_E.tolist() == [62, 145, 228, 144, 167, 190, 162, 259, 56]
    np.testing.assert_allclose(answer.tail_mass_P, [0.08775146, 0.19497284, 0.12071733], atol=1e-6)
