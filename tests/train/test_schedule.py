import pytest

from kdcache.config.train import OptimizerConfig
from kdcache.train.schedule import learning_rate


def _rates(num_steps: int, **settings: object) -> list[float]:
    config = OptimizerConfig(lr=1.0, **settings)  # pyright: ignore[reportArgumentType]
    return [learning_rate(step, num_steps, config) for step in range(num_steps)]


def test_the_rate_rises_linearly_and_reaches_its_height_with_the_last_warmup_step() -> None:
    assert _rates(10, schedule="constant", warmup_fraction=0.4) == pytest.approx([0.25, 0.5, 0.75] + [1.0] * 7)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_falling_schedules_end_at_the_final_fraction(schedule: str) -> None:
    rates = _rates(50, schedule=schedule, warmup_fraction=0.1, final_fraction=0.2)
    assert max(rates) == rates[4] == 1.0
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] == pytest.approx(0.2)


def test_the_cosine_is_halfway_at_half_of_the_fall() -> None:
    assert _rates(10, schedule="cosine", warmup_fraction=0.0, final_fraction=0.0)[4] == pytest.approx(0.5)


@pytest.mark.parametrize("warmup_fraction", [0.0, 1.0])
def test_a_single_step_has_a_rate(warmup_fraction: float) -> None:
    (rate,) = _rates(1, warmup_fraction=warmup_fraction)
    assert 0 < rate <= 1
