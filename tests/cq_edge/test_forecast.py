import numpy as np
import pytest

from cq_edge.forecast import Forecast


def line(*points):
    forecast = Forecast()
    for sigma, value in points:
        forecast = forecast.after(sigma, np.array([value, 2 * value]))
    return forecast


def test_what_is_straight_over_sigma_is_forecast_exactly():
    forecast = line((9.0, 28.0), (5.0, 16.0))
    np.testing.assert_allclose(forecast.at(3.0), [10.0, 20.0])
    np.testing.assert_allclose(forecast.at(0.5), [2.5, 5.0])


def test_only_the_last_two_values_count():
    np.testing.assert_array_equal(
        line((9, 100), (5, 16), (3, 10)).at(2), line((5, 16), (3, 10)).at(2)
    )


def test_the_slope_can_be_followed_in_part_or_not_at_all():
    forecast = line((9.0, 28.0), (5.0, 16.0))
    np.testing.assert_allclose(forecast.at(3.0, slope=0.5), [13.0, 26.0])
    np.testing.assert_allclose(forecast.at(3.0, slope=0), [16.0, 32.0])


def test_one_value_alone_is_taken_again():
    np.testing.assert_array_equal(line((9.0, 28.0)).at(3.0), [28.0, 56.0])


def test_of_two_values_at_one_sigma_the_later_counts():
    twice = line((9.0, 28.0), (5.0, 99.0), (5.0, 16.0))
    np.testing.assert_allclose(twice.at(3.0), [10.0, 20.0])


def test_nothing_cannot_be_forecast_from():
    with pytest.raises(ValueError, match="at least one"):
        Forecast().at(1.0)
