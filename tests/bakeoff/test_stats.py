import pytest

from adamac.bakeoff.stats import mean, percentile, ratio_interval


def test_percentiles_interpolate_between_neighbours():
    values = list(range(101))
    assert [percentile(values, share) for share in (0.5, 0.95, 0.99)] == [50, 95, 99]
    assert percentile([1.0, 2.0], 0.5) == 1.5


def test_nothing_has_no_percentile_and_no_mean():
    assert percentile([], 0.5) is None
    assert mean([]) is None


def test_the_interval_of_a_constant_ratio_is_a_point():
    assert ratio_interval([2, 4, 6, 8], [1, 2, 3, 4]) == pytest.approx((2, 2))


def test_three_cases_are_too_few_for_an_interval():
    assert ratio_interval([1, 2, 3], [1, 2, 3]) is None


def test_the_interval_holds_the_ratio_of_the_medians():
    low, high = ratio_interval([10, 12, 11, 13, 9], [5, 5.5, 6, 5, 6])
    assert low <= 11 / 5.5 <= high
