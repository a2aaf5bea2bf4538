import math

from kdcache.report.sparkline import ASCII, BLOCKS, sparkline


def test_lowest_and_highest_values_have_the_lowest_and_highest_block() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == BLOCKS


def test_long_curves_are_averaged_to_the_width() -> None:
    assert sparkline([0, 0, 1, 1], width=2) == BLOCKS[0] + BLOCKS[-1]
    assert len(sparkline(range(1000), width=40)) == 40


def test_a_common_scale_makes_curves_comparable() -> None:
    assert sparkline([5.0, 5.0], low=0, high=10) == BLOCKS[4] * 2


def test_values_outside_the_scale_stay_in_the_blocks() -> None:
    assert sparkline([-1.0, 2.0], low=0, high=1) == BLOCKS[0] + BLOCKS[-1]


def test_a_flat_curve_and_an_empty_one_are_no_error() -> None:
    assert sparkline([2.0, 2.0]) == BLOCKS[0] * 2
    assert sparkline([]) == ""


def test_numbers_that_are_not_finite_leave_a_blank() -> None:
    assert sparkline([0.0, math.nan, 1.0]) == BLOCKS[0] + " " + BLOCKS[-1]
    assert sparkline([math.nan]) == " "


def test_a_terminal_without_blocks_gets_ascii() -> None:
    assert sparkline([0.0, 1.0], encoding="ascii") == ASCII[0] + ASCII[-1]
    assert sparkline([0.0, 1.0], encoding=None).isascii()
