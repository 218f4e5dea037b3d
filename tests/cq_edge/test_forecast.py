import numpy as np
import pytest

from cq_edge.forecast import Forecast, expected_back

WEIGHTS = np.zeros((8, 3, 3), np.float32)
WEIGHTS[3, 2, 1] = 0.5
WEIGHTS[3, 2, 2] = 1.5


def after(*points):
    forecast = Forecast()
    for step, value in points:
        forecast = forecast.after(step, np.array([value, 2 * value], np.float32))
    return forecast


def test_the_last_change_goes_on_as_far_as_the_three_steps_weight_says():
    forecast = after((1, 10.0), (3, 16.0))
    np.testing.assert_allclose(forecast.at(4, WEIGHTS), [19.0, 38.0])
    np.testing.assert_allclose(forecast.at(5, WEIGHTS), [25.0, 50.0])
    assert forecast.at(4, WEIGHTS).dtype == np.float32


def test_only_the_last_two_values_count():
    np.testing.assert_array_equal(
        after((0, 99), (1, 10), (3, 16)).at(4, WEIGHTS), after((1, 10), (3, 16)).at(4, WEIGHTS)
    )


def test_the_change_from_a_value_that_was_computed_in_part_does_not_go_on():
    whole = Forecast().after(1, 10.0).after(2, 99.0, in_part=True)
    assert whole.at(3) == 99  # the newest is still the best there is
    assert whole.after(3, 16.0).at(4, WEIGHTS) == 19
    assert whole.after(3, 16.0, in_part=True).points == ((3, 16.0), (1, 10.0))
    assert whole.after(3, 16.0).after(5, 20.0).points == ((5, 20.0), (3, 16.0))


def test_without_a_weight_for_its_steps_the_last_value_is_taken_again():
    forecast = after((1, 10.0), (3, 16.0))
    for found in (
        forecast.at(4),
        forecast.at(6, WEIGHTS),  # further on than weights reach
        after((0, 10.0), (3, 16.0)).at(4, WEIGHTS),  # further back
        after((3, 16.0)).at(4, WEIGHTS),
    ):
        np.testing.assert_array_equal(found, [16.0, 32.0])


def test_nothing_cannot_be_forecast_from():
    with pytest.raises(ValueError, match="at least one"):
        Forecast().at(1)


def test_computed_steps_are_expected_to_lie_evenly():
    assert [expected_back(step, 2) for step in range(5)] == [0, 1, 2, 3, 3]
